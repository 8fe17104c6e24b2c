"""DecoderConfig from the config.json of Gemma 2 and Gemma 3 (text)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.checks import MAX_LAYERS, check_int
from models.config import DecoderConfig
from models.errors import ModelFormatError
from models.hf_rope import rope_from_hf
from models.hf_values import count, default, need, refuse_options

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
    "quantization_config": (),
}


def gemma2_config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Every second layer slides, beginning with the first; scores and logits are capped."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _gemma({"max_position_embeddings": 8192, **caps, **values}, pattern=2)


def gemma3_config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Five layers of six slide, with a rope base of their own; q and k are normed."""
    refuse_options(values, {"rope_parameters": ()})
    theirs = {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    pattern = count({"sliding_window_pattern": 6, **values}, "sliding_window_pattern")
    return _gemma({**theirs, **values}, pattern=pattern, qk_norm=True)


def gemma_layer_types(layers: int, pattern: int) -> tuple[str, ...]:
    """Every `pattern`-th layer sees everything, the others slide."""
    check_int("num_hidden_layers", layers, MAX_LAYERS)
    return tuple("sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers))


def _gemma(values: Mapping[str, Any], *, pattern: int, qk_norm: bool = False) -> DecoderConfig:
    refuse_options(values, _NEUTRAL)
    theta, scaling = rope_from_hf(values)
    layers, heads = count(values, "num_hidden_layers"), count(values, "num_attention_heads")
    types = default(values, "layer_types", list(gemma_layer_types(layers, pattern)))
    if not isinstance(types, list):
        raise ModelFormatError(f"config.json: layer_types must be a list, not {types!r}")
    return DecoderConfig(
        model_type=values["model_type"],
        vocab_size=need(values, "vocab_size"),
        hidden_size=need(values, "hidden_size"),
        intermediate_size=need(values, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=need(values, "num_key_value_heads"),
        head_dim=default(values, "head_dim", 256),
        max_position_embeddings=need(values, "max_position_embeddings"),
        rms_norm_eps=default(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_base_freq=values.get("rope_local_base_freq"),
        sliding_window=default(values, "sliding_window", 4096),
        layer_types=tuple(types),
        qk_norm=qk_norm,
        tie_word_embeddings=bool(default(values, "tie_word_embeddings", True)),
        hidden_act="gelu_pytorch_tanh",
        scale_embeddings=True,
        norm_offset=1.0,
        post_norms=True,
        query_pre_attn_scalar=default(values, "query_pre_attn_scalar", 256),
        attn_logit_softcapping=values.get("attn_logit_softcapping"),
        final_logit_softcapping=values.get("final_logit_softcapping"),
    )
