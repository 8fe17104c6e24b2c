from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models as kinds
from tokenizers import pre_tokenizers

import models
from model_files import byte_tokenizer
from models.gguf_tokenizer import tokenizer_from_gguf
from models.hf_tokenizer import load_hf_tokenizer

HELLO = [{"role": "user", "content": "hi"}]


def pieces(pre: str, text: str) -> list[str]:
    """How a byte-level GGUF tokenizer with this `pre` cuts text into words."""
    backend = tokenizer_from_gguf({**byte_tokenizer(), "tokenizer.ggml.pre": pre}).backend
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        # the older pattern leaves the last line break to the next word, the newer ones bind them to the comma
        ("gpt-2", ["I", "'m", " 12345", " HE", "'", "S", " a", ",", "\n", "\n", "b"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " HE", "'", "S", " a", ",", "\n", "\n", "b"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " HE", "'S", " a", ",\n\n", "b"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " HE", "'S", " a", ",\n\n", "b"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", " HE", "'S", " a", ",\n\n", "b"]),
    ],
)
def test_words_are_cut_as_the_family_cuts_them(pre, words):
    assert pieces(pre, "I'm 12345 HE'S a,\n\nb") == words


def test_every_byte_survives_the_round_trip():
    tokenizer = tokenizer_from_gguf(byte_tokenizer())
    text = "the thé 東京 \U0001f600\tx\r\n  y\0z"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == 257  # t h -> th, th e -> the


def test_special_tokens_in_text_become_one_id_and_can_be_hidden():
    tokenizer = tokenizer_from_gguf(byte_tokenizer())
    ids = tokenizer.encode("<|start|>the<|end|>", add_special_tokens=False)
    assert ids == [258, 257, 259]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>the<|end|>"
    assert tokenizer.decode([257, 100000]) == "the"


@pytest.mark.parametrize(("pre", "flag", "starts"), [("smollm", None, False), ("llama-bpe", None, True)])
def test_the_start_token_follows_flag_and_family(pre, flag, starts):
    tokenizer = tokenizer_from_gguf({**byte_tokenizer(), "tokenizer.ggml.pre": pre})
    assert (tokenizer.encode("the") == [258, 257]) == starts
    assert tokenizer.encode("the", add_special_tokens=False) == [257]
    flipped = {**byte_tokenizer(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": not starts}
    assert (tokenizer_from_gguf(flipped).encode("the") == [258, 257]) != starts


def test_llama3_takes_whole_words_before_merges():
    # "xyz" is a token that no merge leads to
    tokens = [*byte_tokenizer()["tokenizer.ggml.tokens"], "xyz"]
    metadata = byte_tokenizer() | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 261}
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).encode("xyz") == [260]
    assert len(tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": "smollm"}).encode("xyz")) == 3


SPM_WORDS = {"\u2581": -9.0, "a": -10.0, "b": -10.5, "c": -11.0, "ab": -3.0, "bc": -2.0, "abc": -8.0, "\u2581a": -4.0}


def sentencepiece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_WORDS]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SPM_WORDS),
        "tokenizer.ggml.scores": [0.0] * 259 + list(SPM_WORDS.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def best_neighbours_first(text: str) -> list[str]:
    """SentencePiece's rule by itself: join the neighbours whose union scores best, leftmost first."""
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = enumerate(itertools.pairwise(parts))
        joins = [(SPM_WORDS[a + b], -i) for i, (a, b) in pairs if a + b in SPM_WORDS]
        if not joins:
            return parts
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("text", ["abc", "ab abc", "aab", "bca cab", "abbcc  a"])
def test_sentencepiece_joins_the_best_scored_neighbours(text):
    tokenizer = tokenizer_from_gguf(sentencepiece())
    ids = tokenizer.encode(text)
    assert [sentencepiece()["tokenizer.ggml.tokens"][i] for i in ids] == ["<s>", *best_neighbours_first(text)]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_falls_back_on_bytes():
    tokenizer = tokenizer_from_gguf(sentencepiece())
    ids = tokenizer.encode("aé", add_special_tokens=False)
    assert ids[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == "aé"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"tokenizer.ggml.model": "bert"}, models.UnsupportedModelError, "'bert'"),
        ({"tokenizer.ggml.pre": "default"}, models.UnsupportedModelError, r"tokenizer\.ggml\.pre 'default'"),
        ({"tokenizer.ggml.add_eos_token": True}, models.UnsupportedModelError, "add_eos_token"),
        ({"tokenizer.ggml.merges": ["th"]}, models.ModelFormatError, "merges.*'th'"),
        ({"tokenizer.ggml.merges": ["q q"]}, models.ModelFormatError, "'qq' is no token"),
        ({"tokenizer.ggml.token_type": [1]}, models.ModelFormatError, "1 entries for 260"),
        ({"tokenizer.ggml.eos_token_id": 260}, models.ModelFormatError, r"eos_token_id.*0\.\.259"),
        (
            {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]},
            models.ModelFormatError,
            "'a' twice",
        ),
    ],
    ids=lambda item: str(item)[:40],
)
def test_what_cannot_be_built_is_named(changes, error, match):
    with pytest.raises(error, match=match):
        tokenizer_from_gguf({**byte_tokenizer(), **changes})


def test_end_of_turn_and_of_message_end_a_text_too():
    metadata = {**byte_tokenizer(), "tokenizer.ggml.eot_token_id": 258, "tokenizer.ggml.eom_token_id": 259}
    assert tokenizer_from_gguf(metadata).eos_token_ids == (259, 258)


def test_chat_text_is_what_the_template_says():
    tokenizer = tokenizer_from_gguf(byte_tokenizer())
    assert tokenizer.apply_chat_template(HELLO) == "<|start|>hi<|end|>"


def chat(template: str, **options) -> str:
    return tokenizer_from_gguf({**byte_tokenizer(), "tokenizer.chat_template": template}).apply_chat_template(
        HELLO, **options
    )


def test_templates_may_use_what_published_ones_use():
    blocks = "{% for m in messages %}\n    {% if m.role == 'user' %}\nU:{{ m.content }}\n    {% endif %}\n{% endfor %}"
    assert chat(blocks) == "U:hi\n"
    assert chat("{{ messages | tojson }}") == '[{"role": "user", "content": "hi"}]'
    assert chat("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert len(chat("{{ strftime_now('%Y') }}")) == 4
    prompt = "{% if add_generation_prompt %}A{% else %}B{% endif %}"
    assert (chat(prompt), chat(prompt, add_generation_prompt=False)) == ("A", "B")
    assert chat("{{ eos_token }}{{ tools is defined }}") == "<|end|>False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{{ nothing.at.all }}",
        "{% broken",
        "x" * ((1 << 20) + 1),
    ],
    ids=lambda text: text[:30],
)
def test_templates_that_fail_or_reach_out_are_chat_errors(template):
    with pytest.raises(models.ChatTemplateError, match="template"):
        chat(template)


def test_messages_are_not_changed_by_a_template():
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(models.ChatTemplateError):
        tokenizer_from_gguf(
            {**byte_tokenizer(), "tokenizer.chat_template": "{{ messages[0].update(content='x') }}"}
        ).apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_a_model_without_template_says_so():
    metadata = byte_tokenizer()
    del metadata["tokenizer.chat_template"]
    with pytest.raises(models.ChatTemplateError, match="no chat template"):
        tokenizer_from_gguf(metadata).apply_chat_template(HELLO)


@pytest.fixture
def hf_folder(tmp_path):
    backend = Backend(kinds.WordLevel({"a": 0, "b": 1, "</s>": 2, "<s>": 3, "<|eot|>": 4}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    backend.enable_padding(length=9)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_folder_gives_tokenizer_template_and_all_end_tokens(hf_folder):
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": "{{ bos_token }}T"}
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (hf_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    tokenizer = load_hf_tokenizer(hf_folder, {"eos_token_id": 0})
    assert tokenizer is not None
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((2, 4), 3)
    assert tokenizer.apply_chat_template(HELLO) == "<s>T"
    assert tokenizer.encode("a b a <|eot|>") == [0, 1, 0, 4]  # neither padded nor truncated
    settings["chat_template"] = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_hf_tokenizer(hf_folder, {}).apply_chat_template(HELLO) == "D"
    (hf_folder / "chat_template.jinja").write_text("J")
    assert load_hf_tokenizer(hf_folder, {}).apply_chat_template(HELLO) == "J"


def test_end_tokens_come_from_the_config_where_there_is_no_generation_config(hf_folder):
    assert load_hf_tokenizer(hf_folder, {"eos_token_id": 4}).eos_token_ids == (4,)
    with pytest.raises(models.ModelFormatError, match="eos_token_id"):
        load_hf_tokenizer(hf_folder, {"eos_token_id": "four"})


def test_unsound_tokenizer_files_are_named(hf_folder):
    (hf_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nothing"}))
    with pytest.raises(models.ModelFormatError, match="eos_token 'nothing'"):
        load_hf_tokenizer(hf_folder, {})
    (hf_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(models.ModelFormatError, match=r"tokenizer\.json"):
        load_hf_tokenizer(hf_folder, {})
    (hf_folder / "tokenizer.json").unlink()
    assert load_hf_tokenizer(hf_folder, {}) is None
    (hf_folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(models.UnsupportedModelError, match=r"tokenizer\.model"):
        load_hf_tokenizer(hf_folder, {})
