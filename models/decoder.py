"""The Llama family as one plain causal forward pass. It knows tokens and positions, and no cache, tier or batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import DecoderConfig
from models.layers import RmsNorm, causal_attention, matmul, product, random_kernel, random_table
from models.rope import rope_tables, rotate


class Attention(nnx.Module):
    """Causal grouped-query attention over the whole sequence, with a window where `window` is given."""

    def __init__(
        self, config: DecoderConfig, *, window: int | None, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window = window
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = random_kernel(rngs, (config.hidden_size, width), dtype)
        self.qkv_bias = nnx.Param(jnp.zeros((width,), dtype)) if config.qkv_bias else None
        self.out = random_kernel(rngs, (self.heads * self.head_dim, config.hidden_size), dtype)
        norms = config.qk_norm
        self.q_norm = RmsNorm(self.head_dim, eps=config.rms_norm_eps, dtype=dtype) if norms else None
        self.k_norm = RmsNorm(self.head_dim, eps=config.rms_norm_eps, dtype=dtype) if norms else None

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """x: [B, T, hidden], cos and sin: f32 [B, T, 1, head_dim / 2] -> [B, T, hidden]."""
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = causal_attention(q, k, v, window=self.window)
        return matmul(attended.reshape(*x.shape[:2], self.heads * self.head_dim), self.out[...])

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, hidden] -> q [B, T, heads, head_dim], k and v [B, T, kv_heads, head_dim]."""
        qkv = matmul(x, self.qkv[...])
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        q_end = self.heads * self.head_dim
        q, k, v = jnp.split(qkv, [q_end, q_end + self.kv_heads * self.head_dim], axis=-1)
        q = q.reshape(*x.shape[:2], self.heads, self.head_dim)
        k, v = (part.reshape(*x.shape[:2], self.kv_heads, self.head_dim) for part in (k, v))
        return q, k, v


class Mlp(nnx.Module):
    """silu(x gate) * (x up), projected down; gate and up are one kernel."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.gate_up = random_kernel(rngs, (config.hidden_size, 2 * config.intermediate_size), dtype)
        self.down = random_kernel(rngs, (config.intermediate_size, config.hidden_size), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        gate, up = jnp.split(matmul(x, self.gate_up[...]), 2, axis=-1)
        return matmul(jax.nn.silu(gate) * up, self.down[...])


class Block(nnx.Module):
    """One pre-norm layer: attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: DecoderConfig, *, window: int | None, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        self.attention_norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, window=window, rngs=rngs, dtype=dtype)
        self.mlp_norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = Mlp(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """A Llama-family language model. Kernels are stored [in, out]; q, k, v and gate, up are fused.

    >>> logits = Decoder(config, rngs=nnx.Rngs(0))(tokens, positions)   # f32 [B, T, vocab_size]
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embedding = random_table(rngs, (config.vocab_size, config.hidden_size), dtype)
        self.blocks = nnx.List(
            Block(config, window=config.layer_window(layer), rngs=rngs, dtype=dtype)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.head = None if tied else random_kernel(rngs, (config.hidden_size, config.vocab_size), dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens and positions: int32 [B, T] -> next-token logits, f32 [B, T, vocab_size].

        Token t sees tokens 0..t of its row. Ids outside the vocabulary are clipped into it.
        """
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        if self.head is None:
            return product(x, self.embedding[...], kernel_axis=1)
        return product(x, self.head[...], kernel_axis=0)
