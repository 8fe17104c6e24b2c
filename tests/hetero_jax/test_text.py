"""Incremental text equals the text of all tokens at once; what ends a sample, and with which reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from hetero_jax.errors import RequestError
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.text import TextStream
from model_files import byte_tokenizer


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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(b"a\x80\xbf\xc3\xe2\x82\xac\xf0\x9f\xff"), min_size=1, max_size=120))
def test_bytes_that_are_no_text_give_what_all_at_once_would(tokens):
    stream = _stream(max_tokens=len(tokens), ignore_eos=True)
    _push(stream, tokens)
    assert stream.text == ByteTokenizer().decode(tokens)


class Bpe:
    """Byte-level BPE whose tokens begin and end inside characters."""

    def __init__(self) -> None:
        alphabet = byte_tokenizer()["tokenizer.ggml.tokens"][:256]  # token n stands for byte n
        merges = [(alphabet[a], alphabet[b]) for a, b in (b"th", b"\xc3\xa9", b"\xa9t", b"\xf0\x9f", b"\x98a", b" t")]
        tokens = [*alphabet, *(a + b for a, b in merges)]
        self.backend = Tokenizer(BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
        self.backend.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        self.backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]

    def decode(self, ids, *, skip_special_tokens=True):
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


BPE_TOKENIZER = Bpe()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(alphabet="thé😀€ \n", min_size=1, max_size=40).map(lambda text: BPE_TOKENIZER.backend.encode(text).ids)
    | st.lists(st.sampled_from([*b"the \xc3\xa9\xf0\x9f\x98\x80", *range(256, 262)]), min_size=1, max_size=40)
)
def test_text_of_bpe_tokens_is_that_of_all_at_once(tokens):
    stream = TextStream(BPE_TOKENIZER, SamplingParams(max_tokens=len(tokens)), ())
    assert _push(stream, tokens) == len(tokens)
    assert stream.text == BPE_TOKENIZER.decode(tokens)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(alphabet="thé😀€ ", min_size=2, max_size=30), st.data())
def test_a_stop_string_over_bpe_tokens_cuts_the_text_before_it(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 4))]
    stream = TextStream(BPE_TOKENIZER, SamplingParams(max_tokens=1000, stop=stop), ())
    _push(stream, BPE_TOKENIZER.backend.encode(text).ids)
    assert (stream.text, stream.stop_reason) == (text[: text.index(stop)], stop)


class CountingTokenizer(ByteTokenizer):
    longest = 0

    def decode(self, ids, *, skip_special_tokens=True):
        self.longest = max(self.longest, len(ids))
        return super().decode(ids)


@pytest.mark.parametrize("token", [0xFF, 0xE2, 0x80])
def test_a_token_costs_the_same_however_long_the_text_and_whatever_it_is(token):
    tokenizer = CountingTokenizer()
    stream = TextStream(tokenizer, SamplingParams(max_tokens=None), ())
    _push(stream, [token] * 2000)
    assert tokenizer.longest < 50


class SpaceTokenizer:
    """Words that bring their space, which a text's first word loses, and an end token without text."""

    def __init__(self) -> None:
        self.backend = Tokenizer(WordLevel({"▁x": 0, "▁y": 1, "z": 2}, unk_token="z"))
        self.backend.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
        self.backend.add_special_tokens(["</s>"])

    def decode(self, ids, *, skip_special_tokens=True):
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=12))
def test_spaces_survive_special_tokens(tokens):
    tokenizer = SpaceTokenizer()
    stream = TextStream(tokenizer, SamplingParams(max_tokens=len(tokens), ignore_eos=True), (3,))
    _push(stream, tokens)
    assert stream.text == tokenizer.decode(tokens)


@pytest.mark.parametrize("max_tokens", [1, 9])
def test_a_stop_string_beside_half_a_character_is_found_at_the_end(max_tokens):
    class Words:
        def decode(self, ids, *, skip_special_tokens=True):
            return (b"END\xe2" * len(ids)).decode("utf-8", "replace")

    stream = TextStream(Words(), SamplingParams(stop=("END",), max_tokens=max_tokens), (EOS,))
    _push(stream, [7, EOS])
    assert (stream.text, stream.finish_reason, stream.stop_reason) == ("", "stop", "END")


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


def test_nothing_but_length_ends_a_sample_within_min_tokens():
    stream = _stream(min_tokens=3, stop=("a",))
    assert _push(stream, b"aaa") == 3
    assert stream.finish_reason is None
    assert stream.push(ord("a"))
    assert (stream.text, stream.stop_reason) == ("aaa", "a")
    assert _push(_stream(min_tokens=3, max_tokens=3, stop=("a",)), b"aaa") == 3


def test_a_stop_string_may_begin_within_min_tokens():
    stream = _stream(min_tokens=3, stop=("abcd",))
    assert _push(stream, b"xabcde") == 5
    assert (stream.text, stream.stop_reason) == ("x", "abcd")


def test_without_a_tokenizer_there_is_no_text_and_no_stop_string():
    stream = TextStream(None, SamplingParams(max_tokens=2), ())
    assert _push(stream, [5, 6, 7]) == 2
    assert (stream.text, stream.finish_reason) == ("", "length")
    with pytest.raises(RequestError, match="no tokenizer"):
        TextStream(None, SamplingParams(stop=["x"]), ())
