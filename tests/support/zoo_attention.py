"""Attention of many kinds for `SmallModel(attention=...)`: q [B, T, heads, dim], k and v [B, T, kv_heads, dim]."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from small_model import SmallModel, softmax_attention


def _repeated(q, *others):
    return [jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in others]


def _scores(q, k):
    return jnp.einsum("bthd,bshd->bhts", q, _repeated(q, k)[0]) * q.shape[-1] ** -0.5


def _causal(rows):
    index = jnp.arange(rows)
    return index[:, None] >= index


def _distance(rows):
    index = jnp.arange(rows)
    return index[:, None] - index


def _weigh(weights, v):
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, weights.shape[1] // v.shape[2], axis=2))


def _masked_softmax(scores, v, visible=None):
    visible = _causal(scores.shape[-1]) if visible is None else visible
    return _weigh(jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), v)


def repeated(q, k, v, positions):
    """Grouped heads repeated before the products."""
    return _masked_softmax(_scores(q, k), v)


def tiled_in_front(q, k, v, positions):
    """Query head h reads kv head h % kv_heads."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.tile(x, (1, 1, group, 1)) for x in (k, v))
    return softmax_attention(q, k, v, positions)


def head_major(q, k, v, positions):
    """[B, heads, T, dim] and [B, heads, dim, T], features reversed."""
    k, v = _repeated(q, k, v)
    q, k, v = q[..., ::-1].transpose(0, 2, 1, 3), k[..., ::-1].transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.where(_causal(q.shape[2]), q @ k / 2, -jnp.inf)
    return (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3)


def upcast_and_repeated(q, k, v, positions):
    """Scores in f32, with repeated heads, of what is narrower outside."""
    q, k, v = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v))
    return repeated(q, k, v, positions)


def sigmoid(q, k, v, positions):
    return _weigh(jnp.where(_causal(q.shape[1]), jax.nn.sigmoid(_scores(q, k)), 0), v)


def alibi(q, k, v, positions):
    slopes = 2.0 ** -jnp.arange(1, q.shape[2] + 1)
    bias = -slopes[:, None, None] * _distance(q.shape[1])
    return _masked_softmax(_scores(q, k) + bias, v)


def relative_bias(q, k, v, positions, *, table):
    """T5: a learned bias by distance, in buckets."""
    bucket = jnp.clip(_distance(q.shape[1]), 0, table.shape[0] - 1)
    return _masked_softmax(_scores(q, k) + jnp.moveaxis(table[bucket], -1, 0), v)


def additive(q, k, v, positions, *, score):
    """Bahdanau: score . tanh(q + k)."""
    (k,) = _repeated(q, k)
    scores = jnp.tanh(q[:, :, None] + k[:, None]) @ score
    return _masked_softmax(jnp.moveaxis(scores, -1, 1), v)


def relative_values(q, k, v, positions, *, table):
    """Shaw: a learned vector by distance is added to each value."""
    weights = jax.nn.softmax(jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf))
    vectors = table[jnp.clip(_distance(q.shape[1]), 0, table.shape[0] - 1)]
    return _weigh(weights, v) + jnp.einsum("bhts,tsd->bthd", weights, vectors)


def sink_logits(q, k, v, positions, *, sinks):
    """gpt-oss: a learned logit per head takes part in the softmax and brings no value."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    top = jnp.maximum(scores.max(-1, keepdims=True), column)
    weights = jnp.exp(scores - top)
    return _weigh(weights / (weights.sum(-1, keepdims=True) + jnp.exp(column - top)), v)


def sink_logits_concatenated(q, k, v, positions, *, sinks):
    """The same as gpt-oss writes it: a column more, dropped after the softmax."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    return _weigh(jax.nn.softmax(jnp.concatenate([scores, column], -1))[..., :-1], v)


def sink_logits_split_off(q, k, v, positions, *, sinks):
    """The same, the weights of tokens and sink parted by a split."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights, _ = jnp.split(jax.nn.softmax(jnp.concatenate([scores, column], -1)), [q.shape[1]], axis=-1)
    return _weigh(weights, v)


def sink_keys(q, k, v, positions, *, sink_k, sink_v):
    """Learned keys and values in front of those of the tokens."""
    k, v = _repeated(q, k, v)
    k, v = (jnp.concatenate([s[None], x], axis=1) for s, x in ((sink_k, k), (sink_v, v)))
    visible = jnp.pad(_causal(q.shape[1]), ((0, 0), (sink_k.shape[0], 0)), constant_values=True)
    scores = jnp.where(visible, jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def sink_keys_counted(q, k, v, positions, *, sink_k, sink_v):
    """The same with grouped heads, behind a mask that counts the learned keys too."""
    count, (batch, rows, heads, dim), kv_heads = sink_k.shape[0], q.shape, k.shape[2]
    k, v = (jnp.concatenate([s[None], x], axis=1) for s, x in ((sink_k, k), (sink_v, v)))
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(batch, rows, kv_heads, -1, dim), k)
    visible = jnp.tril(jnp.ones((rows, rows + count), bool), count)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, rows, heads, dim)


def softmax_off_by_one(q, k, v, positions):
    """One more score of 0 that brings no value, written as padding in front."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    return _weigh(jax.nn.softmax(jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0))))[..., 1:], v)


def softmax_off_by_one_added(q, k, v, positions):
    """The same as 1 more in the sum of exponentials."""
    weights = jnp.exp(_scores(q, k)) * _causal(q.shape[1])
    return _weigh(weights / (1 + weights.sum(-1, keepdims=True)), v)


def unequal_sinks(q, k, v, positions):
    """Sinks of constant scores that differ by head, beside a soft cap and a window."""
    scores = 5 * jnp.tanh(_scores(q, k) / 5)
    distance = _distance(q.shape[1])
    scores = jnp.where((distance >= 0) & (distance < 6), scores, -1e30)
    column = jnp.broadcast_to(jnp.linspace(-2, 2, q.shape[2])[:, None, None], (*scores.shape[:3], 1))
    return _weigh(jax.nn.softmax(jnp.concatenate([column, scores], -1))[..., 1:], v)


def sinks_by_position(q, k, v, positions):
    """A sink whose score grows with the query's position: no constant."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    column = jnp.broadcast_to(jnp.arange(q.shape[1])[:, None] / 9.0, (*scores.shape[:3], 1))
    return _weigh(jax.nn.softmax(jnp.concatenate([column, scores], -1))[..., 1:], v)


def sink_that_drops_the_last_key(q, k, v, positions):
    """The sink's column stays, in the place of the first key, and the last key is cut off."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    column = jnp.zeros((*scores.shape[:3], 1))
    return _weigh(jax.nn.softmax(jnp.concatenate([column, scores], -1))[..., :-1], v)


def sink_from_a_token(q, k, v, positions):
    """The first token's key and value once more."""
    first = lambda x: x[0, :1].repeat(q.shape[2] // x.shape[2], axis=1)  # noqa: E731
    return sink_keys(q, k, v, positions, sink_k=first(k), sink_v=first(v))


def sinks_among_queries(q, k, v, positions):
    """An extra query in front, so that a token gets what the one before it asked for."""
    q = jnp.concatenate([jnp.ones_like(q, shape=(1, 1, *q.shape[2:])), q], axis=1)
    scores = jnp.where(jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1]), _scores(q, k), -jnp.inf)
    return _weigh(jax.nn.softmax(scores), v)[:, :-1]


def sink_keys_that_see_ahead(q, k, v, positions):
    """A mask that counts one learned key too many."""
    k, v = (jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) for x in _repeated(q, k, v))
    visible = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool), 2)
    return _masked_softmax(_scores(q, k), v, visible)


def differential(q, k, v, positions):
    """The difference of two softmaxes over halves of the heads' features."""
    half = q.shape[-1] // 2
    first, second = (
        jax.nn.softmax(jnp.where(_causal(q.shape[1]), _scores(q[..., part], k[..., part]), -jnp.inf))
        for part in (slice(None, half), slice(half, None))
    )
    return _weigh(first - 0.3 * second, v)


def delayed_normalisation(q, k, v, positions):
    """The weighted sum and the row sum leave apart, and meet later."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return _weigh(weights, v) / jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]


def latent(q, k, v, positions):
    """Multi-head latent attention, absorbed: one cached vector is key and value of all heads, beside a rotary key."""
    vector, rotary = k[:, :, 0], v[:, :, 0]
    scores = jnp.einsum("bthd,bsd->bhts", q, vector) + jnp.einsum("bthd,bsd->bhts", q * 0.5, rotary)
    weights = jax.nn.softmax(jnp.where(_causal(q.shape[1]), scores, -jnp.inf))
    return jnp.einsum("bhts,bsd->bthd", weights, vector)


def by_loop(q, k, v, positions):
    """One head after the other."""
    k, v = _repeated(q, k, v)
    mask = jnp.where(_causal(q.shape[1]), 0, -1e9)
    heads = [jax.nn.softmax(q[0, :, h] @ k[0, :, h].T / 2 + mask) @ v[0, :, h] for h in range(q.shape[2])]
    return jnp.stack(heads, axis=1)[None]


def by_rows(q, k, v, positions):
    """lax.map over the queries."""
    k, v = _repeated(q, k, v)

    def row(step):
        query, index = step
        scores = jnp.einsum("hd,shd->hs", query, k[0]) / 2
        scores = jnp.where(jnp.arange(k.shape[1]) <= index, scores, -jnp.inf)
        return jnp.einsum("hs,shd->hd", jax.nn.softmax(scores), v[0])

    return jax.lax.map(row, (q[0], jnp.arange(q.shape[1])))[None]


def by_vmap(q, k, v, positions):
    """vmap over batch and heads."""

    def head(q, k, v):
        return jax.nn.softmax(jnp.where(_causal(q.shape[0]), q @ k.T / 2, -jnp.inf)) @ v

    return jax.vmap(jax.vmap(head, in_axes=1, out_axes=1))(q, *_repeated(q, k, v))


@jax.custom_vjp
def _custom(q, k, v):
    return softmax_attention(q, k, v, None)


_custom.defvjp(lambda q, k, v: (_custom(q, k, v), None), lambda saved, g: (g, g, g))


def custom_vjp(q, k, v, positions):
    return _custom(q, k, v)


def multiplicative_mask(q, k, v, positions):
    """exp(scores) times the mask, then normalised."""
    weights = jnp.exp(_scores(q, k)) * _causal(q.shape[1])
    return _weigh(weights / weights.sum(-1, keepdims=True), v)


def masked_linear(q, k, v, positions):
    """Linear attention by its masked scores: causal, without a softmax."""
    return _weigh(_scores(q, k) * _causal(q.shape[1]), v)


def chunked_local(q, k, v, positions):
    """Llama 4: a token sees its own chunk of 16 positions only."""
    index = jnp.arange(q.shape[1])
    return _masked_softmax(_scores(q, k), v, _causal(q.shape[1]) & (index[:, None] // 16 == index // 16))


def multiplied_scores(q, k, v, positions):
    """Scores times the mask: what is masked keeps the weight of a score of 0."""
    return _weigh(jax.nn.softmax(_scores(q, k) * _causal(q.shape[1])), v)


def over_queries(q, k, v, positions):
    return _weigh(jax.nn.softmax(jnp.where(_causal(q.shape[1]), _scores(q, k), -1e9), axis=-2), v)


def prefix_bidirectional(q, k, v, positions):
    """Keys with a positive first feature are seen by everybody."""
    seen = _causal(q.shape[1]) | (k[:, :, 0, 0] > 0)[:, None, None, :]
    return _masked_softmax(_scores(q, k), v, seen)


def transposed_scores(q, k, v, positions):
    scores = _scores(q, k)
    return _masked_softmax(scores + jnp.swapaxes(scores, -1, -2), v)


def added_to_keys(q, k, v, positions):
    """What the queries got is added to the values of the same operator."""
    scores = jnp.where(_causal(q.shape[1]), _scores(q, k), -jnp.inf)
    (values,) = _repeated(q, v)
    return _masked_softmax(scores, values * jnp.exp(scores).sum(-1).transpose(0, 2, 1)[..., None])


class PaddedModel(SmallModel):
    """Token 0 is padding: nobody but itself sees it. The mask is made once from the ids and shared by the layers."""

    def __call__(self, params, tokens, positions):
        is_real = tokens != 0
        visible = jnp.broadcast_to(is_real[:, None, None, :], (1, 1, tokens.shape[1], tokens.shape[1]))
        visible = (visible & _causal(tokens.shape[1])) | jnp.eye(tokens.shape[1], dtype=bool)

        def padded(q, k, v, positions):
            return jax.nn.dot_product_attention(q, k, v, mask=visible)

        return SmallModel.__call__(dataclasses.replace(self, attention=padded), params, tokens, positions)


class SegmentedModel(SmallModel):
    """Tokens see their own parity only."""

    def __call__(self, params, tokens, positions):
        same = (tokens % 2)[:, None, :, None] == (tokens % 2)[:, None, None, :]

        def segmented(q, k, v, positions):
            return _masked_softmax(_scores(q, k), v, same & _causal(q.shape[1]))

        return SmallModel.__call__(dataclasses.replace(self, attention=segmented), params, tokens, positions)


class SharedKeysModel(SmallModel):
    """Every layer attends to the keys and values of the first."""

    operator = staticmethod(softmax_attention)

    def __call__(self, params, tokens, positions):
        first = []

        def shared(q, k, v, positions):
            first.append((k, v))
            return self.operator(q, *first[0], positions)

        return SmallModel.__call__(dataclasses.replace(self, attention=shared), params, tokens, positions)


class SharedSigmoidModel(SharedKeysModel):
    """The same by an operator that no kernel knows."""

    operator = staticmethod(sigmoid)


def two_attentions(q, k, v, positions):
    """Two operators side by side in one layer, one of them local."""
    return softmax_attention(q, k, v, positions) + softmax_attention(v_heads(q, v), v, k, positions, window=4)


def v_heads(q, v):
    """Queries of the second operator, made from values."""
    return jnp.repeat(v, q.shape[2] // v.shape[2], axis=2) + q


leaky = functools.partial(softmax_attention, mask_value=-10.0)
slightly_leaky = functools.partial(softmax_attention, mask_value=-30.0)
