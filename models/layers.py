"""What decoders of several families are made of: products that accumulate in f32, norms, and attention."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., in] x [in, out] -> [..., out] in the dtype of x, accumulated in f32."""
    return product(x, kernel, kernel_axis=0).astype(x.dtype)


def product(x: jax.Array, kernel: jax.Array, *, kernel_axis: int) -> jax.Array:
    """The last axis of x against `kernel_axis` of a matrix: f32 [..., other axis]."""
    dimensions = (((x.ndim - 1,), (kernel_axis,)), ((), ()))
    return lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, std: float) -> jax.Array:
    # jitted, so that a leaf is made in its own dtype with no temporary of its size
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


def random_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> nnx.Param[jax.Array]:
    """[..., in, out], normal with a deviation of 1 / sqrt(in)."""
    return nnx.Param(_draw(rngs.params(), shape, dtype, 1.0 / math.sqrt(shape[-2])))


def random_table(rngs: nnx.Rngs, shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> nnx.Param[jax.Array]:
    """Embeddings [entries, hidden], normal with a deviation of 1 / sqrt(hidden)."""
    return nnx.Param(_draw(rngs.params(), shape, dtype, 1.0 / math.sqrt(shape[-1])))


class RmsNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axis, in f32. Gemma stores its scales less an offset of 1."""

    def __init__(self, size: int, *, eps: float, dtype: jax.typing.DTypeLike, offset: float = 0.0) -> None:
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size] in the dtype of x."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (wide * lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias over the last axis, in f32."""

    def __init__(self, size: int, *, eps: float, dtype: jax.typing.DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size] in the dtype of x."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normal = wide * lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x kernel + bias, with the kernel as [in, out]."""

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.kernel = random_kernel(rngs, (fan_in, fan_out), dtype)
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out] in the dtype of x."""
        return matmul(x, self.kernel[...]) + self.bias[...]


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention of q [B, T, heads, head_dim] to k and v [B, T, kv_heads, head_dim]; gives the shape of q.

    Scores are q k scale (1 / sqrt(head_dim) unless given), then softcap tanh(score / softcap) where that is given.
    A token sees itself and those before it, `window` tokens in all where that is given.
    """
    if softcap is None:
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, local_window_size=local)
    return _capped_attention(q, k, v, scale=scale, window=window, softcap=softcap)


def _capped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None, window: int | None, softcap: float
) -> jax.Array:
    """Written out, as `jax.nn` knows no soft cap."""
    batch, rows, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * (1.0 / math.sqrt(head_dim) if scale is None else scale)
    scores = softcap * jnp.tanh(scores / softcap)
    distance = jnp.arange(rows)[:, None] - jnp.arange(rows)[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)
