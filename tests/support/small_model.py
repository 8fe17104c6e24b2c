"""A small plain causal decoder in bare JAX with every part replaceable: the material of the partitioner's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def softmax_attention(q, k, v, positions, *, scale=None, window=None, cap=None, mask_value=-jnp.inf, offset=0):
    """[B, T, heads, dim] attention written out with einsum; grouped heads by reshaping the queries."""
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * (dim**-0.5 if scale is None else scale)
    if cap is not None:
        scores = jnp.tanh(scores / cap) * cap
    index = jnp.arange(rows)
    visible = index[:, None] >= index[None, :] - offset
    if window is not None:
        visible &= index[:, None] - index[None, :] < window
    scores = jnp.where(visible, scores, mask_value)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, rows, heads, v.shape[-1])


def library_attention(q, k, v, positions, **options):
    """The same through jax.nn."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)


def rope(x, positions):
    """Rotary embedding from the positions argument."""
    half = x.shape[-1] // 2
    angle = positions[..., None] * (10000.0 ** -(jnp.arange(half) / half))
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x, weight):
    """RMSNorm over features."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


@dataclass(frozen=True)
class SmallModel:
    """fn(params, tokens [1, T], positions [1, T]) -> logits; `attention`, `mix` and `encode` can be replaced.

    extra: shapes of further weights of each layer, given to `attention` by name.
    """

    hidden: int = 24
    heads: int = 6
    kv_heads: int = 2
    dim: int = 4
    layers: int = 2
    vocab: int = 31
    attention: Callable[..., Any] = library_attention
    mix: Callable[[Any], Any] = field(default=lambda x: x)
    encode: Callable[[Any, Any], Any] = rope
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def params(self, seed: int = 0, dtype=jnp.float32):
        random = np.random.default_rng(seed)

        def array(*shape):
            return jnp.asarray(random.normal(size=shape) / np.sqrt(shape[0]), dtype)

        width = (self.heads + 2 * self.kv_heads) * self.dim
        layer = lambda: {  # noqa: E731
            "norm": 1 + array(self.hidden),
            "qkv": array(self.hidden, width),
            "out": array(self.heads * self.dim, self.hidden),
            "norm2": 1 + array(self.hidden),
            "up": array(self.hidden, 40),
            "down": array(40, self.hidden),
            "extra": {name: array(*shape) for name, shape in self.extra.items()},
        }
        return {"embed": array(self.vocab, self.hidden), "layers": [layer() for _ in range(self.layers)]}

    def greedy(self, params, prompt, count: int, *, max_rows: int = 32) -> list[int]:
        """The likeliest `count` tokens behind a prompt, by the plain forward pass over all so far, again and again."""
        tokens, forward = np.zeros((1, max_rows), np.int32), jax.jit(self.__call__)
        tokens[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + count):
            tokens[0, at] = np.argmax(forward(params, tokens, np.arange(max_rows)[None])[0, at - 1])
        return tokens[0, len(prompt) : len(prompt) + count].tolist()

    def __call__(self, params, tokens, positions):
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x = self.block(x, layer, positions)
        return x @ params["embed"].T

    def block(self, x, layer, positions):
        """One layer, [1, T, hidden] to the same."""
        batch, rows = x.shape[:2]
        qkv = rms_norm(x, layer["norm"]) @ layer["qkv"]
        cuts = [self.heads * self.dim, (self.heads + self.kv_heads) * self.dim]
        q, k, v = (part.reshape(batch, rows, -1, self.dim) for part in jnp.split(qkv, cuts, axis=-1))
        q, k = self.encode(q, positions), self.encode(k, positions)
        attended = self.attention(q, k, v, positions, **layer["extra"])
        x = x + attended.reshape(batch, rows, -1) @ layer["out"]
        x = self.mix(x)
        return x + jax.nn.silu(rms_norm(x, layer["norm2"]) @ layer["up"]) @ layer["down"]
