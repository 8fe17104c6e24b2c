"""Public model shapes by name, for random weights: a bench needs a shape, not a download."""

from __future__ import annotations

from flax import nnx

from models.config import DecoderConfig
from models.errors import ModelNotFoundError
from models.families import LanguageModel, ModelConfig, build
from models.rope import RopeScaling
from models.weights import resolve_dtype


def _shape(
    model_type: str, vocab: int, hidden: int, ffn: int, layers: int, heads: tuple[int, int, int], context: int, **rest
) -> DecoderConfig:
    """`heads` is (query heads, key-value heads, head size)."""
    return DecoderConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        max_position_embeddings=context,
        **rest,
    )


def _llama31(factor: float) -> RopeScaling:
    return RopeScaling(rope_type="llama3", factor=factor, original_max_position_embeddings=8192)


_QWEN2 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}
_QWEN3 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "qk_norm": True}
_TIED = {"tie_word_embeddings": True}

SHAPES: dict[str, DecoderConfig] = {
    "tiny": _shape("llama", 256, 64, 128, 2, (4, 2, 16), 512, **_TIED),
    "llama-2-7b": _shape("llama", 32000, 4096, 11008, 32, (32, 32, 128), 4096),
    "llama-2-13b": _shape("llama", 32000, 5120, 13824, 40, (40, 40, 128), 4096),
    "llama-2-70b": _shape("llama", 32000, 8192, 28672, 80, (64, 8, 128), 4096),
    "llama-3-8b": _shape("llama", 128256, 4096, 14336, 32, (32, 8, 128), 8192, rope_theta=5e5),
    "llama-3-70b": _shape("llama", 128256, 8192, 28672, 80, (64, 8, 128), 8192, rope_theta=5e5),
    "llama-3.1-8b": _shape(
        "llama", 128256, 4096, 14336, 32, (32, 8, 128), 131072, rope_theta=5e5, rope_scaling=_llama31(8.0)
    ),
    "llama-3.2-1b": _shape(
        "llama", 128256, 2048, 8192, 16, (32, 8, 64), 131072, rope_theta=5e5, rope_scaling=_llama31(32.0), **_TIED
    ),
    "llama-3.2-3b": _shape(
        "llama", 128256, 3072, 8192, 28, (24, 8, 128), 131072, rope_theta=5e5, rope_scaling=_llama31(32.0), **_TIED
    ),
    "mistral-7b": _shape("mistral", 32000, 4096, 14336, 32, (32, 8, 128), 32768, sliding_window=4096),
    "qwen2-0.5b": _shape("qwen2", 151936, 896, 4864, 24, (14, 2, 64), 131072, **_QWEN2, **_TIED),
    "qwen2-7b": _shape("qwen2", 152064, 3584, 18944, 28, (28, 4, 128), 131072, **_QWEN2),
    "qwen3-0.6b": _shape("qwen3", 151936, 1024, 3072, 28, (16, 8, 128), 40960, **_QWEN3, **_TIED),
    "qwen3-8b": _shape("qwen3", 151936, 4096, 12288, 36, (32, 8, 128), 40960, **_QWEN3),
    "smollm2-135m": _shape("llama", 49152, 576, 1536, 30, (9, 3, 64), 8192, rope_theta=1e5, **_TIED),
    "smollm2-360m": _shape("llama", 49152, 960, 2560, 32, (15, 5, 64), 8192, rope_theta=1e5, **_TIED),
    "smollm2-1.7b": _shape("llama", 49152, 2048, 8192, 24, (32, 32, 64), 8192, rope_theta=130000.0, **_TIED),
}


def shape_config(name: str) -> DecoderConfig:
    """The config of a public shape; ModelNotFoundError with the known names otherwise."""
    if name not in SHAPES:
        raise ModelNotFoundError(f"no shape is called {name!r}; allowed: {tuple(SHAPES)}")
    return SHAPES[name]


def random_decoder(config: ModelConfig, *, dtype: str, seed: int) -> LanguageModel:
    """Random weights, each leaf made on the default device in its own dtype."""
    return build(config, rngs=nnx.Rngs(seed), dtype=resolve_dtype(dtype))
