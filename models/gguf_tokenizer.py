"""A Tokenizer from GGUF metadata: byte-level BPE with its pre-tokenizer, or SentencePiece BPE from its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from models.errors import ModelFormatError, UnsupportedModelError
from models.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type: written out in text, they are taken whole
_SPACE = "\u2581"

# The patterns are the ones that the models' own tokenizer.json files carry.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.replace("DIGITS", r"\p{N}{1,3}")
_QWEN2 = _WORDS.replace("DIGITS", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS, _GPT2 = "digits", "gpt2"
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = (_LLAMA3, _TEKKEN)  # a word that is in the vocabulary is one token, whatever the merges say


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Raises UnsupportedModelError naming a tokenizer or pre-tokenizer that is not built, ModelFormatError naming a
    missing or impossible key.
    """
    kind = _need(metadata, "tokenizer.ggml.model")
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(metadata), True
    else:
        raise UnsupportedModelError(f"tokenizer.ggml.model {kind!r} is not supported; allowed: ('gpt2', 'llama')")
    backend.add_tokens(_added_tokens(metadata))
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise UnsupportedModelError("tokenizer.ggml.add_eos_token=True is not supported: it would end every prompt")
    bos = None
    if "tokenizer.ggml.bos_token_id" in metadata:
        bos = _token_id(metadata, "tokenizer.ggml.bos_token_id")
        if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
            start = processors.TemplateProcessing(single="BOS $A", pair=None, special_tokens=[("BOS", bos)])
            backend.post_processor = start
    return Tokenizer(
        backend=backend,
        chat_template=_template(metadata),
        bos_token_id=bos,
        eos_token_ids=_eos_token_ids(metadata),
    )


def _template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFormatError(f"tokenizer.chat_template must be text, not {str(template)[:80]}")
    return template


def _byte_level(metadata: Mapping[str, Any]) -> tuple[Backend, bool]:
    name = _need(metadata, "tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(f"tokenizer.ggml.pre {name!r} is not supported; allowed: {tuple(_PRE_TOKENIZERS)}")
    pattern = _PRE_TOKENIZERS[name]
    merges = [_pair(merge) for merge in _list(metadata, "tokenizer.ggml.merges", str)]
    vocabulary = _vocabulary(metadata)
    _check_merges(merges, vocabulary)
    backend = Backend(BPE(vocabulary, merges, ignore_merges=pattern in _WHOLE_WORDS_FIRST))
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    backend.decoder = decoders.ByteLevel()
    if pattern is _QWEN2:
        backend.normalizer = normalizers.NFC()
    return backend, pattern is _LLAMA3


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern is _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is _DIGITS:
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is _DIGITS)
    return pre_tokenizers.Sequence([first, words])


def _sentencepiece(metadata: Mapping[str, Any]) -> Backend:
    """SentencePiece merges the neighbours whose union scores best: BPE with merges in the order of the scores."""
    vocabulary = _vocabulary(metadata)
    scores = _list(metadata, "tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary):
        raise ModelFormatError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary)} tokens")
    unknown = _tokens(metadata)[_token_id(metadata, "tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_by_score(_types(metadata), vocabulary, scores)
    backend = Backend(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    pieces: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        pieces.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(pieces)
    return backend


def _merges_by_score(types: list[int], vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        if types[index] != _NORMAL:  # control, unknown and byte tokens come from no merge
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _added_tokens(metadata: Mapping[str, Any]) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(_tokens(metadata), _types(metadata), strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = _tokens(metadata)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ModelFormatError(f"tokenizer.ggml.tokens has {twice!r} twice")
    return vocabulary


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    return _list(metadata, "tokenizer.ggml.tokens", str)


def _types(metadata: Mapping[str, Any]) -> list[int]:
    tokens = _tokens(metadata)
    if "tokenizer.ggml.token_type" not in metadata:
        return [_NORMAL] * len(tokens)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ModelFormatError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    return types


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelFormatError(f"tokenizer.ggml.merges has the entry {merge!r}, not two tokens with a space between")
    return left, right


def _check_merges(merges: list[tuple[str, str]], vocabulary: Mapping[str, int]) -> None:
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ModelFormatError(f"tokenizer.ggml.merges joins {left!r} and {right!r}, but {token!r} is no token")


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, of turn and of message: each ends a completion."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(_token_id(metadata, key) for key in keys if key in metadata))


def _token_id(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value, count = metadata.get(key, default), len(_tokens(metadata))
    if not isinstance(value, int) or not 0 <= value < count:
        raise ModelFormatError(f"{key} must be a token id in 0..{count - 1}, not {value!r}")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = _need(metadata, key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ModelFormatError(f"{key} must be an array of {kind.__name__}, not {str(values)[:80]}")
    return values


def _need(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ModelFormatError(f"the key {key!r} is missing")
    return metadata[key]
