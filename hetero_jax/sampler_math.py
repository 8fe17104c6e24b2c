"""The arithmetic of sampling, for all rows at once, without a sort over the vocabulary.

Two rules make the bits of a row independent of the other rows, of the number of rows and of what is enabled for
others. Whatever is summed over the vocabulary is summed as integers (probabilities are integers out of about 2**30), so
no order of summation can show; and no product meets a sum in one expression, so no compiler can contract the two.

Shapes: S rows, V tokens of the vocabulary, x: [S, V] float32 logits without NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# The vocabulary in blocks: what a row needs of its 50k..250k tokens is found by looking at blocks, then into one block.
_BLOCK = 256
_TOTAL_BITS = 30  # the integer probabilities of a row sum up to about 2**30


def argmax(x: jax.Array) -> jax.Array:
    """Index [S] int32 of the largest value, the first among equals. (jnp.argmax is 30 times slower on XLA CPU.)"""
    blocks = _blocks(x, -jnp.inf)
    best = jnp.argmax(blocks.max(-1), -1)
    return (best * _BLOCK + jnp.argmax(_pick_block(blocks, best), -1)).astype(jnp.int32)


def top_values(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Values and ids [S, count] of the largest, in order, the first among equals first.

    They lie in the `count` blocks with the largest maxima; which are kept in order, so that equals stay in order.
    """
    blocks = _blocks(x, -jnp.inf)
    if count >= blocks.shape[1]:
        return lax.top_k(x, count)
    chosen = jnp.sort(lax.top_k(blocks.max(-1), count)[1], -1)
    near = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(x.shape[0], -1)
    values, places = lax.top_k(near, count)
    ids = jnp.take_along_axis(chosen, places // _BLOCK, axis=1) * _BLOCK + places % _BLOCK
    return values, ids


def log_normalizer(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(peak, rest), [S, 1] each, so that x - peak - rest is the log of the softmax (-inf for -inf)."""
    peak = _peak(x)
    total = jnp.zeros_like(peak)
    left = jnp.exp(x - peak)  # 0..1, summed 12 bits at a time: V * 2**12 fits an int32
    for digit in (1, 2, 3):
        left = left * 2.0**12
        digits = jnp.floor(left)
        total += digits.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32) * 2.0 ** (-12 * digit)
        left -= digits
    return peak, jnp.log(jnp.maximum(total, 1.0))  # under 1 only where all are -inf


def weights(x: jax.Array, inverse_temperature: jax.Array) -> jax.Array:
    """exp of the logits over the temperature [S, V], relative to the largest (which has 1); 0 for -inf."""
    return jnp.exp((x - _peak(x)) * inverse_temperature[:, None])


def top_k_threshold(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest value of each row [S], or a smaller one that lets the same k tokens pass; k: [S] in 1..V.

    Bisection over the bits of the floats, which order as the floats do. Equals of the k-th largest all pass.
    """
    keys = _ordered_bits(x)

    def count(threshold: jax.Array) -> jax.Array:
        return (keys >= threshold[:, None]).astype(jnp.int32).sum(-1)

    low = jnp.full(k.shape, _ordered_bits(jnp.float32(-jnp.inf)))
    full = jnp.full_like(k, x.shape[1])
    threshold, _ = _bisect(count, k, low, keys.max(-1) + 1, full, lambda low, passed, failed: passed == k)
    return _from_ordered_bits(threshold)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30.

    Only a power of two, so that the last bits of the float sum, which depend on the order of summation, do not show.
    """
    total = jnp.maximum(w.sum(-1, keepdims=True), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def integer_probabilities(w: jax.Array, scale: jax.Array) -> jax.Array:
    """Scaled weights as int32 [S, V]. Tokens of probability under about 2**-30 become 0."""
    return jnp.rint(w * scale).astype(jnp.int32)


def top_p_threshold(w: jax.Array, scale: jax.Array, p: jax.Array) -> jax.Array:
    """The largest weight [S] so that tokens of at least that weight have p of the total or more; p: [S], 1 for all.

    Or a smaller one that lets the same tokens pass. Equals of the threshold all pass.
    """

    def mass(threshold: jax.Array) -> jax.Array:
        least = lax.bitcast_convert_type(threshold, jnp.float32)[:, None]  # bits of positive floats order as they do
        return jnp.where(w >= least, integer_probabilities(w, scale), 0).sum(-1)

    def same_tokens(low: jax.Array, passed: jax.Array, failed: jax.Array) -> jax.Array:
        least = integer_probabilities(lax.bitcast_convert_type(low, jnp.float32), scale[:, 0])
        return (passed == target) | (passed - failed < 2 * least)  # the latter: only one token lies in between

    low = lax.bitcast_convert_type(0.5 / scale[:, 0], jnp.int32)  # below it all are 0
    total = mass(low)
    share = jnp.ceil(p * total.astype(jnp.float32)).astype(jnp.int32)
    target = jnp.where(p < 1.0, jnp.clip(share, 1, total), total)
    high = lax.bitcast_convert_type(jnp.full_like(p, 1.0), jnp.int32) + 1  # the largest weight is 1
    threshold, _ = _bisect(mass, target, low, high, total, same_tokens)
    return lax.bitcast_convert_type(threshold, jnp.float32)


def draw(q: jax.Array, random_bits: jax.Array) -> jax.Array:
    """Inverse CDF: the token [S] int32 in whose share of the total the random number [S] uint32 falls.

    q: [S, V] int32. A token of probability 0 is never drawn (unless all are 0).
    """
    blocks = _blocks(q, 0)
    block_sums = blocks.sum(-1)
    ends = jnp.cumsum(block_sums, -1)
    rank = _high_product(random_bits, ends[:, -1])
    block = _first_above(ends, rank)
    before = jnp.take_along_axis(ends - block_sums, block[:, None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(_pick_block(blocks, block), -1), rank - before)
    return jnp.minimum(block * _BLOCK + place, q.shape[1] - 1)  # past the end only where nothing is positive


def repeat_penalty(x: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty [S] and multiplies the others; seen: [S, V] bool."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x)


def count_penalty(x: jax.Array, counts: jax.Array, presence: jax.Array, frequency: jax.Array) -> jax.Array:
    """Subtracts frequency [S] for each occurrence and presence [S] once; counts: [S, V] int32 in the output."""
    by_count = jnp.where(counts > 0, frequency[:, None] * counts.astype(jnp.float32), 0.0)
    return x - by_count - jnp.where(counts > 0, presence[:, None], 0.0)


def count_ids(ids: jax.Array, vocab_size: int) -> jax.Array:
    """How often each token occurs [S, V] int32 in ids [S, L]; ids outside the vocabulary are padding."""
    zeros = jnp.zeros((ids.shape[0], vocab_size), jnp.int32)
    return zeros.at[_row_index(ids), ids].add(1, mode="drop")


def add_at(x: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """Adds values [S, L] at ids [S, L]; ids outside the vocabulary are padding."""
    return x.at[_row_index(ids), ids].add(values, mode="drop")


def forbid(x: jax.Array, ids: jax.Array) -> jax.Array:
    """-inf at ids [S, L]; ids outside the vocabulary are padding."""
    return x.at[_row_index(ids), ids].set(-jnp.inf, mode="drop")


def _bisect(
    measure: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    low: jax.Array,
    high: jax.Array,
    at_low: jax.Array,
    settled: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The largest integer [S] whose measure reaches the target, and its measure; measure falls as its argument grows.

    measure(low) = at_low >= target > measure(high) = 0. Stops where all rows have low + 1 = high, or are settled:
    settled(low, measure(low), measure(high)) says that any value in between makes no difference.
    """

    def is_open(low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array) -> jax.Array:
        return (_middle(low, high) != low) & ~settled(low, at_low, at_high)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, at_low, at_high = state
        middle = _middle(low, high)
        at_middle = measure(middle)
        going = is_open(*state)
        up, down = going & (at_middle >= target), going & (at_middle < target)
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, at_middle, at_low),
            jnp.where(down, at_middle, at_high),
        )

    state = (low, high, at_low, jnp.zeros_like(at_low))
    low, _, at_low, _ = lax.while_loop(lambda state: is_open(*state).any(), step, state)
    return low, at_low


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    return (low & high) + ((low ^ high) >> 1)  # floor of the mean, without the overflow of low + high


def _peak(x: jax.Array) -> jax.Array:
    """The largest logit [S, 1]; 0 where all are -inf, so that -inf - peak is no NaN."""
    peak = x.max(-1, keepdims=True)
    return jnp.where(peak == -jnp.inf, 0.0, peak)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 that order as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered_bits(keys: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32)


def _high_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """floor(a * b / 2**32) as int32, for uint32 a and int32 b in 0..2**31-1, from 16-bit halves."""
    b = b.astype(jnp.uint32)
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    carry = ((a0 * b0) >> 16) + ((a0 * b1) & 0xFFFF) + ((a1 * b0) & 0xFFFF)
    return (a1 * b1 + ((a0 * b1) >> 16) + ((a1 * b0) >> 16) + (carry >> 16)).astype(jnp.int32)


def _first_above(rising: jax.Array, rank: jax.Array) -> jax.Array:
    """The first index [S] where rising [S, N] exceeds rank [S], and N - 1 where it never does."""
    return jnp.minimum((rising <= rank[:, None]).astype(jnp.int32).sum(-1), rising.shape[1] - 1)


def _blocks(x: jax.Array, filler: float) -> jax.Array:
    """[S, V] as [S, ceil(V / block), block]."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK)), constant_values=filler)
    return padded.reshape(x.shape[0], -1, _BLOCK)


def _pick_block(blocks: jax.Array, index: jax.Array) -> jax.Array:
    """Block index[s] of each row s: [S, block]."""
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def _row_index(ids: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, ids.shape, 0)
