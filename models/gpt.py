"""GPT-2 and GPT-NeoX as one plain causal forward pass. It knows tokens and positions, and no cache, tier or batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.gpt_config import GptConfig
from models.layers import LayerNorm, Linear, causal_attention, product, random_kernel, random_table
from models.rope import RopeTables, rope_tables, rotate

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GptAttention(nnx.Module):
    """Causal attention over the whole sequence; q and k are rotated where rope tables are given."""

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs, dtype=dtype)
        self.out = Linear(config.hidden_size, config.hidden_size, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, rope: RopeTables | None) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], self.heads, self.head_dim) for part in parts)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.out(causal_attention(q, k, v).reshape(x.shape))


class GptMlp(nnx.Module):
    """activation(x up) down, with biases."""

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.up = Linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.down = Linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        return self.down(self.activation(self.up(x)))


class GptBlock(nnx.Module):
    """One pre-norm layer; attention and MLP follow each other or, with `parallel_residual`, stand side by side."""

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> None:
        self.parallel = config.parallel_residual
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.attention = GptAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = GptMlp(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, rope: RopeTables | None) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        after = x + self.attention(self.attention_norm(x), rope)
        return after + self.mlp(self.mlp_norm(x if self.parallel else after))


class GptDecoder(nnx.Module):
    """A GPT language model. Kernels are stored [in, out]; q, k, v are fused.

    >>> logits = GptDecoder(config, rngs=nnx.Rngs(0))(tokens, positions)   # f32 [B, T, vocab_size]
    """

    def __init__(self, config: GptConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embedding = random_table(rngs, (config.vocab_size, config.hidden_size), dtype)
        learned = config.rotary_dim is None
        places = (config.max_position_embeddings, config.hidden_size)
        self.position_embedding = random_table(rngs, places, dtype) if learned else None
        self.blocks = nnx.List(GptBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.head = None if tied else random_kernel(rngs, (config.hidden_size, config.vocab_size), dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens and positions: int32 [B, T] -> next-token logits, f32 [B, T, vocab_size].

        Token t sees tokens 0..t of its row. Ids outside the vocabulary, and positions outside the learned ones, are
        clipped into them.
        """
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        if self.position_embedding is not None:
            x = x + jnp.take(self.position_embedding[...], positions, axis=0, mode="clip")
        rope = self._rope(positions)
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x)
        if self.head is None:
            return product(x, self.embedding[...], kernel_axis=1)
        return product(x, self.head[...], kernel_axis=0)

    def _rope(self, positions: jax.Array) -> RopeTables | None:
        config = self.config
        if config.rotary_dim is None:
            return None
        return rope_tables(positions, config.rotary_dim, config.rope_theta, None)
