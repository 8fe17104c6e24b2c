"""Llama and its like as one plain causal forward pass. It knows tokens and positions, and no cache, tier or batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import DecoderConfig
from models.layers import RmsNorm, causal_attention, matmul, product, random_kernel, random_table
from models.rope import RopeTables, rope_tables, rotate

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def _norm(config: DecoderConfig, size: int, dtype: jax.typing.DTypeLike) -> RmsNorm:
    return RmsNorm(size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)


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
        self.q_norm = _norm(config, self.head_dim, dtype) if config.qk_norm else None
        self.k_norm = _norm(config, self.head_dim, dtype) if config.qk_norm else None
        scalar = config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5
        self.softcap = config.attn_logit_softcapping

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """x: [B, T, hidden], cos and sin: f32 [B, T, 1, head_dim / 2] -> [B, T, hidden]."""
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = causal_attention(q, k, v, scale=self.scale, window=self.window, softcap=self.softcap)
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
    """activation(x gate) * (x up), projected down; gate and up are one kernel."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.gate_up = random_kernel(rngs, (config.hidden_size, 2 * config.intermediate_size), dtype)
        self.down = random_kernel(rngs, (config.intermediate_size, config.hidden_size), dtype)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        gate, up = jnp.split(matmul(x, self.gate_up[...]), 2, axis=-1)
        return matmul(self.activation(gate) * up, self.down[...])


class Experts(nnx.Module):
    """A router, and MLPs of which each token passes a few. Rows are sorted by expert; none is dropped."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        assert config.num_experts is not None
        self.num_experts, self.per_token = config.num_experts, config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.router = random_kernel(rngs, (hidden, self.num_experts), dtype)
        self.gate_up = random_kernel(rngs, (self.num_experts, hidden, 2 * ffn), dtype)
        self.down = random_kernel(rngs, (self.num_experts, ffn, hidden), dtype)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self._route(rows)
        expert = chosen.reshape(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=self.num_experts)
        gate, up = jnp.split(_ragged_matmul(rows[order // self.per_token], self.gate_up[...], sizes), 2, axis=-1)
        out = _ragged_matmul(self.activation(gate) * up, self.down[...], sizes)
        out = out[jnp.argsort(order)].reshape(*chosen.shape, x.shape[-1])
        return (out * weights[..., None]).sum(axis=1).reshape(x.shape)

    def _route(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, hidden] -> weights, in the dtype of the rows, and experts, int32: both [N, per_token]."""
        shares = jax.nn.softmax(product(rows, self.router[...], kernel_axis=0), axis=-1)
        weights, chosen = jax.lax.top_k(shares, self.per_token)
        if self.normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(rows.dtype), chosen


def _ragged_matmul(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """[N, in], sorted into groups of `sizes` rows, x [groups, in, out] -> [N, out], accumulated in f32."""
    return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)


class Block(nnx.Module):
    """One pre-norm layer: attention and MLP, each added to the residual stream, normed before that if `post_norms`."""

    def __init__(
        self, config: DecoderConfig, *, window: int | None, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        hidden = config.hidden_size
        self.attention_norm = _norm(config, hidden, dtype)
        self.attention = Attention(config, window=window, rngs=rngs, dtype=dtype)
        self.mlp_norm = _norm(config, hidden, dtype)
        self.mlp = (Mlp if config.num_experts is None else Experts)(config, rngs=rngs, dtype=dtype)
        self.attention_post_norm = _norm(config, hidden, dtype) if config.post_norms else None
        self.mlp_post_norm = _norm(config, hidden, dtype) if config.post_norms else None

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        attended = self.attention(self.attention_norm(x), cos, sin)
        x = x + (attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        changed = self.mlp(self.mlp_norm(x))
        return x + (changed if self.mlp_post_norm is None else self.mlp_post_norm(changed))


class Decoder(nnx.Module):
    """A language model of Llama's kind. Kernels are stored [in, out]; q, k, v and gate, up are fused.

    >>> logits = Decoder(config, rngs=nnx.Rngs(0))(tokens, positions)   # f32 [B, T, vocab_size]
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embedding = random_table(rngs, (config.vocab_size, config.hidden_size), dtype)
        self.blocks = nnx.List(
            Block(config, window=config.layer_window(layer), rngs=rngs, dtype=dtype)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, config.hidden_size, dtype)
        tied = config.tie_word_embeddings
        self.head = None if tied else random_kernel(rngs, (config.hidden_size, config.vocab_size), dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens and positions: int32 [B, T] -> next-token logits, f32 [B, T, vocab_size].

        Token t sees tokens 0..t of its row. Ids outside the vocabulary are clipped into it.
        """
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        rope = self._rope(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, *rope[self.config.layer_window(layer) is not None])
        logits = self._logits(self.norm(x))
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.head is None:
            return product(x, self.embedding[...], kernel_axis=1)
        return product(x, self.head[...], kernel_axis=0)

    def _rope(self, positions: jax.Array) -> tuple[RopeTables, RopeTables]:
        """Tables of the layers that see everything, and of those with a window."""
        config = self.config
        everywhere = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        if config.rope_local_base_freq is None:
            return everywhere, everywhere
        return everywhere, rope_tables(positions, config.head_dim, config.rope_local_base_freq, None)
