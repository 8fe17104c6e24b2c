"""Text to token ids and back, and messages to text: one immutable object per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from models.chat import render_chat
from models.errors import ChatTemplateError


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer that came with a model's weights.

    bos_token_id: what encoding puts first where the model wants it. eos_token_ids: what ends a generated text.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids; the start token that some
        models need is put first unless `add_special_tokens` is False."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary become nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text that the model was trained to see for these messages ({"role", "content"} each).

        Encode it with `add_special_tokens=False`: the template writes the start token itself.

        Raises:
          ChatTemplateError: the model has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template; pass a prompt instead of messages")
        special = {
            "bos_token": self._text(self.bos_token_id),
            "eos_token": self._text(next(iter(self.eos_token_ids), None)),
        }
        return render_chat(self.chat_template, messages, special, add_generation_prompt=add_generation_prompt)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included. The model's logits may be longer (padding)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def _text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""

    def __repr__(self) -> str:
        chat = "with" if self.chat_template else "without"
        return f"Tokenizer(vocab_size={self.vocab_size}, {chat} chat template, eos_token_ids={self.eos_token_ids})"
