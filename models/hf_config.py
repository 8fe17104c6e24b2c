"""A model's config from a config.json; whatever would change the arithmetic and is not built is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checks import MAX_LAYERS
from models.config import DecoderConfig
from models.errors import ModelFormatError, UnsupportedModelError
from models.families import MODEL_TYPES, ModelConfig
from models.hf_gemma_config import gemma2_config_from_hf, gemma3_config_from_hf
from models.hf_gpt_config import gpt2_config_from_hf, gpt_neox_config_from_hf
from models.hf_rope import rope_from_hf
from models.hf_values import count, default, need, refuse_options

_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
)

# key -> the values that mean "not used"; anything else changes the arithmetic
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "quantization_config": (),
    "logit_scale": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}

# max_position_embeddings where config.json leaves it out: Hugging Face's own defaults
_DEFAULT_CONTEXT = {
    "llama": 2048,
    "mistral": 4096 * 32,
    "qwen2": 32768,
    "qwen3": 32768,
    "qwen3_moe": 32768,
    "mixtral": 4096 * 32,
}
_MISTRAL_WINDOW = 4096  # Hugging Face's default where the key is absent; an explicit null means no window


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Reads the dict of a config.json.

    Raises UnsupportedModelError naming an architecture or option that is not built, ModelFormatError naming a
    missing or impossible key.
    """
    model_type = _model_type(values)
    return _READERS.get(model_type, _llama)(values)


def _llama(values: Mapping[str, Any]) -> DecoderConfig:
    """Llama, Mistral, Qwen2, Qwen3, and what the other families share with them."""
    model_type = values["model_type"]
    refuse_options(values, _NEUTRAL)
    theta, scaling = rope_from_hf(values)
    heads, layers = count(values, "num_attention_heads"), count(values, "num_hidden_layers")
    window, layer_types = _sliding(values, model_type, layers)
    hidden_size = count(values, "hidden_size")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=need(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=need(values, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=default(values, "num_key_value_heads", heads),
        head_dim=default(values, "head_dim", _head_dim(model_type, hidden_size, heads)),
        max_position_embeddings=default(values, "max_position_embeddings", _DEFAULT_CONTEXT[model_type]),
        rms_norm_eps=default(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        layer_types=layer_types,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        tie_word_embeddings=bool(default(values, "tie_word_embeddings", False)),
    )


def _qwen3_moe(values: Mapping[str, Any]) -> DecoderConfig:
    refuse_options(values, {"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "use_sliding_window": (False,)})
    shape = {**values, "num_experts": None, "intermediate_size": need(values, "moe_intermediate_size")}
    return dataclasses.replace(
        _llama(shape),
        num_experts=default(values, "num_experts", 128),
        num_experts_per_tok=default(values, "num_experts_per_tok", 8),
        norm_topk_prob=bool(default(values, "norm_topk_prob", False)),
    )


def _mixtral(values: Mapping[str, Any]) -> DecoderConfig:
    shape = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **values, "num_local_experts": None}
    return dataclasses.replace(
        _llama(shape),
        num_experts=default(values, "num_local_experts", 8),
        num_experts_per_tok=default(values, "num_experts_per_tok", 2),
    )


_READERS = {
    "gpt2": gpt2_config_from_hf,
    "gpt_neox": gpt_neox_config_from_hf,
    "gemma2": gemma2_config_from_hf,
    "gemma3_text": gemma3_config_from_hf,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def _model_type(values: Mapping[str, Any]) -> str:
    model_type = need(values, "model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is not supported; allowed: {MODEL_TYPES}")
    architectures = default(values, "architectures", [])
    if not isinstance(architectures, list):
        raise ModelFormatError(f"config.json: architectures must be a list, not {architectures!r}")
    for name in architectures:
        if name not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"config.json: architecture {name!r} is not supported; allowed: {_ARCHITECTURES}"
            )
    return model_type


def _sliding(values: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """The window and, where only some layers slide, the kind of each layer."""
    window = values.get("sliding_window", _MISTRAL_WINDOW if model_type == "mistral" else None)
    slides_always = model_type in ("mistral", "mixtral")
    if model_type == "llama" or not (slides_always or values.get("use_sliding_window")):
        return None, None
    if window is None:
        return None, None
    if values.get("layer_types") is not None:
        if not isinstance(values["layer_types"], list):
            raise ModelFormatError(f"config.json: layer_types must be a list, not {values['layer_types']!r}")
        return window, tuple(values["layer_types"])
    if slides_always:
        return window, None
    if layers > MAX_LAYERS:  # checked before a list of that length is made
        raise ModelFormatError(f"config.json: num_hidden_layers must be in 1..{MAX_LAYERS}, not {layers}")
    # from this layer on they slide
    first = min(count({"max_window_layers": 28, **values}, "max_window_layers", least=0), layers)
    return window, ("full_attention",) * first + ("sliding_attention",) * (layers - first)


def _head_dim(model_type: str, hidden_size: int, heads: int) -> int:
    if model_type == "qwen3":
        return 128  # Hugging Face's default, which does not follow from the hidden size
    return hidden_size // heads
