"""Incremental text equals the text of all tokens at once; what ends a sample, and with which reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax.errors import RequestError
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.text import TextStream


class ByteTokenizer:
    """Token n is byte n, the hardest case: every character beyond ASCII is several tokens."""

    def decode(self, ids, *, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")

    def encode(self, text):
        return list(text.encode())


EOS = 3


def _stream(**params) -> TextStream:
    return TextStream(ByteTokenizer(), SamplingParams(**{"max_tokens": 1000, **params}), (EOS,))


def _push(stream: TextStream, tokens) -> int:
    """Pushes until the stream ends; how many tokens it took."""
    for count, token in enumerate(tokens, start=1):
        if stream.push(token):
            return count
    return len(tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(exclude_characters=chr(EOS), exclude_categories=("Cs",)), min_size=1))
def test_text_of_single_tokens_is_the_text_of_all(text):
    tokens = ByteTokenizer().encode(text)
    stream = _stream(max_tokens=len(tokens))
    assert _push(stream, tokens) == len(tokens)
    assert stream.text == text
    assert stream.finish_reason == "length"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="abcé", max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_before_the_stop_string_that_is_completed_first(text, stops):
    stream = _stream(stop=tuple(stops))
    _push(stream, ByteTokenizer().encode(text))
    shortest = next((n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    if shortest is None:
        assert (stream.text, stream.finish_reason) == (text, None)
    else:
        expected = min((text[:shortest].find(stop), stop) for stop in stops if stop in text[:shortest])
        assert (stream.text, stream.stop_reason) == (text[: expected[0]], expected[1])
        assert stream.finish_reason == "stop"


def test_half_a_character_at_the_end_is_shown_as_the_replacement_character():
    stream = _stream(max_tokens=2)
    _push(stream, [ord("a"), "é".encode()[0]])
    assert stream.text == "a\ufffd"


def test_end_of_sequence_ends_it_and_is_not_text():
    stream = _stream()
    assert _push(stream, [ord("a"), EOS, ord("b")]) == 2
    assert (stream.text, stream.finish_reason, stream.stop_reason) == ("a", "stop", None)


def test_ignore_eos_goes_on():
    assert _push(_stream(ignore_eos=True), [EOS, ord("b")]) == 2


def test_stop_token_is_the_stop_reason():
    stream = _stream(stop_token_ids=(ord("b"),))
    assert _push(stream, b"abc") == 2
    assert (stream.text, stream.finish_reason, stream.stop_reason) == ("a", "stop", ord("b"))


def test_nothing_but_length_ends_a_sample_before_min_tokens():
    stream = _stream(min_tokens=3, stop=("a",))
    assert _push(stream, b"ab") == 2
    assert stream.finish_reason is None
    assert stream.push(ord("a"))
    assert stream.stop_reason == "a"


def test_without_a_tokenizer_there_is_no_text_and_no_stop_string():
    stream = TextStream(None, SamplingParams(max_tokens=2), ())
    assert _push(stream, [5, 6, 7]) == 2
    assert (stream.text, stream.finish_reason) == ("", "length")
    with pytest.raises(RequestError, match="no tokenizer"):
        TextStream(None, SamplingParams(stop=["x"]), ())
