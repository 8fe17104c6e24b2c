"""The shape of a Llama-like decoder (Llama, Mistral, Qwen, Gemma, and mixtures of experts), in Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass

from models.checks import CEILINGS, MAX_EXPERTS, MAX_POSITIONS, check_choice, check_int, check_positive, check_rope_base
from models.errors import ModelFormatError, UnsupportedModelError
from models.rope import RopeScaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "mixtral")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One causal decoder: what `models.decoder.Decoder` builds and what every loader must deliver.

    `qkv_bias` is Qwen2's bias on q, k and v; `qk_norm` is Qwen3's RMS norm of each query and key head.
    `layer_types` holds one of LAYER_TYPES per layer, or None: then all layers slide if `sliding_window` is set.
    `rope_local_base_freq`, where given, is the unscaled rope base of the layers that slide.
    Gemma's: `scale_embeddings` multiplies embeddings by sqrt(hidden_size); `norm_offset` is added to every norm's
    scale; `post_norms` norms what attention and MLP give before it is added; `query_pre_attn_scalar` replaces head_dim
    in the scale of the scores; the soft caps bound scores and logits by cap * tanh(x / cap).
    With `num_experts`, each MLP is that many of `intermediate_size`; a token passes the `num_experts_per_tok`
    likeliest, whose weights sum to one where `norm_topk_prob`.
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
    hidden_act: str = "silu"
    rope_local_base_freq: float | None = None
    scale_embeddings: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_experts: int | None = None
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, MODEL_TYPES)
        for name, ceiling in CEILINGS.items():
            check_int(name, getattr(self, name), ceiling)
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_rope_base("rope_theta", self.rope_theta)
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, MAX_POSITIONS)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.rope_local_base_freq is not None:
            check_rope_base("rope_local_base_freq", self.rope_local_base_freq)
        for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.num_experts is not None:
            check_int("num_experts", self.num_experts, MAX_EXPERTS)
            check_int("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)
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
