"""Requests and completions: what goes in and what comes out, as vLLM names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hetero_jax.errors import RequestError
from hetero_jax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt: a text, chat messages ({"role", "content"}) or token ids - exactly one of them.

    Raises:
      RequestError: none or several kinds of prompt.
    """

    id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    sampling_params: SamplingParams | None = None

    def __post_init__(self) -> None:
        kinds = ("prompt", "messages", "prompt_token_ids")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(f"request has {' and '.join(given) or 'no prompt'}; allowed: one of {', '.join(kinds)}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated sequence.

    stop_reason: the stop string or token id that ended it; None for end-of-sequence and length.
    logprobs: per token, {token id: log probability} of the most likely tokens and of the drawn one.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[Mapping[int, float], ...] | None = None

    def to_row(self) -> dict[str, Any]:
        """The sample as JSON can hold it."""
        row: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
        }
        if self.stop_reason is not None:
            row["stop_reason"] = self.stop_reason
        if self.logprobs is not None:
            row["logprobs"] = [{str(token): value for token, value in step.items()} for step in self.logprobs]
        return row


@dataclass(frozen=True, kw_only=True, repr=False)
class Completion:
    """What became of a request: its samples, or `error`. text, token_ids ... are those of the first sample."""

    id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Sample, ...]
    error: str | None = None

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[Mapping[int, float], ...] | None:
        """Log probabilities of the first sample, if asked for."""
        return self.outputs[0].logprobs

    @property
    def usage(self) -> dict[str, int]:
        """Token counts, as OpenAI's API names them."""
        generated = sum(len(sample.token_ids) for sample in self.outputs)
        prompt = len(self.prompt_token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def to_row(self) -> dict[str, Any]:
        """The row of the output file; with several samples, all of them under "outputs"."""
        row = {"id": self.id, **self.outputs[0].to_row(), "usage": self.usage}
        if len(self.outputs) > 1:
            row["outputs"] = [{"index": sample.index, **sample.to_row()} for sample in self.outputs]
        if self.error is not None:
            row["error"] = self.error
        return row

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Completion({self.id!r}, error: {self.error})"
        more = f", {len(self.outputs)} samples" if len(self.outputs) > 1 else ""
        return f"Completion({self.id!r}, {self.text!r}, {len(self.token_ids)} tokens, {self.finish_reason}{more})"
