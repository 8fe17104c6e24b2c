"""The shape of a GPT-2 or GPT-NeoX decoder, in Hugging Face's field names."""

from __future__ import annotations

from dataclasses import dataclass

from models.checks import CEILINGS, check_choice, check_int, check_positive, check_rope_base
from models.errors import ModelFormatError

MODEL_TYPES = ("gpt2", "gpt_neox")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """One causal decoder with layer norms and biases: what `models.gpt.GptDecoder` builds.

    `rotary_dim` is how many features of each head rotate; None means learned positions, added to the embedding.
    With `parallel_residual`, attention and MLP read the same residual stream.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_pytorch_tanh"
    rotary_dim: int | None = None
    rope_theta: float = 10000.0
    parallel_residual: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, MODEL_TYPES)
        for name in CEILINGS.keys() & self.__dataclass_fields__.keys():
            check_int(name, getattr(self, name), CEILINGS[name])
        check_positive("layer_norm_eps", self.layer_norm_eps)
        check_rope_base("rope_theta", self.rope_theta)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise ModelFormatError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.rotary_dim is not None:
            check_int("rotary_dim", self.rotary_dim, self.head_dim)
            if self.rotary_dim % 2:
                raise ModelFormatError(f"rotary_dim must be even, not {self.rotary_dim}")

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.num_attention_heads
