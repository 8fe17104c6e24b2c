"""Attention over chunks of keys, for `SmallModel(attention=...)`: q [B, T, heads, dim], k and v [B, T, kv_heads, dim].

All but those of the second half are softmax attention, as flash attention is written in plain JAX.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 16


def _heads(q, k, v):
    group = q.shape[2] // k.shape[2]
    return q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)


def _padded(x, chunk=CHUNK):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))


def _in_chunks(x, chunk=CHUNK):
    """[chunks, B, chunk, heads, dim]."""
    x = _padded(x, chunk)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _begin(q, lowest=-jnp.inf):
    shape = (q.shape[0], q.shape[2], q.shape[1])
    return jnp.full(shape, lowest, q.dtype), jnp.zeros(shape, q.dtype), jnp.zeros((*shape, q.shape[3]), q.dtype)


def _update(carry, q, k, v, visible, lowest=-jnp.inf, rescale=True):
    """One step of the online softmax (Milakov & Gimelshein 2018)."""
    top, total, acc = carry
    scores = jnp.where(visible, jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5, lowest)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])
    factor = jnp.exp(top - new_top) if rescale else jnp.ones_like(top)
    acc = acc * factor[..., None] + jnp.einsum("bhts,bshd->bhtd", weights, v)
    return new_top, total * factor + weights.sum(-1), acc


def _end(carry):
    return jnp.swapaxes(carry[2] / carry[1][..., None], 1, 2)


def by_scan(q, k, v, positions, *, lowest=-jnp.inf, window=None, chunk=CHUNK, ahead=0, checkpoint=False, **options):
    """lax.scan over padded chunks; padding is masked by the number of tokens."""
    q, k, v = _heads(q, k, v)
    keys, values, index = _in_chunks(k, chunk), _in_chunks(v, chunk), jnp.arange(q.shape[1])[:, None]

    def step(carry, entry):
        k, v, number = entry
        key = number * chunk + jnp.arange(chunk)
        visible = (index + ahead >= key) & (key < q.shape[1])
        visible = visible if window is None else visible & (index - key < window)
        return _update(carry, q, k, v, visible, lowest, **options), None

    step = jax.checkpoint(step) if checkpoint else step
    return _end(jax.lax.scan(step, _begin(q, lowest), (keys, values, jnp.arange(len(keys))))[0])


def by_scan_in_bf16(q, k, v, positions):
    q, k, v = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    return by_scan(q, k, v, positions).astype(jnp.float32)


def by_fori_loop(q, k, v, positions):
    """fori_loop that cuts each chunk out of the padded keys."""
    q, k, v = _heads(q, k, v)
    keys, values, index = _padded(k), _padded(v), jnp.arange(q.shape[1])[:, None]

    def step(number, carry):
        k, v = (jax.lax.dynamic_slice_in_dim(x, number * CHUNK, CHUNK, axis=1) for x in (keys, values))
        return _update(carry, q, k, v, index >= number * CHUNK + jnp.arange(CHUNK), -1e30)

    return _end(jax.lax.fori_loop(0, keys.shape[1] // CHUNK, step, _begin(q, -1e30)))


def by_query_and_key_chunks(q, k, v, positions, *, query_chunk=8):
    """lax.map over chunks of queries, in each a scan over chunks of keys."""
    q, k, v = _heads(q, k, v)
    keys, values, queries = _in_chunks(k), _in_chunks(v), _in_chunks(q, query_chunk)

    def one(entry):
        q, at = entry[0], entry[1] * query_chunk + jnp.arange(query_chunk)[:, None]

        def step(carry, entry):
            return _update(carry, q, entry[0], entry[1], at >= entry[2] * CHUNK + jnp.arange(CHUNK), -1e30), None

        return _end(jax.lax.scan(step, _begin(q, -1e30), (keys, values, jnp.arange(len(keys))))[0])

    out = jax.lax.map(one, (queries, jnp.arange(len(queries))))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]


def by_summaries(q, k, v, positions, *, query_chunk=8):
    """Rabe & Staats 2021: a scan over chunks of queries, and the summaries of all chunks of keys put together."""
    rows, (q, k, v) = q.shape[1], (x[0] for x in _heads(q, k, v))
    padded = lambda x, chunk: jnp.pad(x, ((0, -rows % chunk), (0, 0), (0, 0)))  # noqa: E731
    q, k, v = padded(q, query_chunk), padded(k, CHUNK), padded(v, CHUNK)

    def queries(start, _):
        mine = jax.lax.dynamic_slice_in_dim(q, start, query_chunk)
        at = start + jnp.arange(query_chunk)[:, None, None]

        def summary(first):
            keys, values = (jax.lax.dynamic_slice_in_dim(x, first, CHUNK) for x in (k, v))
            scores = jnp.einsum("qhd,khd->qhk", mine, keys) * q.shape[-1] ** -0.5
            scores = jnp.where(at >= first + jnp.arange(CHUNK), scores, -1e30)
            top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - top)
            return jnp.einsum("khd,qhk->qhd", values, weights), weights.sum(-1), top[..., 0]

        sums, totals, tops = jax.lax.map(summary, jnp.arange(0, len(k), CHUNK))
        factors = jnp.exp(tops - tops.max(0))
        return start + query_chunk, (sums * factors[..., None]).sum(0) / (totals * factors).sum(0)[..., None]

    _, out = jax.lax.scan(queries, 0, None, length=len(q) // query_chunk)
    return out.reshape(-1, *q.shape[1:])[None, :rows]


def heads_by_vmap(q, k, v, positions):
    """The loop for one head, by vmap over batch and heads."""
    rows = q.shape[1]

    def head(q, k, v):
        k, v = (jnp.pad(x, ((0, -rows % CHUNK), (0, 0))).reshape(-1, CHUNK, x.shape[-1]) for x in (k, v))

        def step(carry, entry):
            (top, total, acc), (k, v, first) = carry, entry
            scores = jnp.where(jnp.arange(rows)[:, None] >= first + jnp.arange(CHUNK), q @ k.T / 2, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, factor = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
            return (new_top, total * factor + weights.sum(-1), acc * factor[:, None] + weights @ v), None

        start = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros_like(q)
        _, total, acc = jax.lax.scan(step, start, (k, v, jnp.arange(0, k.shape[0] * CHUNK, CHUNK)))[0]
        return acc / total[:, None]

    return jax.vmap(jax.vmap(head, in_axes=1, out_axes=1))(*_heads(q, k, v))


def of_whole_chunks(q, k, v, positions):
    """As many tokens as whole chunks, and no others."""
    if q.shape[1] % CHUNK:
        raise ValueError(f"{q.shape[1]} tokens are no whole chunks of {CHUNK}")
    return by_scan(q, k, v, positions, checkpoint=True)


def sigmoid_by_scan(q, k, v, positions):
    """No softmax, but a sum over chunks all the same."""
    q, k, v = _heads(q, k, v)
    keys, values, index = _in_chunks(k), _in_chunks(v), jnp.arange(q.shape[1])[:, None]

    def step(total, entry):
        k, v, number = entry
        weights = jax.nn.sigmoid(jnp.einsum("bthd,bshd->bhts", q, k))
        weights = jnp.where(index >= number * CHUNK + jnp.arange(CHUNK), weights, 0)
        return total + jnp.einsum("bhts,bshd->bthd", weights, v), None

    return jax.lax.scan(step, jnp.zeros_like(q), (keys, values, jnp.arange(len(keys))))[0]


never_rescaled = functools.partial(by_scan, lowest=-1e30, rescale=False)


def sees_its_whole_chunk(q, k, v, positions):
    """Keys up to the end of a query's own chunk."""
    q, k, v = _heads(q, k, v)
    keys, values, number = _in_chunks(k), _in_chunks(v), jnp.arange(q.shape[1])[:, None] // CHUNK

    def step(carry, entry):
        return _update(carry, q, entry[0], entry[1], (number >= entry[2]) & jnp.ones(CHUNK, bool), -1e30), None

    return _end(jax.lax.scan(step, _begin(q, -1e30), (keys, values, jnp.arange(len(keys))))[0])


def in_its_chunk(q, k, v, positions):
    """Softmax attention in each chunk by itself."""
    inside = jax.vmap(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    out = inside(*(_in_chunks(x) for x in (q, k, v)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]


def fades_by_chunk(q, k, v, positions):
    """What older chunks gave counts for less."""
    q, k, v = _heads(q, k, v)
    keys, values, index = _in_chunks(k), _in_chunks(v), jnp.arange(q.shape[1])[:, None]

    def step(carry, entry):
        carry = carry[0], carry[1] * 0.9, carry[2] * 0.9
        return _update(carry, q, entry[0], entry[1], index >= entry[2] * CHUNK + jnp.arange(CHUNK), -1e30), None

    return _end(jax.lax.scan(step, _begin(q, -1e30), (keys, values, jnp.arange(len(keys))))[0])
