"""The engine: a plan, two tiers, a scheduler, and the loop that keeps several microbatches between them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import models
from hetero_jax.attention_tier import AttentionTier
from hetero_jax.config import EngineConfig
from hetero_jax.dense_tier import DenseTier
from hetero_jax.depth import SMALLEST_DEPTH, DepthRule
from hetero_jax.devices import place
from hetero_jax.engine_stats import EngineStats
from hetero_jax.errors import ConfigError, RequestError
from hetero_jax.outputs import Completion, Request
from hetero_jax.page_groups import group_pages
from hetero_jax.prefixes import page_keys
from hetero_jax.remote_tier import RemoteTier
from hetero_jax.rows import pack
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import Batch, SchedulerConfig
from hetero_jax.sequence import RequestGroup, SequenceState, failed
from hetero_jax.text import TextStream
from hetero_jax.tier2 import make_tier2
from hetero_jax.tracing import Trace
from hetero_jax.walk import Tiers, Timings, Walk, choose
from partition import Plan, partition

Prompt = str | Sequence[int] | Request


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """What an engine knows of a model besides its plan; a `models.LoadedModel` knows more."""

    tokenizer: models.Tokenizer | None
    name: str = "a plan"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a generated text."""
        return () if self.tokenizer is None else self.tokenizer.eos_token_ids


class Engine:
    """Generates text with a partitioned model: dense stages on tier 1, paged attention on tier 2.

    Args:
      model: what `hetero_jax.load` returned, or the plan of any other model with its parameters.
      config: sizes and placement.
      tokenizer: of a plan's model; without one, prompts are token ids and texts are empty.
    Raises:
      ConfigError: the configuration does not fit the model or the machine.
      PartitionError: the model cannot be partitioned; the message names the primitive and its source line.
    """

    def __init__(
        self,
        model: models.LoadedModel | Plan,
        config: EngineConfig | None = None,
        *,
        tokenizer: models.Tokenizer | None = None,
    ) -> None:
        self.model = PlannedModel(tokenizer=tokenizer) if isinstance(model, Plan) else model
        self.config = config or EngineConfig()
        placement = place(self.config)
        plan = _plan_of(model, self.config.max_model_len)
        params, self.plan = plan.forward.params, plan.of_shapes()  # of stacked weights only slices are needed from here
        self.max_model_len = self.config.max_model_len or plan.max_rows
        dtype = jnp.dtype(self.config.kv_cache_dtype or _float_dtype(params))
        wire_dtype = self.config.wire_dtype if self.config.has_workers else None
        self._dense = DenseTier(self.plan, params, device=placement.tier1, wire_dtype=wire_dtype)
        groups = group_pages(self.plan.sites, max_model_len=self.max_model_len)
        limits = SchedulerConfig(
            page_size=self.config.page_size,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_num_seqs=self.config.max_num_seqs,
            num_microbatches=self.config.num_microbatches or SMALLEST_DEPTH,
            max_model_len=self.max_model_len,
            windows=groups.windows,
        )
        most_pages = limits.max_num_seqs * limits.most_pages(self.max_model_len)
        self._attention, self._fleet = make_tier2(
            self.config, self.plan, params, placement, pages=groups.sites, dtype=dtype, most_pages=most_pages
        )
        _check_tier1_memory(self.config, self._dense, self._attention)
        self._scheduler = Scheduler(limits, pools={0: self._attention.num_pages} if self._fleet is None else {})
        self._follow_workers()
        self._depth = DepthRule()
        self._timings = Timings()
        self._tiers = Tiers(self.plan, self._dense, self._attention, self._timings)
        self._sequences: dict[int, SequenceState] = {}
        self._next_id = 0
        self._stats = EngineStats()

    def __repr__(self) -> str:
        pages = f"{self._attention.num_pages} KV pages of {self.config.page_size} tokens"
        return (
            f"Engine({self.model.name}: {len(self.plan.stages)} dense stages on {self._dense.device}, "
            f"{len(self.plan.sites)} attention sites on {self._attention.place}, "
            f"{pages} ({self._attention.pool_bytes / 2**20:.0f} MiB))"
        )

    @property
    def trace(self) -> Trace | None:
        """Set to record what runs when."""
        return self._tiers.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._tiers.trace = trace
        if self._fleet is not None:
            self._fleet.trace = trace

    @property
    def profile(self) -> bool:
        """Set to wait for every call, so that `stats` can tell dense, attention and host time apart (slower)."""
        return self._timings.enabled

    @profile.setter
    def profile(self, enabled: bool) -> None:
        self._timings.enabled = enabled

    @property
    def stats(self) -> EngineStats:
        """Counters so far."""
        return replace(
            self._stats,
            num_microbatches=self._scheduler.num_microbatches,
            pages_used=self._scheduler.pages_used,
            pages_total=self._scheduler.pages_total,
            preemptions=self._scheduler.num_preemptions,
            prefix_cache_hits=self._scheduler.prefix_cache_hits,
            workers_lost=0 if self._fleet is None else self._fleet.num_lost,
            sequences_moved=0 if self._fleet is None else self._fleet.num_moved,
            **{f"{part}_s": seconds for part, seconds in self._timings.seconds.items()},
        )

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        on_error: Literal["fail", "record"] = "fail",
    ) -> Iterator[Completion]:
        """Yield a Completion per prompt, in the order in which they finish (`Completion.id` tells which).

        Args:
          prompts: texts, token id sequences or Requests; a bare prompt gets its index as id.
          sampling_params: for prompts that bring none of their own.
          on_error: "fail" raises before anything runs if a request cannot run; "record" yields it as a Completion
            with `error` and runs the others.
        Raises:
          RequestError: a prompt that cannot run (on_error="fail").
        """
        requests = _as_requests(prompts)
        defaults = sampling_params or SamplingParams()
        return self._generate(requests, defaults, on_error)

    def _generate(self, requests: Iterable[Request], defaults: SamplingParams, on_error: str) -> Iterator[Completion]:
        admitted, refused = self._admit_all(requests, defaults, on_error)
        in_flight: dict[int, Walk] = {}
        try:
            yield from refused
            yield from self._drive(in_flight)
        finally:
            # A caller may stop early: nothing of this call stays behind, no sequence and no microbatch.
            for seq_id in admitted:
                if self._sequences.pop(seq_id, None) is not None:
                    self._scheduler.abort(seq_id)
            for batch_id in in_flight:
                self._scheduler.complete(batch_id, {})

    def _admit_all(
        self, requests: Iterable[Request], defaults: SamplingParams, on_error: str
    ) -> tuple[list[int], list[Completion]]:
        groups: list[RequestGroup] = []
        refused: list[Completion] = []
        for request in requests:
            try:
                groups.append(self._group(request, defaults))
            except (RequestError, models.ModelError) as error:  # the latter: a chat template that refuses
                if on_error == "fail":
                    raise RequestError(f"request {request.id!r}: {error}") from error
                refused.append(failed(request, error))
        admitted = [seq_id for group in groups for seq_id in self._enqueue(group)]
        self._add(sequences_total=len(admitted))
        return admitted, refused

    def _group(self, request: Request, defaults: SamplingParams) -> RequestGroup:
        ids = self._encode(request)
        params = self._resolve(request.sampling_params or defaults, len(ids))
        _check_vocabulary("logit_bias token id", params.logit_bias, self.plan.vocab_size)
        _check_vocabulary("stop token id", params.stop_token_ids, self.plan.vocab_size)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        stops = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        group = RequestGroup(request=request, params=params, prompt_token_ids=ids, stop_token_ids=stops)
        TextStream(self.model.tokenizer, params, self.model.eos_token_ids)  # refuses stop strings without a tokenizer
        self._scheduler.check(len(ids), params.max_tokens or 1)
        return group

    def _resolve(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """max_tokens=None means up to the model's length."""
        room = max(self.max_model_len - prompt_tokens, 1)
        return params if params.max_tokens is not None else replace(params, max_tokens=room)

    def _encode(self, request: Request) -> tuple[int, ...]:
        tokenizer, vocab = self.model.tokenizer, self.plan.vocab_size
        if request.prompt_token_ids is not None:
            ids = tuple(request.prompt_token_ids)
        elif tokenizer is None:
            raise RequestError(f"model {self.model.name!r} has no tokenizer; allowed: prompt_token_ids")
        elif request.messages is not None:
            ids = tuple(tokenizer.encode(tokenizer.apply_chat_template(request.messages), add_special_tokens=False))
        else:
            ids = tuple(tokenizer.encode(request.prompt or ""))
        if not ids:
            raise RequestError("the prompt has no tokens; at least one is needed")
        _check_vocabulary("prompt token id", ids, vocab)
        return ids

    def _enqueue(self, group: RequestGroup) -> list[int]:
        ids = []
        shares = self.config.enable_prefix_caching
        keys = page_keys(group.prompt_token_ids, self.config.page_size) if shares else ()
        for index in range(group.params.n):
            seq_id, self._next_id = self._next_id, self._next_id + 1
            self._sequences[seq_id] = SequenceState(
                seq_id=seq_id,
                group=group,
                index=index,
                seed=self.config.seed if group.params.seed is None else group.params.seed,
                text=TextStream(self.model.tokenizer, group.params, self.model.eos_token_ids),
                tokens=list(group.prompt_token_ids),
            )
            self._scheduler.add(seq_id, len(group.prompt_token_ids), group.params.max_tokens or 1, keys)
            ids.append(seq_id)
        return ids

    def _drive(self, in_flight: dict[int, Walk]) -> Iterator[Completion]:
        """Keep microbatches in flight, so that one is on tier 1 while others are on their way and on tier 2."""
        while self._scheduler.has_unfinished or in_flight:
            start_s = time.perf_counter()
            self._follow_workers()
            while (batch := self._scheduler.schedule()) is not None:
                in_flight[batch.batch_id] = self._walk(batch)
            if not in_flight:
                assert self._fleet is not None, "a pool that stays can always go on"
                self._fleet.wait(self._scheduler)
                continue
            batch_id = self._step_until_one_ends(in_flight)
            self._follow_workers()  # what comes back from one that was lost on the way counts for nothing
            found = self._complete(batch_id, in_flight.pop(batch_id))
            self._add(total_s=time.perf_counter() - start_s)
            yield from found

    def _step_until_one_ends(self, in_flight: dict[int, Walk]) -> int:
        while True:
            batch_id = choose({batch_id: walk.wait for batch_id, walk in in_flight.items()}, self.config.order)
            in_flight[batch_id] = walk = in_flight.pop(batch_id)  # now the most recently stepped
            if walk.step():
                return batch_id

    def _follow_workers(self) -> None:
        if self._fleet is not None:
            self._fleet.follow(self._scheduler)

    def _walk(self, batch: Batch) -> Walk:
        rows = pack(
            batch,
            lambda seq_id, start, length: self._sequences[seq_id].known(start, length),
            page_size=self.config.page_size,
        )
        return Walk(self._tiers, rows, [self._sequences[seq_id].row_sampling() for seq_id in rows.samplers])

    def _complete(self, batch_id: int, walk: Walk) -> list[Completion]:
        """Give a microbatch's tokens to their sequences and its places back to the scheduler."""
        finished: dict[int, bool] = {}
        completions: list[Completion] = []
        lost = self._scheduler.lost_in(batch_id)
        for row, seq_id in enumerate(walk.rows.samplers):
            if seq_id in lost:
                continue
            sequence = self._sequences.get(seq_id)
            if sequence is None or walk.sampled is None:  # its caller has stopped listening
                finished[seq_id] = True
                continue
            finished[seq_id] = sequence.push(row, walk.sampled)
            if finished[seq_id]:
                del self._sequences[seq_id]
                completion = sequence.group.finish(sequence)
                completions += [] if completion is None else [completion]
        self._scheduler.complete(batch_id, finished)
        if self.config.num_microbatches == 0:
            self._deepen(walk)
        self._add(
            tokens_generated=len(finished),
            sequences_done=sum(finished.values()),
            rows_computed=walk.rows.num_rows,
            steps=1,
        )
        if (trace := self._tiers.trace) is not None:
            trace.count("tokens", self._stats.tokens_generated)
            trace.count("pages", self._scheduler.pages_used)
            if self._fleet is not None:
                self._fleet.record(self._scheduler)
        return completions

    def _deepen(self, walk: Walk) -> None:
        """Keep as many microbatches in flight as hide the time away from tier 1."""
        stages = len(self.plan.stages)
        self._depth.observe(tier1_s=walk.host_s / stages, away_s=self._attention.away_s())
        self._scheduler.num_microbatches = self._depth.depth

    def _add(self, **counts: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in counts.items()})


def _plan_of(model: models.LoadedModel | Plan, max_model_len: int | None) -> Plan:
    if not isinstance(model, Plan):
        return partition(model.module, max_rows=max_model_len or model.config.max_position_embeddings)
    if (max_model_len or 0) > model.max_rows:
        raise ConfigError(f"max_model_len={max_model_len}: the plan was made for at most {model.max_rows} tokens")
    leaves = jax.tree.leaves(model.forward.params)
    if any(isinstance(leaves[number], jax.ShapeDtypeStruct) for number in model.stage_leaves | model.site_leaves):
        raise ConfigError(
            "the plan was made from shapes alone; allowed: a plan of parameters that are arrays, or "
            "hetero_jax.restore(plan, folder)"
        )
    return model


def _float_dtype(params: Any) -> Any:
    """The element type of most numbers: modules may hold counters and random keys too."""
    sizes: dict[Any, int] = {}
    for leaf in jax.tree.leaves(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size
    return max(sizes, key=sizes.__getitem__)


def _check_tier1_memory(config: EngineConfig, dense: DenseTier, attention: AttentionTier | RemoteTier) -> None:
    if config.tier1_memory_gb is None:
        return
    here = isinstance(attention, AttentionTier) and attention.device == dense.device
    pools = attention.pool_bytes if here else 0
    needed_gb = (dense.weight_bytes + pools) / 1e9
    if needed_gb > config.tier1_memory_gb:
        raise ConfigError(
            f"tier1_memory_gb={config.tier1_memory_gb}: the weights take {dense.weight_bytes / 1e9:.3f} GB and the KV "
            f"pools on tier 1 {pools / 1e9:.3f} GB"
        )


def _check_vocabulary(what: str, ids: Iterable[int], vocab: int) -> None:
    outside = [token for token in ids if not 0 <= token < vocab]
    if outside:
        raise RequestError(f"{what} {outside[0]} is outside the vocabulary 0..{vocab - 1}")


def _as_requests(prompts: Prompt | Iterable[Prompt]) -> list[Request]:
    several = [prompts] if isinstance(prompts, (str, Request)) else prompts
    return [_as_request(index, prompt) for index, prompt in enumerate(several)]


def _as_request(index: int, prompt: object) -> Request:
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, str):
        return Request(id=str(index), prompt=prompt)
    if isinstance(prompt, (Sequence, np.ndarray)):
        return Request(id=str(index), prompt_token_ids=tuple(int(token) for token in prompt))
    raise RequestError(f"prompt {index} is a {type(prompt).__name__}; allowed: str, token ids, Request")
