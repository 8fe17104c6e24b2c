"""SamplingParams: how to draw tokens, with vLLM's field names, meanings and defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetero_jax.errors import SamplingParamsError

_MAX_LOGPROBS = 128
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling of one request.

    n: samples to draw.
    temperature: 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the most likely tokens whose probabilities reach p.
    min_p: keep tokens at least this likely relative to the most likely one.
    seed: of this request; None (or -1) takes the engine's.
    stop: strings that end the text, which is cut before them.
    stop_token_ids: tokens that end the sequence, besides the model's end-of-sequence tokens.
    ignore_eos: go on after an end-of-sequence token.
    max_tokens: most tokens to generate; None: up to the model's length.
    min_tokens: the first so many tokens are no end-of-sequence or stop tokens, and complete no stop string.
    logprobs: return the log probabilities of this many most likely tokens, and of the drawn one.
    repetition_penalty: divides (multiplies, if negative) the logits of tokens in prompt or output.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once or per occurrence.
    logit_bias: added to the logits of these tokens.

    Raises:
      SamplingParamsError: a value out of range; the message names field, value and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Compared and shown, but not hashed: a dict has no hash.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple_of("stop", stop, str))
        object.__setattr__(self, "stop_token_ids", _tuple_of("stop_token_ids", self.stop_token_ids, int))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        self._check_integers()
        self._check_numbers()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(f"min_tokens={self.min_tokens}; allowed: at most max_tokens={self.max_tokens}")
        if self.temperature == 0 and self.n > 1:
            raise SamplingParamsError(
                f"n={self.n} with temperature=0; allowed: n=1, as greedy samples are all the same"
            )

    def _check_integers(self) -> None:
        _integer("n", self.n, 1, 1024)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, _MAX_LOGPROBS)
        for token in (*self.stop_token_ids, *self.logit_bias):
            _integer("token id", token, 0, 2**31 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise SamplingParamsError(f"ignore_eos={self.ignore_eos!r}; allowed: true or false")
        if "" in self.stop:
            raise SamplingParamsError("stop has an empty string; allowed: non-empty strings")

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        for name in _FLOATS:
            object.__setattr__(self, name, float(getattr(self, name)))  # 0 and 0.0 are one value, also as JSON text

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
        """SamplingParams from JSON values, laid over `defaults`.

        Raises:
          SamplingParamsError: unknown keys, by name, or values out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise SamplingParamsError(f"unknown sampling parameter {unknown[0]!r}; allowed: {', '.join(known)}")
        return dataclasses.replace(defaults or cls(), **values)

    def to_dict(self) -> dict[str, Any]:
        """Values that differ from the defaults, as JSON can hold them."""
        default = SamplingParams()
        changed = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != getattr(default, item.name)
        }
        if "logit_bias" in changed:
            changed["logit_bias"] = {str(token): bias for token, bias in sorted(self.logit_bias.items())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _tuple_of(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    values = () if values is None else values
    if not isinstance(values, (list, tuple)) or any(not isinstance(item, kind) for item in values):
        raise SamplingParamsError(f"{name}={values!r}; allowed: a list of {kind.__name__}")
    return tuple(values)


def _bias(values: Any) -> dict[int, float]:
    try:
        # JSON's keys are strings; by way of a string, 7.9 is not taken for 7.
        biases = {int(str(token)): bias for token, bias in dict(values or {}).items()}
    except (TypeError, ValueError) as error:
        raise SamplingParamsError(f"logit_bias={values!r}; allowed: a map from token id to number") from error
    for token, bias in biases.items():
        _number(f"logit_bias[{token}]", bias, -100, 100)
    return {token: float(bias) for token, bias in biases.items()}


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SamplingParamsError(f"{name}={value!r}; allowed: an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (above and value == low):
        raise SamplingParamsError(f"{name}={value!r}; allowed: {'more than' if above else 'from'} {low} to {high}")
