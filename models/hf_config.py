"""DecoderConfig from a Hugging Face config.json; whatever would change the arithmetic and is not built is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import MAX_LAYERS, MODEL_TYPES, DecoderConfig
from models.errors import ModelFormatError, UnsupportedModelError
from models.rope import ROPE_TYPES, RopeScaling

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

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
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768}
_MISTRAL_WINDOW = 4096  # Hugging Face's default where the key is absent; an explicit null means no window
_SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads the dict of a config.json.

    Raises UnsupportedModelError naming an architecture or option that is not built, ModelFormatError naming a
    missing or impossible key.
    """
    model_type = _model_type(values)
    _refuse_options(values)
    theta, scaling = _rope(values)
    heads, layers = _count(values, "num_attention_heads"), _count(values, "num_hidden_layers")
    window, layer_types = _sliding(values, model_type, layers)
    hidden_size = _count(values, "hidden_size")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=_need(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_need(values, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_default(values, "num_key_value_heads", heads),
        head_dim=_default(values, "head_dim", _head_dim(model_type, hidden_size, heads)),
        max_position_embeddings=_default(values, "max_position_embeddings", _DEFAULT_CONTEXT[model_type]),
        rms_norm_eps=_default(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        layer_types=layer_types,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=bool(_default(values, "tie_word_embeddings", False)),
    )


def _model_type(values: Mapping[str, Any]) -> str:
    model_type = _need(values, "model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is not supported; allowed: {MODEL_TYPES}")
    architectures = _default(values, "architectures", [])
    if not isinstance(architectures, list):
        raise ModelFormatError(f"config.json: architectures must be a list, not {architectures!r}")
    for name in architectures:
        if name not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"config.json: architecture {name!r} is not supported; allowed: {_ARCHITECTURES}"
            )
    return model_type


def _refuse_options(values: Mapping[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        value = values.get(key)
        if value is not None and value not in neutral:
            raise UnsupportedModelError(f"config.json: {key}={value!r} is not supported; allowed: {(None, *neutral)}")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelFormatError(f"config.json: rope_scaling must be an object, not {rope!r}")
    theta = _default(rope, "rope_theta", _default(values, "rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in _SCALING_FIELDS:
        allowed = ("default", *(t for t in ROPE_TYPES if t in _SCALING_FIELDS))
        raise UnsupportedModelError(
            f"config.json: rope_scaling type {rope_type!r} is not supported; allowed: {allowed}"
        )
    return theta, _scaling(values, rope, rope_type)


def _scaling(values: Mapping[str, Any], rope: Mapping[str, Any], rope_type: str) -> RopeScaling:
    known = {*_SCALING_FIELDS[rope_type], "rope_type", "type", "rope_theta"}
    if rope_type == "linear":  # written by some converters, without effect on the linear rule
        known.add("original_max_position_embeddings")
    unknown = [key for key, value in rope.items() if key not in known and value is not None]
    if unknown:
        raise UnsupportedModelError(
            f"config.json: rope_scaling key {unknown[0]!r} is not supported for type {rope_type!r}; "
            f"allowed: {_SCALING_FIELDS[rope_type]}"
        )
    fields = {key: rope[key] for key in _SCALING_FIELDS[rope_type] if rope.get(key) is not None}
    context = _default(values, "max_position_embeddings", None)
    if rope_type == "yarn":
        fields.setdefault("original_max_position_embeddings", context)
        if "factor" not in fields and context is not None:
            fields["factor"] = _ratio(context, fields["original_max_position_embeddings"])
    for key in _SCALING_FIELDS[rope_type][: 4 if rope_type == "llama3" else 1]:
        if key not in fields:
            raise ModelFormatError(f"config.json: rope_scaling type {rope_type!r} needs the key {key!r}")
    try:
        return RopeScaling(rope_type=rope_type, **fields)
    except TypeError as error:
        raise ModelFormatError(f"config.json: rope_scaling {dict(rope)!r}: {error}") from error


def _ratio(context: Any, original: Any) -> float:
    for value in (context, original):
        if not isinstance(value, int | float) or value <= 0:
            raise ModelFormatError(f"config.json: max_position_embeddings must be a positive integer, not {value!r}")
    return context / original


def _sliding(values: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """The window and, where only some layers slide, the kind of each layer."""
    window = values.get("sliding_window", _MISTRAL_WINDOW if model_type == "mistral" else None)
    if model_type == "llama" or (model_type != "mistral" and not values.get("use_sliding_window")):
        return None, None
    if window is None:
        return None, None
    if values.get("layer_types") is not None:
        if not isinstance(values["layer_types"], list):
            raise ModelFormatError(f"config.json: layer_types must be a list, not {values['layer_types']!r}")
        return window, tuple(values["layer_types"])
    if model_type == "mistral":
        return window, None
    if layers > MAX_LAYERS:  # checked before a list of that length is made
        raise ModelFormatError(f"config.json: num_hidden_layers must be in 1..{MAX_LAYERS}, not {layers}")
    first = min(_count({"max_window_layers": 28, **values}, "max_window_layers"), layers)  # from here on they slide
    return window, ("full_attention",) * first + ("sliding_attention",) * (layers - first)


def _head_dim(model_type: str, hidden_size: int, heads: int) -> int:
    if model_type == "qwen3":
        return 128  # Hugging Face's default, which does not follow from the hidden size
    return hidden_size // heads


def _need(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise ModelFormatError(f"config.json: the key {key!r} is missing")
    return values[key]


def _count(values: Mapping[str, Any], key: str) -> int:
    value = _need(values, key)
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < 0
        or (value == 0 and key != "max_window_layers")
    ):
        raise ModelFormatError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _default(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value
