"""What loading gives."""

from __future__ import annotations

from dataclasses import dataclass

from models.families import LanguageModel, ModelConfig
from models.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, repr=False)
class LoadedModel:
    """A model ready to run: `module(tokens [B, T] int32, positions [B, T] int32) -> logits f32 [B, T, vocab]`.

    tokenizer: None for random weights. eos_token_ids: what ends a generated text.
    fingerprint: identity of the files that the weights came from.
    """

    name: str
    module: LanguageModel
    config: ModelConfig
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    fingerprint: str

    def __repr__(self) -> str:
        config = self.config
        return (
            f"LoadedModel({self.name!r}: {config.model_type}, {config.num_hidden_layers} layers, "
            f"hidden {config.hidden_size}, vocab {config.vocab_size}, {self.module.embedding[...].dtype}, "
            f"{'with' if self.tokenizer else 'without'} tokenizer, {self.fingerprint[:12]})"
        )
