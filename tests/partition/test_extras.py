"""Axes of tokens and extra entries: split or not, the program computes what the function does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partition.extras import split_extras
from partition.jaxpr import trace

_ROWS = 13


def _beside(x, extra):
    return jnp.concatenate([extra, x], axis=1)


# name -> function of [3, T] and [3, 2]
SPLIT = {
    "sum": lambda x, extra: _beside(x, extra).sum(1),
    "maximum of what is behind": lambda x, extra: jnp.concatenate([x, extra], 1).max(1),
    "smallest, and whether all or any": lambda x, extra: (
        _beside(x, extra).min(1) + (_beside(x, extra) > -1).all(1) + (_beside(x, extra) > 1).any(1)
    ),
    "product on both sides": lambda x, extra: _beside(x, extra) @ _beside(2 * x, 1 - extra).T,
    "product with another value": lambda x, extra: (extra.T @ _beside(x, extra)).sum(1),
    "part behind": lambda x, extra: jnp.exp(_beside(x, extra))[:, 2:],
    "part in front": lambda x, extra: jax.nn.softmax(_beside(x, extra))[1:, :2],
    "padding": lambda x, extra: jax.nn.softmax(jnp.pad(x, ((0, 0), (2, 3))))[:, 2:-3] * extra[:, :1],
    "transposed and reshaped": lambda x, extra: _beside(x, extra).T[:, None, ::-1].reshape(-1, 3).sum(0),
    "with a count": lambda x, extra: (_beside(x, extra) * jnp.arange(_ROWS + 2)).sum(1),
}
WHOLE = {
    "cut elsewhere": lambda x, extra: _beside(x, extra)[:, 1:-1],
    "every other": lambda x, extra: _beside(x, extra)[:, ::2],
    "running sum": lambda x, extra: jnp.cumsum(_beside(x, extra), 1),
    "reversed": lambda x, extra: _beside(x, extra)[:, ::-1][:, :-2],
    "parts of other sizes": lambda x, extra: (_beside(x, extra) * jnp.concatenate([x, extra], 1)).sum(1),
    "counted behind the tokens": lambda x, extra: (jnp.concatenate([x, extra], 1) * jnp.arange(_ROWS + 2)).sum(1),
    "counted in a type that rounds": lambda x, extra: (
        _beside(x, extra) * jnp.arange(_ROWS + 2, dtype=jnp.float16)
    ).sum(1),
    "no extra entries": lambda x, extra: jnp.concatenate([x, x], 1).sum(1),
}


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_a_program_computes_the_same_and_is_split_where_nothing_needs_it_whole(name):
    fn = {**SPLIT, **WHOLE}[name]
    random = np.random.default_rng(0)
    operands = [jnp.asarray(random.normal(size=(3, size)), jnp.float32) for size in (_ROWS, 2)]
    program = split_extras(trace(fn, *operands), _ROWS)
    env = {**program.constants, **dict(zip(program.inputs, operands, strict=True))}
    for eqn in program.equations:
        assert all(env[value].shape == value.shape for value in eqn.inputs)
        env.update(zip(eqn.outputs, eqn.evaluate([env[value] for value in eqn.inputs]), strict=True))
    np.testing.assert_allclose(env[program.outputs[0]], fn(*operands), rtol=1e-5, atol=1e-6)
    is_split = not any(eqn.primitive in ("concatenate", "pad") for eqn in program.equations)
    assert is_split == (name in SPLIT)
