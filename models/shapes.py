"""Public model shapes by name, for random weights: a bench needs a shape, not a download."""

from __future__ import annotations

from flax import nnx

from models.config import DecoderConfig
from models.errors import ModelNotFoundError
from models.families import LanguageModel, ModelConfig, build
from models.gpt_config import GptConfig
from models.hf_gemma_config import gemma_layer_types
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


def _gpt(model_type: str, vocab: int, hidden: int, layers: int, heads: int, context: int, **rest) -> GptConfig:
    return GptConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        **rest,
    )


def _neox(vocab: int, hidden: int, layers: int, heads: int, **rest) -> GptConfig:
    """A quarter of each head rotates."""
    options = {"hidden_act": "gelu", "parallel_residual": True, "tie_word_embeddings": False, **rest}
    return _gpt("gpt_neox", vocab, hidden, layers, heads, 2048, rotary_dim=hidden // heads // 4, **options)


def _gemma2(
    vocab: int, hidden: int, ffn: int, layers: int, heads: tuple[int, int, int], window: int, **rest
) -> DecoderConfig:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    options = {"layer_types": gemma_layer_types(layers, 2), "sliding_window": window, **_GEMMA, **caps, **rest}
    return _shape("gemma2", vocab, hidden, ffn, layers, heads, 8192, **options)


def _gemma3(
    vocab: int, hidden: int, ffn: int, layers: int, heads: tuple[int, int, int], window: int, context: int, **rest
) -> DecoderConfig:
    ropes = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "qk_norm": True}
    options = {"layer_types": gemma_layer_types(layers, 6), "sliding_window": window, **_GEMMA, **ropes, **rest}
    return _shape("gemma3_text", vocab, hidden, ffn, layers, heads, context, **options)


_QWEN2 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}
_QWEN3 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "qk_norm": True}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "scale_embeddings": True,
    "norm_offset": 1.0,
    "post_norms": True,
    "query_pre_attn_scalar": 256,
    **_TIED,
}

SHAPES: dict[str, ModelConfig] = {
    "tiny": _shape("llama", 256, 64, 128, 2, (4, 2, 16), 512, **_TIED),
    "tiny-gpt2": _gpt("gpt2", 256, 64, 2, 4, 512),
    "tiny-gpt-neox": _neox(256, 64, 2, 4),
    "tiny-gemma-2": _gemma2(256, 64, 128, 2, (4, 2, 16), 32),
    "tiny-gemma-3": _gemma3(256, 64, 128, 6, (4, 2, 16), 32, 512),
    "tiny-qwen3-moe": _shape(
        "qwen3_moe", 256, 64, 32, 2, (4, 2, 16), 512, num_experts=8, num_experts_per_tok=2, **_QWEN3
    ),
    "tiny-mixtral": _shape("mixtral", 256, 64, 128, 2, (4, 2, 16), 512, num_experts=4, num_experts_per_tok=2),
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
    "qwen3-30b-a3b": _shape(
        "qwen3_moe", 151936, 2048, 768, 48, (32, 4, 128), 40960, num_experts=128, num_experts_per_tok=8, **_QWEN3
    ),
    "mixtral-8x7b": _shape(
        "mixtral", 32000, 4096, 14336, 32, (32, 8, 128), 32768, rope_theta=1e6, num_experts=8, num_experts_per_tok=2
    ),
    "gemma-2-2b": _gemma2(256000, 2304, 9216, 26, (8, 4, 256), 4096),
    "gemma-2-9b": _gemma2(256000, 3584, 14336, 42, (16, 8, 256), 4096),
    "gemma-3-1b": _gemma3(262144, 1152, 6912, 26, (4, 1, 256), 512, 32768),
    "gpt2": _gpt("gpt2", 50257, 768, 12, 12, 1024),
    "gpt2-xl": _gpt("gpt2", 50257, 1600, 48, 25, 1024),
    "pythia-160m": _neox(50304, 768, 12, 12),
    "pythia-6.9b": _neox(50432, 4096, 32, 32),
    "smollm2-135m": _shape("llama", 49152, 576, 1536, 30, (9, 3, 64), 8192, rope_theta=1e5, **_TIED),
    "smollm2-360m": _shape("llama", 49152, 960, 2560, 32, (15, 5, 64), 8192, rope_theta=1e5, **_TIED),
    "smollm2-1.7b": _shape("llama", 49152, 2048, 8192, 24, (32, 32, 64), 8192, rope_theta=130000.0, **_TIED),
}


def shape_config(name: str) -> ModelConfig:
    """The config of a public shape; ModelNotFoundError with the known names otherwise."""
    if name not in SHAPES:
        raise ModelNotFoundError(f"no shape is called {name!r}; allowed: {tuple(SHAPES)}")
    return SHAPES[name]


def random_decoder(config: ModelConfig, *, dtype: str, seed: int) -> LanguageModel:
    """Random weights, each leaf made on the default device in its own dtype."""
    return build(config, rngs=nnx.Rngs(seed), dtype=resolve_dtype(dtype))
