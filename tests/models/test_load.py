from __future__ import annotations

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from model_files import FAMILIES, gguf_metadata, gguf_tensors, hf_config, random_tensors, write_gguf, write_hf
from models.families import leaves_of

TOKENS = jnp.arange(9)[None]


def leaves(module):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module))]


@pytest.fixture
def gguf_path(tmp_path):
    config = FAMILIES["qwen2"]
    return write_gguf(tmp_path / "m.gguf", gguf_metadata(config), gguf_tensors(config, random_tensors(config)))


def test_random_weights_have_the_asked_shape_dtype_and_seed():
    a, b = models.load("random:tiny", dtype="bfloat16", seed=3), models.load("random:tiny", dtype="bfloat16", seed=3)
    c = models.load("random:tiny", dtype="bfloat16", seed=4)
    assert a.tokenizer is None and a.eos_token_ids == () and a.config == models.SHAPES["tiny"]
    assert {leaf.dtype for leaf in leaves(a.module)} == {np.dtype(jnp.bfloat16)}
    assert all(np.array_equal(x, y) for x, y in zip(leaves(a.module), leaves(b.module), strict=True))
    assert not np.array_equal(leaves(a.module)[0], leaves(c.module)[0])
    assert a.fingerprint == b.fingerprint != c.fingerprint
    logits = a.module(TOKENS, TOKENS)
    assert logits.shape == (1, 9, 256) and 0.3 < float(jnp.std(logits)) < 3


def test_public_shapes_have_as_many_weights_as_published():
    billions = {
        "llama-2-7b": 6.738,
        "llama-2-13b": 13.016,
        "llama-2-70b": 68.977,
        "llama-3-8b": 8.030,
        "llama-3-70b": 70.554,
        "llama-3.1-8b": 8.030,
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.213,
        "mistral-7b": 7.242,
        "qwen2-0.5b": 0.494,
        "qwen2-7b": 7.616,
        "qwen3-0.6b": 0.596,
        "qwen3-8b": 8.191,
        "qwen3-30b-a3b": 30.532,
        "mixtral-8x7b": 46.703,
        "gemma-2-2b": 2.614,
        "gemma-2-9b": 9.242,
        "gemma-3-1b": 1.000,
        "gpt2": 0.1244,
        "gpt2-xl": 1.558,
        "pythia-160m": 0.1623,
        "pythia-6.9b": 6.857,
        "smollm2-135m": 0.1345,
        "smollm2-360m": 0.3618,
        "smollm2-1.7b": 1.711,
    }
    assert set(billions) == {name for name in models.SHAPES if not name.startswith("tiny")}
    for name, expected in billions.items():
        leaves = leaves_of(models.SHAPES[name])
        total = sum(math.prod(shape) for leaf in leaves for shape in leaf.sources.values())
        assert total / 1e9 == pytest.approx(expected, rel=1e-3), name


def test_unknown_names_and_dtypes_are_refused_with_what_is_allowed():
    with pytest.raises(models.ModelNotFoundError, match=r"llama-9.*llama-3-8b"):
        models.load("random:llama-9")
    with pytest.raises(models.UnsupportedModelError, match=r"float16.*bfloat16"):
        models.load("random:tiny", dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_gives_the_saved_model_back(tmp_path, gguf_path, dtype):
    loaded = models.load(gguf_path, dtype=dtype)
    models.save(loaded, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=dtype)
    assert all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(leaves(loaded.module), leaves(again.module), strict=True)
    )
    assert (again.config, again.eos_token_ids) == (loaded.config, loaded.eos_token_ids)
    assert again.tokenizer.encode("the <|end|>é") == loaded.tokenizer.encode("the <|end|>é")
    messages = [{"role": "user", "content": "x"}]
    assert again.tokenizer.apply_chat_template(messages) == loaded.tokenizer.apply_chat_template(messages)
    np.testing.assert_array_equal(again.module(TOKENS, TOKENS), loaded.module(TOKENS, TOKENS))


def test_a_checkpoint_is_restored_in_another_dtype(tmp_path):
    loaded = models.load("random:tiny")
    models.save(loaded, tmp_path / "saved")
    narrow = models.load(tmp_path / "saved", dtype="bfloat16")
    assert narrow.tokenizer is None
    for wide, half in zip(leaves(loaded.module), leaves(narrow.module), strict=True):
        np.testing.assert_array_equal(wide.astype(jnp.bfloat16), half)


def test_saving_never_overwrites(tmp_path):
    loaded = models.load("random:tiny")
    (tmp_path / "x").write_text("mine")
    with pytest.raises(models.ModelExistsError):
        models.save(loaded, tmp_path)
    with pytest.raises(models.ModelExistsError):
        models.save(loaded, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_damaged_checkpoints_are_named(tmp_path):
    folder = tmp_path / "saved"
    models.save(models.load("random:tiny"), folder)
    header = json.loads((folder / "decoder.json").read_text())

    def load_with(**changes):
        (folder / "decoder.json").write_text(json.dumps({**header, **changes}))
        models.load(folder)

    with pytest.raises(models.ModelFormatError, match=r"embedding' has shape \(256, 64\).*\(300, 64\)"):
        load_with(config={**header["config"], "vocab_size": 300})
    with pytest.raises(models.ModelFormatError, match=r"blocks\.2\.[a-z_.]+' is missing"):
        load_with(config={**header["config"], "num_hidden_layers": 3})
    with pytest.raises(models.ModelFormatError, match=r"blocks\.1\.[a-z_.]+' is surplus"):
        load_with(config={**header["config"], "num_hidden_layers": 1})
    with pytest.raises(models.UnsupportedModelError, match="format 2"):
        load_with(format=2)
    with pytest.raises(models.ModelFormatError, match="eos_token_ids"):
        load_with(eos_token_ids="x")
    with pytest.raises(models.ModelFormatError, match="'config'"):
        load_with(config=None)
    (folder / "decoder.json").write_text(json.dumps(header))
    shutil.rmtree(folder / "weights")
    with pytest.raises(models.ModelFormatError, match="Orbax"):
        models.load(folder)


def test_a_checkpoint_with_lost_bytes_is_a_format_error(tmp_path):
    folder = tmp_path / "saved"
    models.save(models.load("random:tiny"), folder)
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(models.ModelFormatError, match="weights"):
        models.load(folder)


def test_fingerprints_follow_content_not_place(tmp_path, gguf_path):
    mark = models.fingerprint(gguf_path)
    assert models.load(gguf_path).fingerprint == mark
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(gguf_path, tmp_path / "elsewhere" / "m.gguf")
    assert models.fingerprint(moved) == mark
    data = bytearray(gguf_path.read_bytes())
    data[-1] ^= 1
    gguf_path.write_bytes(data)
    assert models.fingerprint(gguf_path) != mark
    folder = write_hf(tmp_path / "hf", hf_config(FAMILIES["qwen2"]), random_tensors(FAMILIES["qwen2"]))
    before = models.fingerprint(folder)
    (folder / "README.md").write_text("no part of the model")
    assert models.fingerprint(folder) == before
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert models.fingerprint(folder) != before


def test_large_files_are_sampled_from_end_to_end(tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(bytes(3 << 20))
    marks = {models.fingerprint(path)}
    for at in (0, (3 << 20) // 2, (3 << 20) - 1):  # a middle that is sampled, and both ends
        start = (((3 << 20) - 4096) * 31 // 63) if 0 < at < (3 << 20) - 1 else at
        data = bytearray(3 << 20)
        data[start] = 1
        path.write_bytes(data)
        marks.add(models.fingerprint(path))
    assert len(marks) == 4
