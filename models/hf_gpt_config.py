"""GptConfig from the config.json of GPT-2 and GPT-NeoX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.errors import ModelFormatError, UnsupportedModelError
from models.gpt_config import GptConfig
from models.hf_values import count, default, need, refuse_options

_TANH = "gelu_pytorch_tanh"
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": _TANH, "gelu_fast": _TANH, _TANH: _TANH}  # three names of one formula
_GPT2_NEUTRAL: dict[str, tuple[object, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (),
}
_GPT_NEOX_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (True,),
    "rope_scaling": (),
    "quantization_config": (),
}


def gpt2_config_from_hf(values: Mapping[str, Any]) -> GptConfig:
    """Reads the config.json of GPT-2; what is absent has Hugging Face's default."""
    refuse_options(values, _GPT2_NEUTRAL)
    hidden_size = count({"n_embd": 768, **values}, "n_embd")
    return GptConfig(
        model_type="gpt2",
        vocab_size=need(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=default(values, "n_inner", 4 * hidden_size),
        num_hidden_layers=default(values, "n_layer", 12),
        num_attention_heads=default(values, "n_head", 12),
        max_position_embeddings=default(values, "n_positions", 1024),
        layer_norm_eps=default(values, "layer_norm_epsilon", 1e-5),
        hidden_act=_activation(values, "activation_function", "gelu_new"),
        tie_word_embeddings=bool(default(values, "tie_word_embeddings", True)),
    )


def gpt_neox_config_from_hf(values: Mapping[str, Any]) -> GptConfig:
    """Reads the config.json of GPT-NeoX; what is absent has Hugging Face's default."""
    refuse_options(values, _GPT_NEOX_NEUTRAL)
    hidden_size, heads = count(values, "hidden_size"), count(values, "num_attention_heads")
    return GptConfig(
        model_type="gpt_neox",
        vocab_size=need(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=need(values, "intermediate_size"),
        num_hidden_layers=need(values, "num_hidden_layers"),
        num_attention_heads=heads,
        max_position_embeddings=default(values, "max_position_embeddings", 2048),
        layer_norm_eps=default(values, "layer_norm_eps", 1e-5),
        hidden_act=_activation(values, "hidden_act", "gelu"),
        rotary_dim=_rotary_dim(values, hidden_size // heads),
        rope_theta=default(values, "rotary_emb_base", default(values, "rope_theta", 10000.0)),
        parallel_residual=bool(default(values, "use_parallel_residual", True)),
        tie_word_embeddings=bool(default(values, "tie_word_embeddings", False)),
    )


def _activation(values: Mapping[str, Any], key: str, otherwise: str) -> str:
    name = default(values, key, otherwise)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"config.json: {key}={name!r} is not supported; allowed: {tuple(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rotary_dim(values: Mapping[str, Any], head_dim: int) -> int:
    share = default(values, "rotary_pct", default(values, "partial_rotary_factor", 0.25))
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ModelFormatError(f"config.json: rotary_pct must be above 0 and at most 1, not {share!r}")
    return int(head_dim * share)
