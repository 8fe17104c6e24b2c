from __future__ import annotations

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import models
from model_files import FAMILIES, gguf_metadata, gguf_tensors, random_tensors, tiny_config, write_gguf
from models.gguf_file import GgufFile
from numpy_decoder import reference_logits

TOKENS = np.random.default_rng(3).integers(0, 260, 12)
CONFIG = FAMILIES["llama3"]
# every kind that the gguf package can also write, and how far its rounding moves a weight
KINDS = ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


def logits_of(module):
    return np.asarray(module(jnp.asarray(TOKENS)[None], jnp.arange(len(TOKENS))[None]))[0]


def plain_frequencies(config):
    return config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)


def parts(config=CONFIG):
    return gguf_metadata(config), gguf_tensors(config, random_tensors(config))


@pytest.mark.parametrize("family", ["llama2", "smollm2", "mistral", "qwen2", "qwen3"])
def test_a_file_gives_the_model_that_was_written(tmp_path, family):
    config = FAMILIES[family]
    loaded = models.load(write_gguf(tmp_path / "m.gguf", *parts(config)))
    expected = reference_logits(config, random_tensors(config), TOKENS, plain_frequencies(config))
    np.testing.assert_allclose(logits_of(loaded.module), expected, atol=3e-5)
    assert (loaded.config.sliding_window, loaded.config.tie_word_embeddings, loaded.eos_token_ids) == (
        config.sliding_window,
        config.tie_word_embeddings,
        (259,),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_tensors_are_decoded(tmp_path, kind):
    metadata, tensors = parts()
    loaded = models.load(write_gguf(tmp_path / "m.gguf", metadata, tensors, gguf.GGMLQuantizationType[kind]))
    exact = reference_logits(CONFIG, random_tensors(CONFIG), TOKENS, plain_frequencies(CONFIG))
    error = np.abs(logits_of(loaded.module) - exact).mean() / exact.std()
    assert error < {"F16": 0.002, "BF16": 0.01, "Q8_0": 0.02}.get(kind, 0.25)


def test_every_kind_of_block_that_the_package_decodes_is_read(tmp_path):
    # a Q6_K block by hand: scale 0.5, group scales 2, all six-bit codes 33 -> 0.5 * 2 * (33 - 32) = 1
    low, high, scales = bytes([0x11] * 128), bytes([0b10101010] * 64), bytes([2] * 16)
    block = np.frombuffer(low + high + scales + np.float16(0.5).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.tile(block, (3, 1)), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(GgufFile(tmp_path / "m.gguf").tensor("x"), np.ones((3, 256), np.float32))


def test_rope_factors_are_the_llama3_rule(tmp_path):
    metadata, tensors = parts()
    plain = plain_frequencies(CONFIG)
    factors = np.linspace(1, 8, 16).astype(np.float32)
    loaded = models.load(write_gguf(tmp_path / "m.gguf", metadata, {**tensors, "rope_freqs.weight": factors}))
    expected = reference_logits(CONFIG, random_tensors(CONFIG), TOKENS, plain / factors)
    np.testing.assert_allclose(logits_of(loaded.module), expected, atol=3e-5)


def test_linear_and_yarn_scaling_are_read_from_metadata(tmp_path):
    metadata, tensors = parts()
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    loaded = models.load(write_gguf(tmp_path / "linear.gguf", metadata | linear, tensors))
    assert loaded.config.rope_scaling == models.RopeScaling(rope_type="linear", factor=4.0)
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.rope.scaling.attn_factor": 2.0,
    }
    scaling = models.load(write_gguf(tmp_path / "yarn.gguf", metadata | yarn, tensors)).config.rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 32
    assert scaling.attention_factor == pytest.approx(2 * (0.1 * np.log(4) + 1))


REFUSED = {
    "general.architecture": "mamba",
    "llama.rope.scaling.type": "longrope",
    "llama.rope.dimension_count": 16,
    "llama.attention.value_length": 16,
    "split.count": 2,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_built_is_refused_by_name(tmp_path, key):
    metadata, tensors = parts()
    path = write_gguf(tmp_path / "m.gguf", {**metadata, key: REFUSED[key]}, tensors)
    with pytest.raises(models.UnsupportedModelError, match=f"(?s){key}.*{REFUSED[key]}"):
        models.load(path)


@pytest.mark.parametrize(
    "key", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens"]
)
def test_a_missing_key_is_named(tmp_path, key):
    metadata, tensors = parts()
    del metadata[key]
    with pytest.raises(models.ModelFormatError, match=key):
        models.load(write_gguf(tmp_path / "m.gguf", metadata, tensors))


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    metadata, tensors = parts()
    some = "blk.1.ffn_up.weight"
    without = {name: value for name, value in tensors.items() if name != some}
    with pytest.raises(models.ModelFormatError, match=rf"{some}' of shape \(96, 64\) is missing"):
        models.load(write_gguf(tmp_path / "a.gguf", metadata, without))
    with pytest.raises(models.UnsupportedModelError, match=r"blk\.0\.attn_q\.bias"):
        models.load(write_gguf(tmp_path / "b.gguf", metadata, {**tensors, "blk.0.attn_q.bias": np.ones(128, "f4")}))
    with pytest.raises(models.ModelFormatError, match=rf"{some}' has shape \(96, 32\), the config needs \(96, 64\)"):
        models.load(write_gguf(tmp_path / "c.gguf", metadata, {**tensors, some: tensors[some][:, :32]}))


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    metadata, tensors = parts()
    with pytest.raises(models.ModelFormatError, match=r"num_hidden_layers must be an integer in 1\.\.1024"):
        models.load(write_gguf(tmp_path / "m.gguf", {**metadata, "llama.block_count": 1 << 31}, tensors))


def test_a_claimed_length_beyond_the_file_is_refused_at_its_key(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", *parts())
    data = bytearray(path.read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(models.ModelFormatError, match=r"tokenizer\.ggml\.token_type.*needs bytes"):
        GgufFile(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", *parts())
    data = path.read_bytes()
    last = max(info.offset_bytes + info.size_bytes for info in GgufFile(path).tensors.values())
    for length in [0, 3, 23, 24, *range(100, last, last // 60), last - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(models.ModelFormatError, match=r"too short|file ends at|more than the file holds"):
            models.load(path)


def test_the_tensor_at_which_a_file_breaks_off_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", *parts())
    info = GgufFile(path).tensors["blk.1.attn_k.weight"]
    path.write_bytes(path.read_bytes()[: info.offset_bytes + 1000])
    with pytest.raises(models.ModelFormatError, match=r"blk\.1\.attn_k\.weight' of shape \(64, 64\) \(F32\)"):
        GgufFile(path)


def test_damaged_headers_never_end_in_anything_but_a_model_error(tmp_path):
    metadata, tensors = parts()
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    data = path.read_bytes()
    header = min(info.offset_bytes for info in GgufFile(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data[:header])
        for at in rng.integers(0, header, 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged) + data[header:])
        try:
            file = GgufFile(path)
            models.gguf_config.config_from_gguf(file)
            models.gguf_tokenizer.tokenizer_from_gguf(file.metadata)
        except models.ModelError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 1.5, "x", [1], True, float("nan")], ids=repr)
def test_values_of_the_wrong_kind_end_in_a_model_error(tmp_path, value):
    metadata, tensors = parts()
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 2.0, "yarn_beta_fast": 32.0}
    metadata |= {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    for key in metadata:
        file = GgufFile(path)
        file.metadata = {**metadata, key: value}
        try:
            models.gguf_config.config_from_gguf(file)
            models.gguf_tokenizer.tokenizer_from_gguf(file.metadata)
        except models.ModelError:
            continue
        assert not isinstance(value, str) or "llama." not in key, key


def test_other_files_are_not_taken_for_gguf(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(models.ModelFormatError, match="starts with"):
        models.load(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    with pytest.raises(models.UnsupportedModelError, match="version 0x1"):
        models.load(path)
    with pytest.raises(models.ModelNotFoundError):
        models.load(tmp_path / "nothing.gguf")


def test_tied_is_what_has_no_head(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    assert models.load(write_gguf(tmp_path / "m.gguf", *parts(config))).module.head is None
    assert models.load(write_gguf(tmp_path / "n.gguf", *parts())).module.head is not None
