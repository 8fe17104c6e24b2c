"""The engine: a plan, two tiers, a scheduler, and the loop that keeps several microbatches between them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from hetero_jax.attention_tier import AttentionTier
from hetero_jax.config import EngineConfig
from hetero_jax.dense_tier import DenseTier
from hetero_jax.devices import land, place
from hetero_jax.errors import CapacityError, ConfigError, RequestError
from hetero_jax.outputs import Completion, Request
from hetero_jax.rows import PackedRows, pack
from hetero_jax.sampler import build_inputs, sample
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.scheduler import Batch, Scheduler, SchedulerConfig
from hetero_jax.sequence import RequestGroup, SequenceState, failed, token_logprobs
from hetero_jax.text import TextStream
from partition import Plan, partition

Prompt = str | Sequence[int] | Request


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine was made. The *_s fields but total_s are 0 unless EngineConfig.profile."""

    sequences_done: int = 0
    sequences_total: int = 0
    tokens_generated: int = 0
    rows_computed: int = 0
    steps: int = 0
    preemptions: int = 0
    pages_used: int = 0
    pages_total: int = 0
    total_s: float = 0.0
    dense_s: float = 0.0
    attention_s: float = 0.0
    sample_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second while generating."""
        return self.tokens_generated / self.total_s if self.total_s else 0.0

    @property
    def host_s(self) -> float:
        """Python, scheduler and dispatch: what is left of the total (with EngineConfig.profile)."""
        return self.total_s - self.dense_s - self.attention_s - self.sample_s


class Engine:
    """Generates text with a partitioned model: dense stages on tier 1, paged attention on tier 2.

    Args:
      model: what `hetero_jax.load` returned.
      config: sizes and placement.
    Raises:
      ConfigError: the configuration does not fit the model or the machine.
      PartitionError: the model cannot be partitioned; the message names the primitive and its source line.
    """

    def __init__(self, model: models.LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        placement = place(self.config)
        self.max_model_len = self.config.max_model_len or model.config.max_position_embeddings
        self.plan, params = _partition_module(model.module, self.max_model_len)
        dtype = jnp.dtype(self.config.kv_cache_dtype or jax.tree.leaves(params)[0].dtype)
        self._num_pages = _num_pages(self.plan, self.config, dtype)
        self._dense = DenseTier(self.plan, params, device=placement.tier1)
        self._attention = AttentionTier(
            self.plan.specs,
            num_pages=self._num_pages,
            page_size=self.config.page_size,
            dtype=dtype,
            device=placement.tier2,
        )
        _check_tier1_memory(self.config, self._dense, self._attention)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_pages=self._num_pages,
                page_size=self.config.page_size,
                max_num_batched_tokens=self.config.max_num_batched_tokens,
                max_num_seqs=self.config.max_num_seqs,
                num_microbatches=self.config.num_microbatches,
                max_model_len=self.max_model_len,
            )
        )
        reads = [frozenset(stage.reads) for stage in self.plan.stages]
        self._reads_from = [frozenset().union(*reads[index:]) for index in range(len(reads))]
        self._sequences: dict[int, SequenceState] = {}
        self._next_id = 0
        self._stats = EngineStats(pages_total=self._num_pages)

    def __repr__(self) -> str:
        pages = f"{self._num_pages} KV pages of {self.config.page_size} tokens"
        return (
            f"Engine({self.model.name}: {len(self.plan.stages)} dense stages on {self._dense.device}, "
            f"{len(self.plan.sites)} attention sites on {self._attention.device}, "
            f"{pages} ({self._attention.pool_bytes / 2**20:.0f} MiB))"
        )

    @property
    def stats(self) -> EngineStats:
        """Counters so far."""
        return replace(self._stats, pages_used=self._scheduler.pages_used, preemptions=self._scheduler.num_preemptions)

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
        try:
            yield from refused
            yield from self._drive()
        finally:
            # A caller may stop early: nothing of this call stays behind.
            for seq_id in admitted:
                if self._sequences.pop(seq_id, None) is not None:
                    self._scheduler.abort(seq_id)

    def _admit_all(
        self, requests: Iterable[Request], defaults: SamplingParams, on_error: str
    ) -> tuple[list[int], list[Completion]]:
        groups: list[RequestGroup] = []
        refused: list[Completion] = []
        for request in requests:
            try:
                groups.append(self._group(request, defaults))
            except (RequestError, CapacityError) as error:
                if on_error == "fail":
                    raise RequestError(f"request {request.id!r}: {error}") from error
                refused.append(failed(request, error))
        admitted = [seq_id for group in groups for seq_id in self._enqueue(group)]
        self._add(sequences_total=len(admitted))
        return admitted, refused

    def _group(self, request: Request, defaults: SamplingParams) -> RequestGroup:
        ids = self._encode(request)
        params = self._resolve(request.sampling_params or defaults, len(ids))
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
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise RequestError(f"prompt token id {outside[0]} is outside the vocabulary 0..{vocab - 1}")
        return ids

    def _enqueue(self, group: RequestGroup) -> list[int]:
        ids = []
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
            self._scheduler.add(seq_id, len(group.prompt_token_ids), group.params.max_tokens or 1)
            ids.append(seq_id)
        return ids

    def _drive(self) -> Iterator[Completion]:
        """Keep microbatches in flight, one step each in turn, so that one is on tier 1 while another is on tier 2."""
        in_flight: list[_Walk] = []
        while self._scheduler.has_unfinished or in_flight:
            with self._clock("total_s"):
                while (batch := self._scheduler.schedule()) is not None:
                    in_flight.append(_Walk(self, batch))
                done = [walk for walk in in_flight if walk.step()]
                in_flight = [walk for walk in in_flight if walk not in done]
                completions = [found for walk in done for found in self._complete(walk)]
            yield from completions

    def _complete(self, walk: _Walk) -> list[Completion]:
        """Give a microbatch's tokens to their sequences and its places back to the scheduler."""
        finished: dict[int, bool] = {}
        completions = []
        for row, seq_id in enumerate(walk.rows.samplers):
            sequence = self._sequences.get(seq_id)
            if sequence is None:
                finished[seq_id] = True
                continue
            token = int(walk.tokens[row])
            wanted = sequence.group.params.logprobs
            finished[seq_id] = sequence.push(token, token_logprobs(row, token, walk.sampled, wanted))
            if finished[seq_id]:
                del self._sequences[seq_id]
                completion = sequence.group.finish(sequence)
                completions += [] if completion is None else [completion]
        self._scheduler.complete(walk.batch.batch_id, finished)
        self._add(
            tokens_generated=len(finished),
            sequences_done=sum(finished.values()),
            rows_computed=walk.rows.num_rows,
            steps=1,
        )
        return completions

    def _add(self, **counts: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in counts.items()})

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(**{name: time.perf_counter() - start})


class _Walk:
    """One microbatch on its way D0 -> A0 -> D1 -> A1 ... -> DL -> sampler.

    A generator: it yields wherever the next thing to do waits for the other tier, so that the loop can step the other
    microbatches meanwhile. JAX dispatches asynchronously; only the sampled tokens are waited for.
    """

    def __init__(self, engine: Engine, batch: Batch) -> None:
        self.engine, self.batch = engine, batch
        self.rows: PackedRows = pack(
            batch,
            lambda seq_id, start, length: engine._sequences[seq_id].known(start, length),
            page_size=engine.config.page_size,
            num_pages=engine._num_pages,
        )
        self.sampled: Any = None
        self.tokens: np.ndarray = np.zeros(0, np.int32)
        self._steps = self._walk()

    def step(self) -> bool:
        """Go on to the next wait; True at the end."""
        return next(self._steps, "end") == "end"

    def _walk(self) -> Iterator[None]:
        dense, attention, plan = self.engine._dense, self.engine._attention, self.engine.plan
        tokens, positions = dense.place(self.rows.tokens), dense.place(self.rows.positions)
        layout = attention.place_layout(self.rows.layout)
        values: dict[Any, jax.Array] = {}
        sends: dict[tuple[int, str], jax.Array] = {}
        for stage, site in zip(plan.stages, plan.sites, strict=False):
            with self._timed("dense_s") as wait:
                writes, sent = dense.run(stage.index, tokens, positions, [values[v] for v in stage.reads])
                wait(writes, sent)
            values.update(zip(stage.writes, writes, strict=True))
            sends.update({(send.site, send.role): array for send, array in zip(stage.sends, sent, strict=True)})
            attention.begin(sent)
            yield
            q, k, v = (sends.pop((stage.index, role)) for role in "qkv")
            with self._timed("attention_s") as wait:
                out = attention.attend(stage.index, layout, q, k, v)
                wait(out)
            yield
            values[site.site.outputs[0]] = land(out, dense.device)
            self._release(values, stage.index)
        yield from self._sample(tokens, positions, values)

    def _sample(self, tokens: jax.Array, positions: jax.Array, values: dict[Any, jax.Array]) -> Iterator[None]:
        """Logits and tokens, for the rows that sample: a microbatch of prefill chunks alone skips the last stage."""
        engine = self.engine
        if not self.rows.samplers:
            return
        rows = [
            engine._sequences[seq_id].row_sampling() for seq_id in self.rows.samplers if seq_id in engine._sequences
        ]
        if len(rows) < len(self.rows.samplers):
            return
        inputs, variant = build_inputs(rows, vocab_size=engine.plan.vocab_size, num_slots=len(self.rows.sampled))
        reads = [values[value] for value in engine.plan.stages[-1].reads]
        with self._timed("dense_s") as wait:
            logits = engine._dense.logits(tokens, positions, reads, engine._dense.place(self.rows.sampled))
            wait(logits)
        with self._timed("sample_s"):
            self.sampled = sample(logits, engine._dense.place(inputs), variant)
        yield
        with self._timed("sample_s"):
            self.sampled = jax.tree.map(np.asarray, self.sampled)
            self.tokens = self.sampled.tokens

    def _release(self, values: dict[Any, jax.Array], done: int) -> None:
        """Drop what no later stage reads: the carry is the only state that tier 1 keeps per row."""
        later = self.engine._reads_from[done + 1]
        for value in [value for value in values if value not in later]:
            del values[value]

    @contextmanager
    def _timed(self, name: str) -> Iterator[Any]:
        if not self.engine.config.profile:
            yield lambda *arrays: None
            return
        with self.engine._clock(name):
            yield lambda *arrays: jax.block_until_ready(arrays)


def _partition_module(module: nnx.Module, max_rows: int) -> tuple[Plan, Any]:
    """The plan of a Flax module called as module(tokens [B, T], positions [B, T]), and its weights."""
    graph, params = nnx.split(module)

    def forward(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens, positions)

    return partition(forward, params, max_rows=max_rows), params


def _num_pages(plan: Plan, config: EngineConfig, dtype: Any) -> int:
    page_bytes = plan.kv_bytes_per_token(dtype.itemsize) * config.page_size
    if config.kv_cache_bytes < page_bytes:
        raise ConfigError(
            f"kv_cache_bytes={config.kv_cache_bytes} holds no page: one page of {config.page_size} tokens takes "
            f"{page_bytes} bytes over {len(plan.sites)} sites"
        )
    return config.kv_cache_bytes // page_bytes


def _check_tier1_memory(config: EngineConfig, dense: DenseTier, attention: AttentionTier) -> None:
    if config.tier1_memory_gb is None:
        return
    pools = attention.pool_bytes if attention.device == dense.device else 0
    needed_gb = (dense.weight_bytes + pools) / 1e9
    if needed_gb > config.tier1_memory_gb:
        raise ConfigError(
            f"tier1_memory_gb={config.tier1_memory_gb}: the weights take {dense.weight_bytes / 1e9:.3f} GB and the KV "
            f"pools on tier 1 {pools / 1e9:.3f} GB"
        )


def _as_requests(prompts: Prompt | Iterable[Prompt]) -> list[Request]:
    if isinstance(prompts, (str, Request)):
        prompts = [prompts]
    return [_as_request(index, prompt) for index, prompt in enumerate(prompts)]


def _as_request(index: int, prompt: Prompt) -> Request:
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, str):
        return Request(id=str(index), prompt=prompt)
    if isinstance(prompt, (Sequence, np.ndarray)):
        return Request(id=str(index), prompt_token_ids=tuple(int(token) for token in prompt))
    raise RequestError(f"prompt {index} is a {type(prompt).__name__}; allowed: str, token ids, Request")
