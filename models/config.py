"""The shape of a Llama-family decoder, in Hugging Face's field names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import ModelFormatError, UnsupportedModelError
from models.rope import RopeScaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MAX_LAYERS = 1024
LAYER_TYPES = ("full_attention", "sliding_attention")

# A header is data from a stranger: each size has a ceiling far above any published model, so that no product of
# them is allocated before a tensor of that size was seen in the file.
_CEILINGS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "max_position_embeddings": 1 << 26,
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One causal decoder: what `models.decoder.Decoder` builds and what every loader must deliver.

    `qkv_bias` is Qwen2's bias on q, k and v; `qk_norm` is Qwen3's RMS norm of each query and key head.
    `layer_types` holds one of LAYER_TYPES per layer, or None: then all layers slide if `sliding_window` is set.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UnsupportedModelError(f"model_type {self.model_type!r} is not supported; allowed: {MODEL_TYPES}")
        for name, ceiling in _CEILINGS.items():
            _check_int(name, getattr(self, name), ceiling)
        for name in ("rms_norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        if self.rope_theta <= 1:  # the frequencies must fall
            raise ModelFormatError(f"rope_theta must be greater than 1, not {self.rope_theta!r}")
        if self.sliding_window is not None:
            _check_int("sliding_window", self.sliding_window, _CEILINGS["max_position_embeddings"])
        self._check_heads()
        self._check_layer_types()

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFormatError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ModelFormatError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        factors = self.rope_scaling.freq_factors if self.rope_scaling else None
        if factors is not None and len(factors) != self.head_dim // 2:
            raise ModelFormatError(f"rope freq_factors has {len(factors)} entries, head_dim needs {self.head_dim // 2}")

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise ModelFormatError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}"
            )
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise UnsupportedModelError(f"layer_types entry {kind!r} is not supported; allowed: {LAYER_TYPES}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ModelFormatError("layer_types asks for sliding_attention, but sliding_window is missing")

    def layer_window(self, layer: int) -> int | None:
        """How many last tokens, itself included, a token of this layer sees; None for all."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-safe values; `from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DecoderConfig:
        """The inverse of `to_dict`; unknown or missing names raise ModelFormatError."""
        values = dict(fields)
        try:
            if values.get("rope_scaling") is not None:
                scaling = dict(values["rope_scaling"])
                if scaling.get("freq_factors") is not None:
                    scaling["freq_factors"] = tuple(scaling["freq_factors"])
                values["rope_scaling"] = RopeScaling(**scaling)
            if values.get("layer_types") is not None:
                values["layer_types"] = tuple(values["layer_types"])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ModelFormatError(f"decoder config: {error}") from error


def _check_int(name: str, value: object, ceiling: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= ceiling:
        raise ModelFormatError(f"{name} must be an integer in 1..{ceiling}, not {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ModelFormatError(f"{name} must be a positive number, not {value!r}")
