"""Mixtures of experts for `SmallModel(mix=...)`: x [B, T, hidden] -> [B, T, hidden]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

EXPERTS, CHOSEN, HIDDEN = 4, 2, 24


def _weights():
    random = np.random.default_rng(11)
    shapes = {"router": (HIDDEN, EXPERTS), "up": (EXPERTS, HIDDEN, 10), "down": (EXPERTS, 10, HIDDEN)}
    return {name: jnp.asarray(random.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}


def _route(x, chosen=CHOSEN):
    weights, index = jax.lax.top_k(jax.nn.softmax(x @ _weights()["router"]), chosen)
    return weights / weights.sum(-1, keepdims=True), index


def _experts(rows, sizes):
    w = _weights()
    return jax.lax.ragged_dot(jax.nn.silu(jax.lax.ragged_dot(rows, w["up"], sizes)), w["down"], sizes)


def dense(x):
    """Every expert for every token."""
    weights, index = _route(x)
    w = _weights()
    each = jnp.einsum("bteh,ehd->bted", jax.nn.silu(jnp.einsum("btd,edh->bteh", x, w["up"])), w["down"])
    gates = (jax.nn.one_hot(index, EXPERTS) * weights[..., None]).sum(-2)
    return x + jnp.einsum("bte,bted->btd", gates, each)


def sorted_and_unsorted(x):
    """argsort by expert, gather, two ragged products, and the inverse order."""
    rows = x.reshape(-1, HIDDEN)
    weights, index = _route(rows)
    flat = index.reshape(-1)
    order = jnp.argsort(flat)
    out = _experts(rows[order // CHOSEN], jnp.bincount(flat, length=EXPERTS))
    out = out[jnp.argsort(order)].reshape(-1, CHOSEN, HIDDEN)
    return x + (out * weights[..., None]).sum(1).reshape(x.shape)


def sorted_and_added(x):
    """Tokens repeated before the sort, group sizes from a one-hot, results added to their tokens."""
    rows = x.reshape(-1, HIDDEN)
    weights, index = _route(rows)
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jax.nn.one_hot(flat, EXPERTS, dtype=jnp.int32).sum(0)
    out = _experts(jnp.repeat(rows, CHOSEN, axis=0)[order], sizes) * weights.reshape(-1)[order][:, None]
    return x + jnp.zeros_like(rows).at[order // CHOSEN].add(out).reshape(x.shape)


def sorted_unstably(x):
    """Entries of one expert in any order."""
    rows = x.reshape(-1, HIDDEN)
    weights, index = _route(rows)
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=False)
    out = _experts(rows[order // CHOSEN], jnp.bincount(flat, length=EXPERTS))
    out = out[jnp.argsort(order, stable=False)].reshape(-1, CHOSEN, HIDDEN)
    return x + (out * weights[..., None]).sum(1).reshape(x.shape)


def one_after_the_other(x):
    """A loop over the experts, each for every token, weighed by 0 where it was not chosen."""
    weights, index = _route(x)
    w = _weights()
    for expert in range(EXPERTS):
        gate = (weights * (index == expert)).sum(-1, keepdims=True)
        x = x + gate * (jax.nn.silu(x @ w["up"][expert]) @ w["down"][expert])
    return x


def choice_major(x):
    """All first choices before all second ones, [k, T] flattened: not followed yet."""
    rows = x.reshape(-1, HIDDEN)
    weights, index = _route(rows)
    flat = index.T.reshape(-1)
    order = jnp.argsort(flat)
    out = _experts(rows[order % len(rows)], jnp.bincount(flat, length=EXPERTS))
    out = out[jnp.argsort(order)].reshape(CHOSEN, -1, HIDDEN)
    return x + (out * weights.T[..., None]).sum(0).reshape(x.shape)


def top_one(x):
    """One expert per token, chosen by argmax, taken with jnp.take."""
    rows = x[0]
    chosen = jnp.argmax(rows @ _weights()["router"], axis=-1)
    order = jnp.argsort(chosen)
    out = _experts(jnp.take(rows, order, axis=0), jnp.bincount(chosen, length=EXPERTS))
    return x + jnp.take(out, jnp.argsort(order), axis=0)[None]


def limited_capacity(x, capacity=4):
    """GShard: only the first tokens that chose an expert get it."""
    rows = x[0]
    _, index = _route(rows, 1)
    chosen = jax.nn.one_hot(index[:, 0], EXPERTS)
    kept = chosen * (jnp.cumsum(chosen, axis=0) <= capacity)
    return x + jnp.einsum("te,td->td", kept, rows)[None]


def balanced(x):
    """Rows scaled by how many tokens chose each expert."""
    rows = x[0]
    _, index = _route(rows)
    load = jnp.bincount(index.reshape(-1), length=EXPERTS)
    return x * load[index[:, 0]][None, :, None]


def _sorted_wrongly(x, *, undo=True, counted_of=1.0, shift=0):
    rows = x.reshape(-1, HIDDEN)
    _, index = _route(rows)
    flat = index.reshape(-1)
    order = jnp.argsort(flat)
    counted = flat if counted_of == 1.0 else _route(rows * counted_of)[1].reshape(-1)
    sizes = jnp.bincount(counted, length=EXPERTS)
    out = _experts(rows[(order + shift) // CHOSEN], sizes)
    out = out[jnp.argsort(order)] if undo else out
    return x + out.reshape(-1, CHOSEN, HIDDEN).sum(1).reshape(x.shape)


def never_unsorted(x):
    return _sorted_wrongly(x, undo=False)


def other_counts(x):
    """Group sizes of another choice than the one that rows are sorted by."""
    return _sorted_wrongly(x, counted_of=-1.0)


def neighbours_rows(x):
    """Each entry gets the row of the entry after it."""
    return _sorted_wrongly(x, shift=1)
