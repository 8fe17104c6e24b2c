"""The shape of a Llama-family decoder, in Hugging Face's field names."""

from __future__ import annotations

from dataclasses import dataclass

from models.checks import CEILINGS, MAX_POSITIONS, check_choice, check_int, check_positive, check_rope_base
from models.errors import ModelFormatError, UnsupportedModelError
from models.rope import RopeScaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LAYER_TYPES = ("full_attention", "sliding_attention")


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
        check_choice("model_type", self.model_type, MODEL_TYPES)
        for name, ceiling in CEILINGS.items():
            check_int(name, getattr(self, name), ceiling)
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_rope_base("rope_theta", self.rope_theta)
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, MAX_POSITIONS)
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
