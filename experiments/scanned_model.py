"""A small random decoder whose layers are one `linen.scan`, with their weights stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

VOCAB_SIZE, HIDDEN, HEADS, POSITIONS = 61, 24, 6, 96


class Block(linen.Module):
    """Attention and MLP, each before a norm and beside the residual stream."""

    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        x = x + linen.MultiHeadDotProductAttention(num_heads=HEADS)(linen.LayerNorm()(x), mask=mask)
        x = x + linen.Dense(HIDDEN)(linen.gelu(linen.Dense(4 * HIDDEN)(linen.LayerNorm()(x))))
        return x, None


class Decoder(linen.Module):
    """tokens, positions [1, T] int32 -> logits [1, T, vocab]."""

    layers: int

    @linen.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = linen.Embed(VOCAB_SIZE, HIDDEN)(tokens) + linen.Embed(POSITIONS, HIDDEN)(positions)
        scan = linen.scan(
            linen.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=linen.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.layers,
        )
        x, _ = scan()(x, linen.make_causal_mask(tokens))
        return linen.Dense(VOCAB_SIZE)(linen.LayerNorm()(x))


def build(layers: int) -> tuple[Callable[..., jax.Array], Any]:
    """fn(params, tokens, positions) and its parameters."""
    module, ids = Decoder(layers=layers), jnp.zeros((1, 8), jnp.int32)

    def fn(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return module.apply({"params": params}, tokens, positions)  # pyright: ignore[reportReturnType]

    return fn, module.init(jax.random.key(0), ids, ids)["params"]
