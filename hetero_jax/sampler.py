"""Sampling on tier 1: the next token of S rows at once, with vLLM's parameters and vLLM's order of operations.

    raw logits -> logprobs
    raw logits -> logit_bias -> min_tokens -> repetition, frequency, presence penalties
               -> argmax (temperature 0), or temperature -> min_p -> top_k -> top_p -> draw

`build_inputs` (host) turns rows into arrays of fixed shapes and a static variant; `sample` (device, jitted) has only
the parts that the variant names. A row gets the same token, bit for bit, whatever the other rows are and ask for: parts
that they need are exact no-ops on it. Where values are equal at the border of top_k or top_p, all of them are kept.

The random number of a token comes from (seed, request id, sample index, position) and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hetero_jax import sampler_math
from hetero_jax.sampling_params import SamplingParams

_GREEDY_BELOW = 1e-5  # as vLLM: a smaller temperature means 0,
_SMALLEST_TEMPERATURE = 0.01  # and others are at least this
_SMALLEST_IDS = 16  # smallest bucket of an id list
_GROUP_LOGITS = 1 << 20  # logits that a CPU core works on at a time: 4 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSampling:
    """What decides the next token of one row. Token ids are those known so far; the seed is already resolved."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    request_id: str
    sample_index: int
    seed: int
    stop_token_ids: Collection[int]  # suppressed while there are fewer than min_tokens output tokens


@dataclass(frozen=True, kw_only=True)
class SamplerVariant:
    """Which parts of the sampler are compiled in."""

    draws: bool = False  # some row has a temperature
    min_p: bool = False
    top_k: bool = False
    top_p: bool = False
    bias: bool = False
    min_tokens: bool = False
    repetition: bool = False
    counts: bool = False  # presence or frequency penalty
    num_logprobs: int | None = None  # None: no logprobs; 0: of the sampled token only


@partial(jax.tree_util.register_dataclass, data_fields=("per_row", "ids", "bias_values"), meta_fields=())
@dataclass(frozen=True, kw_only=True)
class SamplerInputs:
    """Arrays of one call; only what the variant needs is there.

    per_row: name -> [S]: inverse_temperature (0 for greedy rows), min_p, top_p, repetition_penalty, presence_penalty,
      frequency_penalty (float32), top_k, position (int32), and key [S, 2] (uint32). Padding rows are greedy.
    ids: name -> [S, L] int32: bias, forbidden, prompt, output. L is a power of two; padding is vocab_size.
    bias_values: [S, L] float32 for ids["bias"].
    """

    per_row: dict[str, Any]
    ids: dict[str, Any]
    bias_values: Any = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "logprobs", "top_ids", "top_logprobs"),
    meta_fields=(),
)
@dataclass(frozen=True, kw_only=True)
class SamplerOutputs:
    """tokens: [S] int32. logprobs: [S] float32 of them under the raw logits. top_ids, top_logprobs: [S, K], best first.

    None where the variant does not ask for them. K is variant.num_logprobs: at least what any row wanted.
    """

    tokens: Any
    logprobs: Any = None
    top_ids: Any = None
    top_logprobs: Any = None


_PLAIN_GREEDY = SamplerInputs(per_row={}, ids={}), SamplerVariant()


def build_inputs(
    rows: Sequence[RowSampling], *, vocab_size: int, num_slots: int
) -> tuple[SamplerInputs, SamplerVariant]:
    """NumPy arrays for `sample`, padded to num_slots rows, and the variant that these rows need.

    Rows that share a SamplingParams object share the look at it, and plain greedy rows need no arrays at all.
    """
    assert len(rows) <= num_slots, f"{len(rows)} rows; allowed: <= num_slots={num_slots}"
    variant = _variant(rows, vocab_size)
    if variant == _PLAIN_GREEDY[1]:
        return _PLAIN_GREEDY
    pad = _Padding(num_slots, vocab_size)
    per_row: dict[str, np.ndarray] = {}
    ids: dict[str, np.ndarray] = {}
    bias_values = None
    if variant.draws:
        per_row |= _draw_columns(rows, pad)
    if variant.bias:
        biases = [row.params.logit_bias or {} for row in rows]
        ids["bias"] = pad.ids([list(bias) for bias in biases])
        bias_values = pad.values([list(bias.values()) for bias in biases], ids["bias"].shape[1])
    if variant.min_tokens:
        ids["forbidden"] = pad.ids([list(row.stop_token_ids) if _is_too_short(row) else () for row in rows])
    if variant.repetition:
        per_row["repetition_penalty"] = pad.column([row.params.repetition_penalty for row in rows], 1.0)
        ids["prompt"] = pad.ids([_as_array(row.prompt_token_ids) if _repeats(row.params) else () for row in rows])
    if variant.counts:
        per_row["presence_penalty"] = pad.column([row.params.presence_penalty for row in rows], 0.0)
        per_row["frequency_penalty"] = pad.column([row.params.frequency_penalty for row in rows], 0.0)
    if variant.repetition or variant.counts:
        ids["output"] = pad.ids([row.output_token_ids if _penalizes(row.params) else () for row in rows])
    return SamplerInputs(per_row=per_row, ids=ids, bias_values=bias_values), variant


@partial(jax.jit, static_argnames=("variant",))
def sample(logits: jax.Array, inputs: SamplerInputs, variant: SamplerVariant) -> SamplerOutputs:
    """The next token of each row.

    Args:
      logits: [S, V] float32 without NaN; -inf is a token that cannot be.
      inputs, variant: of `build_inputs` with vocab_size=V and num_slots=S.
    Returns:
      SamplerOutputs. Rows beyond those given to `build_inputs` hold tokens that mean nothing.
    """
    if variant == _PLAIN_GREEDY[1]:
        return _sample_rows(logits, inputs, variant)
    on_cpu, elsewhere = partial(_sample_groups, variant=variant), partial(_sample_rows, variant=variant)
    return lax.platform_dependent(logits, inputs, cpu=on_cpu, default=elsewhere)


def _sample_groups(logits: jax.Array, inputs: SamplerInputs, variant: SamplerVariant) -> SamplerOutputs:
    """A few rows after the other, so that what they need stays in the cache: up to 3 times as fast on CPUs."""
    num_rows, vocab_size = logits.shape
    fitting = max(_GROUP_LOGITS // vocab_size, 1)
    group = math.gcd(num_rows, 1 << (fitting.bit_length() - 1))
    if group == num_rows:
        return _sample_rows(logits, inputs, variant)
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), (logits, inputs))
    outputs = lax.map(lambda args: _sample_rows(args[0], args[1], variant), grouped)
    return jax.tree.map(lambda leaf: leaf.reshape(num_rows, *leaf.shape[2:]), outputs)


def _sample_rows(logits: jax.Array, inputs: SamplerInputs, variant: SamplerVariant) -> SamplerOutputs:
    adjusted = _adjust(logits, inputs, variant)
    tokens = sampler_math.argmax(adjusted)
    if variant.draws:
        tokens = jnp.where(inputs.per_row["inverse_temperature"] > 0, _draw(adjusted, inputs, variant), tokens)
    if variant.num_logprobs is None:
        return SamplerOutputs(tokens=tokens)
    peak, rest = sampler_math.log_normalizer(logits)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    logprobs = (chosen - peak - rest)[:, 0]
    if variant.num_logprobs == 0:
        return SamplerOutputs(tokens=tokens, logprobs=logprobs)
    values, top_ids = sampler_math.top_values(logits, variant.num_logprobs)
    return SamplerOutputs(tokens=tokens, logprobs=logprobs, top_ids=top_ids, top_logprobs=values - peak - rest)


def _adjust(logits: jax.Array, inputs: SamplerInputs, variant: SamplerVariant) -> jax.Array:
    """What changes the logits before temperature, in vLLM's order."""
    vocab_size, per_row, ids = logits.shape[1], inputs.per_row, inputs.ids
    if variant.bias:
        logits = sampler_math.add_at(logits, ids["bias"], inputs.bias_values)
    if variant.min_tokens:
        logits = sampler_math.forbid(logits, ids["forbidden"])
    if not (variant.repetition or variant.counts):
        return logits
    counts = sampler_math.count_ids(ids["output"], vocab_size)
    if variant.repetition:
        seen = (counts > 0) | (sampler_math.count_ids(ids["prompt"], vocab_size) > 0)
        logits = sampler_math.repeat_penalty(logits, seen, per_row["repetition_penalty"])
    if variant.counts:
        presence, frequency = per_row["presence_penalty"], per_row["frequency_penalty"]
        logits = sampler_math.count_penalty(logits, counts, presence, frequency)
    return logits


def _draw(logits: jax.Array, inputs: SamplerInputs, variant: SamplerVariant) -> jax.Array:
    """Temperature, then the filters in vLLM's order, then one random number per row."""
    rows = inputs.per_row
    inverse_temperature = jnp.where(rows["inverse_temperature"] > 0, rows["inverse_temperature"], 1.0)
    weights = sampler_math.weights(logits, inverse_temperature)
    if variant.min_p:
        weights = jnp.where(weights >= rows["min_p"][:, None], weights, 0.0)
    if variant.top_k:
        threshold = sampler_math.top_k_threshold(logits, rows["top_k"])
        weights = jnp.where(logits >= threshold[:, None], weights, 0.0)
    scale = sampler_math.scale_of(weights)
    if variant.top_p:
        threshold = sampler_math.top_p_threshold(weights, scale, rows["top_p"])
        weights = jnp.where(weights >= threshold[:, None], weights, 0.0)
    probabilities = sampler_math.integer_probabilities(weights, scale)
    return sampler_math.draw(probabilities, jax.vmap(_random_bits)(rows["key"], rows["position"]))


def _random_bits(key: jax.Array, position: jax.Array) -> jax.Array:
    """32 random bits of a stream [2] uint32 at a position."""
    stream = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.bits(jax.random.fold_in(stream, position), dtype=jnp.uint32)


def _variant(rows: Sequence[RowSampling], vocab_size: int) -> SamplerVariant:
    kinds = list({id(row.params): row.params for row in rows}.values())
    drawn = [params for params in kinds if not _is_greedy(params)]
    wanted = [params.logprobs for params in kinds if params.logprobs is not None]
    return SamplerVariant(
        draws=bool(drawn),
        min_p=any(params.min_p > 0 for params in drawn),
        top_k=any(0 < params.top_k < vocab_size for params in drawn),
        top_p=any(params.top_p < 1 for params in drawn),
        bias=any(params.logit_bias for params in kinds),
        min_tokens=any(params.min_tokens for params in kinds) and any(_is_too_short(row) for row in rows),
        repetition=any(_repeats(params) for params in kinds),
        counts=any(_counts(params) for params in kinds),
        num_logprobs=_logprobs_bucket(wanted, vocab_size),
    )


def _logprobs_bucket(wanted: Sequence[int], vocab_size: int) -> int | None:
    """The least power of two that serves all rows, so that few variants are compiled; -1 wants the vocabulary."""
    if not wanted:
        return None
    if min(wanted) < 0:
        return vocab_size
    most = max(wanted)
    return min(_bucket(most), vocab_size) if most else 0


def _draw_columns(rows: Sequence[RowSampling], pad: _Padding) -> dict[str, np.ndarray]:
    """Per-row arrays of rows that draw; a greedy row gets the values that filter nothing."""

    def column(value: Callable[[SamplingParams], float], filler: float) -> np.ndarray:
        return pad.column([filler if _is_greedy(row.params) else value(row.params) for row in rows], filler)

    key = np.zeros((pad.num_slots, 2), np.uint32)
    key[: len(rows)] = [_stream(row.seed, row.request_id, row.sample_index) for row in rows]
    positions = [len(row.prompt_token_ids) + len(row.output_token_ids) for row in rows]
    whole = pad.vocab_size
    return {
        "inverse_temperature": column(lambda params: 1 / max(params.temperature, _SMALLEST_TEMPERATURE), 0.0),
        "min_p": column(lambda params: params.min_p, 0.0),
        "top_k": column(lambda p: p.top_k if 0 < p.top_k < whole else whole, whole).astype(np.int32),
        "top_p": column(lambda params: params.top_p, 1.0),
        "position": pad.column(positions, 0).astype(np.int32),
        "key": key,
    }


@lru_cache(maxsize=4096)
def _stream(seed: int, request_id: str, sample_index: int) -> tuple[int, int]:
    """The random stream of one sample of one request: two 32-bit words."""
    name = f"{seed}/{sample_index}/{request_id}".encode(errors="surrogatepass")
    word = int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
    return word & 0xFFFFFFFF, word >> 32


@lru_cache(maxsize=1024)
def _tuple_as_array(ids: tuple[int, ...]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _as_array(ids: Sequence[int]) -> np.ndarray:
    """A prompt is the same at each step, so it is converted once."""
    return _tuple_as_array(tuple(ids))


@dataclass(frozen=True)
class _Padding:
    """Makes arrays of num_slots rows."""

    num_slots: int
    vocab_size: int

    def column(self, values: Sequence[float], filler: float) -> np.ndarray:
        """[S] float32."""
        found = np.full(self.num_slots, filler, np.float32)
        found[: len(values)] = values
        return found

    def ids(self, lists: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """[S, L] int32, padded with vocab_size."""
        found = np.full((self.num_slots, _bucket(max(map(len, lists)), _SMALLEST_IDS)), self.vocab_size, np.int32)
        for row, values in enumerate(lists):
            found[row, : len(values)] = values
        return found

    def values(self, lists: Iterable[Sequence[float]], length: int) -> np.ndarray:
        """[S, length] float32, padded with 0."""
        found = np.zeros((self.num_slots, length), np.float32)
        for row, values in enumerate(lists):
            found[row, : len(values)] = values
        return found


def _bucket(count: int, smallest: int = 1) -> int:
    return max(smallest, 1 << max(count - 1, 0).bit_length())


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW


def _is_too_short(row: RowSampling) -> bool:
    return len(row.output_token_ids) < row.params.min_tokens


def _repeats(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1


def _counts(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def _penalizes(params: SamplingParams) -> bool:
    return _repeats(params) or _counts(params)
