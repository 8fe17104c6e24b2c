"""What a model makes by position, without being given any: found as tables that rows look up, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from partition import PartitionError, TokenMixingError, TraceError, partition
from small_model import SmallModel, rope


class TableModel(SmallModel):
    """Learned positions, one or more per head, sliced out of a table of 70."""

    def __init__(self, sliced):
        super().__init__()
        object.__setattr__(self, "sliced", sliced)

    def params(self):
        return {**super().params(), "table": jnp.asarray(np.random.default_rng(5).normal(size=(70, 4)), jnp.float32)}

    def __call__(self, params, tokens, positions):
        def add(x, _):
            return x + self.sliced(params["table"], tokens.shape[1])[None, :, None]

        return SmallModel(encode=add)(params, tokens, positions)


def _counted(x, positions):
    return rope(x, jnp.cumsum(jnp.ones(x.shape[:2], jnp.int32), axis=1) - 1)


def _counted_mask(q, k, v, positions):
    at = jnp.cumsum(jnp.ones(q.shape[1]))
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2))
    weights = jax.nn.softmax(jnp.where(at[:, None] >= at, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2))


def _sliced_mask(q, k, v, positions):
    rows = q.shape[1]
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.tril(jnp.ones((70, 70), bool))[None, None, :rows, :rows])


ACCEPTED = {
    "first rows of a table": TableModel(lambda table, rows: table[:rows]),
    "rows of a table from the third on": TableModel(lambda table, rows: table[2 : rows + 2]),
    "positions counted by a running sum": SmallModel(encode=_counted),
    "mask of positions counted by a running sum": SmallModel(attention=_counted_mask),
    "corner of a large mask": SmallModel(attention=_sliced_mask),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_cached_decoding_looks_positions_up(name):
    model = ACCEPTED[name]
    params = model.params()
    plan = partition(model, params, max_rows=64)
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (15, 1, 6)]
    for tokens, logits in zip(sequences, decode(plan, params, sequences), strict=True):
        ids = jnp.asarray(tokens, jnp.int32)[None]
        expected = np.asarray(model(params, ids, jnp.arange(len(tokens))[None])[0])
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


REFUSED = {
    "table too short": (
        TableModel(lambda table, rows: table[8 : rows + 8]),
        TraceError,
        r"has 62 positions in the table \(70, 4\).*at most 62 tokens, not 64",
    ),
    "every second row of a table": (
        TableModel(lambda table, rows: jnp.concatenate([table, table])[: 2 * rows : 2]),
        TokenMixingError,
        "'slice'.*makes one row per token out of what has none",
    ),
    "counted from the end": (
        SmallModel(encode=lambda x, _: rope(x, jax.lax.cumsum(jnp.ones(x.shape[:2], jnp.int32), 1, reverse=True))),
        TokenMixingError,
        "'cumsum'.*moves, drops or combines",
    ),
    "running sum of token ids": (
        SmallModel(encode=lambda x, _: x * jnp.cumsum(x[:, :, :1, :1] > 0, axis=1)),
        TokenMixingError,
        "'cumsum'",
    ),
    "table that ends at the last token": (
        TableModel(lambda table, rows: table[70 - rows :]),
        PartitionError,
        "depends on the number of tokens|positions in the table",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_positions_that_are_no_table_are_refused(name):
    model, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        partition(model, model.params(), max_rows=64)
