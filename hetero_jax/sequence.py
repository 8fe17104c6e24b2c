"""State of requests while they run: known tokens, text so far, and when all samples of a request are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hetero_jax.outputs import Completion, Request, Sample
from hetero_jax.sampler import RowSampling, SamplerOutputs
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.text import TextStream


@dataclass(kw_only=True)
class SequenceState:
    """One sample of one request: prompt and generated tokens, and the text so far."""

    seq_id: int
    group: RequestGroup
    index: int
    seed: int
    text: TextStream
    tokens: list[int]
    logprobs: list[dict[int, float]] = field(default_factory=list)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens."""
        return self.tokens[len(self.group.prompt_token_ids) :]

    def known(self, start: int, length: int) -> Sequence[int]:
        """Tokens at positions start .. start + length - 1."""
        return self.tokens[start : start + length]

    def row_sampling(self) -> RowSampling:
        """What the sampler needs to draw the next token."""
        return RowSampling(
            params=self.group.params,
            prompt_token_ids=self.group.prompt_token_ids,
            output_token_ids=self.output_token_ids,
            request_id=self.group.request.id,
            sample_index=self.index,
            seed=self.seed,
            stop_token_ids=self.group.stop_token_ids,
        )

    def push(self, row: int, sampled: SamplerOutputs) -> bool:
        """Add the token that was sampled in `row`; True if the sequence is finished."""
        token = int(sampled.tokens[row])
        self.tokens.append(token)
        if self.group.params.logprobs is not None:
            self.logprobs.append(_token_logprobs(row, token, sampled, self.group.params.logprobs))
        return self.text.push(token)

    def sample(self) -> Sample:
        """The finished sample."""
        return Sample(
            index=self.index,
            text=self.text.text,
            token_ids=tuple(self.output_token_ids),
            finish_reason=self.text.finish_reason or "length",
            stop_reason=self.text.stop_reason,
            logprobs=tuple(self.logprobs) if self.group.params.logprobs is not None else None,
        )


@dataclass(kw_only=True)
class RequestGroup:
    """A request and its samples (SamplingParams.n of them)."""

    request: Request
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    finished: dict[int, Sample] = field(default_factory=dict)

    def finish(self, sequence: SequenceState) -> Completion | None:
        """Record a finished sample; the request's Completion once all are in."""
        self.finished[sequence.index] = sequence.sample()
        if len(self.finished) < self.params.n:
            return None
        outputs = tuple(self.finished[index] for index in range(self.params.n))
        return Completion(id=self.request.id, prompt_token_ids=self.prompt_token_ids, outputs=outputs, error=None)


def failed(request: Request, error: Exception, prompt_token_ids: tuple[int, ...] = ()) -> Completion:
    """The Completion of a request that cannot run."""
    outputs = (Sample(index=0, text="", token_ids=(), finish_reason="error", stop_reason=None, logprobs=None),)
    return Completion(id=request.id, prompt_token_ids=prompt_token_ids, outputs=outputs, error=str(error))


def _token_logprobs(row: int, token: int, sampled: SamplerOutputs, wanted: int) -> dict[int, float]:
    """vLLM's log probabilities of one token: the `wanted` most likely tokens and always the sampled one."""
    assert sampled.logprobs is not None
    found = {token: float(sampled.logprobs[row])}
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        for rank in range(min(wanted, sampled.top_ids.shape[1])):  # a small vocabulary has no more
            found.setdefault(int(sampled.top_ids[row, rank]), float(sampled.top_logprobs[row, rank]))
    return found
