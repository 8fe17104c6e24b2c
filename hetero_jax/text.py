"""Token by token to text: bytes split over tokens, stop strings, and the reasons to end."""

from __future__ import annotations

from collections.abc import Sequence

import models
from hetero_jax.errors import RequestError
from hetero_jax.outputs import FinishReason
from hetero_jax.sampling_params import SamplingParams

_LONGEST_WAIT = 16  # tokens without text; bounds the window that is decoded per token


class TextStream:
    """Text of one sample and whether it has ended.

    Decodes a short window of tokens at a time, from the last place where the text was whole (the prefix/read offsets
    of Hugging Face's text-generation-inference and of vLLM), so that a token costs the same however long the text is.

    Raises:
      RequestError: stop strings without a tokenizer.
    """

    def __init__(
        self, tokenizer: models.Tokenizer | None, params: SamplingParams, eos_token_ids: Sequence[int]
    ) -> None:
        if params.stop and tokenizer is None:
            raise RequestError(f"stop={list(params.stop)}: the model has no tokenizer; allowed: no stop strings")
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._tokenizer, self._params = tokenizer, params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._tokens: list[int] = []
        self._prefix = 0  # where the decoded window begins
        self._read = 0  # tokens before this one are in the text

    def push(self, token: int) -> bool:
        """Add a generated token; True if the sample has ended."""
        self._tokens.append(token)
        count = len(self._tokens)
        # As vLLM: end tokens cannot be drawn before, and stop strings are not looked for in, the first min_tokens.
        may_stop, is_last = count > self._params.min_tokens, count == self._params.max_tokens
        is_end = may_stop and (token in self._eos or token in self._params.stop_token_ids)
        if is_end:
            self._tokens.pop()  # the token that ends it is not text
        before = self._decode(whole=is_end or is_last)
        if may_stop:
            self._look_for_stop_string(before)
        if self.finish_reason is None and is_end:
            self.finish_reason, self.stop_reason = "stop", None if token in self._eos else token
        elif self.finish_reason is None and is_last:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def _decode(self, *, whole: bool) -> int:
        """Append what the new tokens add to the text (`whole`: also half a character); returns its length before."""
        before = len(self.text)
        if self._tokenizer is None or self._read == len(self._tokens):
            return before
        known = self._tokenizer.decode(self._tokens[self._prefix : self._read])
        now = self._tokenizer.decode(self._tokens[self._prefix :])
        read = len(self._tokens)
        # A replacement character at the end may be the first bytes of one that the next token completes. Tokens without
        # text (special ones) wait for the next: alone they would be no context for its leading space.
        if not whole and (now.endswith("\ufffd") or len(now) <= len(known)):
            if read - self._read <= _LONGEST_WAIT:
                return before
            # Bytes that are no text at all. A character has up to 4, so what was 4 tokens ago is decided.
            read -= 4
            now, later = self._tokenizer.decode(self._tokens[self._prefix : read]), now
            if not later.startswith(now):
                return before
        self.text += now[len(known) :]
        self._prefix, self._read = self._read, read
        return before

    def _look_for_stop_string(self, before: int) -> None:
        """Cut the text at the stop string that begins first, if one was completed by what came after `before`."""
        places = [(self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._params.stop]
        found = [place for place in places if place[0] >= 0]
        if found:
            start, stop = min(found)
            self.text = self.text[:start]
            self.finish_reason, self.stop_reason = "stop", stop
