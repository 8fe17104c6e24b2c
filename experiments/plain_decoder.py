"""A plain decoder with random weights, of any width and any number of heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import hetero_jax as hj

VOCAB, HEAD_DIM = 1024, 64


def params(hidden: int, layers: int, *, heads: int) -> dict:
    """Random weights, float32. heads: of queries; keys and values have half as many."""
    draw = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape, np.float32) / shape[0] ** 0.5)

    width = heads * HEAD_DIM
    all_layers = [
        {
            "qkv": weight(hidden, 2 * width),
            "out": weight(width, hidden),
            "up": weight(hidden, 4 * hidden),
            "down": weight(4 * hidden, hidden),
        }
        for _ in range(layers)
    ]
    return {"embed": weight(VOCAB, hidden), "layers": all_layers}


def forward(
    params: dict, tokens: jax.Array, positions: jax.Array, *, windows: tuple[int | None, ...] | None = None
) -> jax.Array:
    """A plain decoder with two heads of queries to one of keys; position enters by rotation.

    windows: positions, its own included, that a token sees in each layer; None: all.
    """
    x = params["embed"][tokens]
    half = HEAD_DIM // 2
    angles = positions[..., None, None] * 10000.0 ** -(jnp.arange(half) / half)
    for layer, window in zip(params["layers"], windows or (None,) * len(params["layers"]), strict=True):
        parts = (_norm(x) @ layer["qkv"]).reshape(*x.shape[:2], -1, HEAD_DIM)
        q, k, v = jnp.split(parts, [parts.shape[2] // 2, 3 * parts.shape[2] // 4], axis=2)
        seen = None if window is None else (window - 1, 0)
        rows = (_rotate(q, angles), _rotate(k, angles), v)
        out = jax.nn.dot_product_attention(*rows, is_causal=True, local_window_size=seen)
        x = x + out.reshape(*x.shape[:2], -1) @ layer["out"]
        x = x + jax.nn.silu(_norm(x) @ layer["up"]) @ layer["down"]
    return _norm(x) @ params["embed"].T


def generate(engine: hj.Engine, *, sequences: int, context: int, tokens: int) -> None:
    """So many tokens of each sequence, greedily, behind prompts of `context` random tokens: always the same ones."""
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, VOCAB, context).tolist() for _ in range(sequences)]
    list(engine.generate(prompts, hj.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)))


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
