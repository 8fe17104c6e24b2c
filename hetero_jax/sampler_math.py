"""The arithmetic of sampling, for all rows at once, without a sort over the vocabulary.

Two rules make the bits of a row independent of the other rows, of the number of rows and of what is enabled for
others. What is summed over the vocabulary is summed as integers (probabilities are integers out of about 2**30), or
in a fixed tree, so no order of summation can show; and no inexact product meets a sum in one expression, so no compiler
can contract the two.

Shapes: S rows, V tokens of the vocabulary, x: [S, V] float32 logits without NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# The vocabulary in blocks: what a row needs of its 50k..250k tokens is found by looking at blocks, then into one block.
_BLOCK = 128
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
    total = _pairwise_sum(jnp.exp(x - peak))
    return peak, jnp.log(jnp.maximum(total, 1.0))  # under 1 only where all are -inf


def weights(x: jax.Array, inverse_temperature: jax.Array) -> jax.Array:
    """exp of the logits over the temperature [S, V], relative to the largest (which has 1); 0 for -inf."""
    return jnp.exp((x - _peak(x)) * inverse_temperature[:, None])


def top_k_threshold(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest value of each row [S]; -inf where k, [S] in 1..V, is V. Equals of the k-th largest all pass."""
    target = jnp.where(k < x.shape[1], k, 0)
    low = jnp.full(k.shape, _ordered_bits(jnp.float32(-jnp.inf)))
    # The usual k are found without bisection.
    return _threshold(x, lambda values: jnp.ones(values.shape, jnp.int32), target, low, lowest=-jnp.inf, num_listed=64)


def scale_of(w: jax.Array) -> jax.Array:
    """The power of two [S, 1] that brings the sum of weights [S, V] to 2**29..2**30."""
    total = jnp.maximum(_pairwise_sum(w), 1.0)
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(total, jnp.int32), 23)  # 127 + floor(log2(total))
    return lax.bitcast_convert_type((2 * 127 + _TOTAL_BITS - 1 - exponent) << 23, jnp.float32)


def integer_probabilities(w: jax.Array, scale: jax.Array) -> jax.Array:
    """Scaled weights as int32 [S, V]. Tokens of probability under about 2**-30 become 0."""
    return jnp.rint(w * scale).astype(jnp.int32)


def top_p_threshold(w: jax.Array, scale: jax.Array, p: jax.Array) -> jax.Array:
    """The largest weight [S] so that tokens of at least that weight have p of the total; -inf where p, [S], is 1."""
    total = _integer_sum(integer_probabilities(w, scale))
    share = jnp.ceil(p * total.astype(jnp.float32)).astype(jnp.int32)
    target = jnp.where(p < 1.0, jnp.clip(share, 1, total), 0)
    # All tokens of less than `spare` together are not missed. (Halved, so that rounding it to a float does no harm.)
    spare = (total - target) // (2 * w.shape[1])
    low = _ordered_bits(spare.astype(jnp.float32) / scale[:, 0])
    return _threshold(w, lambda weights: integer_probabilities(weights, scale), target, low, lowest=0.0, num_listed=32)


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


def _threshold(
    x: jax.Array,
    amount: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    low: jax.Array,
    *,
    lowest: float,
    num_listed: int,
) -> jax.Array:
    """The largest threshold [S] such that the amounts of x >= threshold reach the target; -inf for target 0.

    Exact. Bisection over the bits of the floats, which order as the floats do, until what is missing lies for certain
    within the next few values, which are then listed. (A bisection to the end takes about twice as long.)

    Args:
      x: [S, V] float32.
      amount: of values [S, N], int32 [S, N]; not negative, does not fall as values grow, and sums fit.
      target: [S] int32.
      low: [S] ordered bits of a threshold that reaches the target.
      lowest: no value is less, and what has it may be left out.
      num_listed: a pass of the bisection costs as much as listing about 10 values.
    """
    num_listed = min(num_listed, x.shape[1])

    def is_open(low: jax.Array, high: jax.Array, above: jax.Array) -> jax.Array:
        missing_each = -((above - target) // num_listed)  # if each value listed has that, they reach the target
        return (_middle(low, high) != low) & (amount(_from_ordered_bits(low)[:, None])[:, 0] < missing_each)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, above = state
        middle = _middle(low, high)
        reached = _integer_sum(jnp.where(x >= _from_ordered_bits(middle)[:, None], amount(x), 0))
        up = is_open(*state) & (reached >= target)
        down = is_open(*state) & (reached < target)
        return jnp.where(up, middle, low), jnp.where(down, middle, high), jnp.where(down, reached, above)

    start = (low, _ordered_bits(x.max(-1)) + 1, jnp.zeros_like(target))
    low, high, above = lax.while_loop(lambda state: is_open(*state).any(), step, start)
    listed, _ = top_values(jnp.where(x < _from_ordered_bits(high)[:, None], x, lowest), num_listed)
    reached = above[:, None] + jnp.cumsum(amount(listed), -1)
    # Where the list falls short, it is full of equals between low and high = low + 1.
    ends = jnp.concatenate([listed, _from_ordered_bits(low)[:, None]], -1)
    index = (reached < target[:, None]).astype(jnp.int32).sum(-1, keepdims=True)
    return jnp.where(target > 0, jnp.take_along_axis(ends, index, axis=1)[:, 0], -jnp.inf)


def _pairwise_sum(x: jax.Array) -> jax.Array:
    """Sum [S, 1] of floats [S, V] as a fixed tree of additions: the same bits whatever the number of rows."""
    while x.shape[1] > 1:
        half = -(-x.shape[1] // 2)
        x = jnp.pad(x, ((0, 0), (0, 2 * half - x.shape[1])))
        x = x[:, :half] + x[:, half:]
    return x


def _integer_sum(x: jax.Array) -> jax.Array:
    """Sum [S] of int32 [S, V]. Folded eightfold before the reduction, it is twice as fast on XLA CPU."""
    part = -(-x.shape[1] // 8)
    x = jnp.pad(x, ((0, 0), (0, 8 * part - x.shape[1])))
    a, b, c, d, e, f, g, h = (x[:, i * part : (i + 1) * part] for i in range(8))
    return (((a + b) + (c + d)) + ((e + f) + (g + h))).sum(-1)


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
