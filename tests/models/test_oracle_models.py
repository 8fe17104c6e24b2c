"""Architectures beyond plain Llama against logits of PyTorch's transformers, from safetensors and from GGUF."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.families import build
from models.gguf_config import config_from_gguf
from models.gguf_file import GgufFile
from models.hf_config import config_from_hf
from oracle_models import FOLDER, NAMES, oracle, write_oracle_gguf


def assert_gives_the_logits(module, name):
    tokens, expected = oracle(name)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = np.asarray(module(jnp.asarray(tokens), positions))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_logits_of_pytorch(name):
    assert_gives_the_logits(models.load(FOLDER / name).module, name)


# gpt_neox_sequential has the tanh form of gelu, which a GGUF file cannot say
IN_GGUF = [name for name in NAMES if name != "gpt_neox_sequential"]


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_gives_the_logits_of_pytorch(tmp_path, name):
    assert_gives_the_logits(models.load(write_oracle_gguf(name, tmp_path / "m.gguf")).module, name)


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 1.5, "x", [1], True, float("nan")], ids=repr)
@pytest.mark.parametrize("name", IN_GGUF)
def test_values_of_the_wrong_kind_end_in_a_model_error(tmp_path, name, value):
    file = GgufFile(write_oracle_gguf(name, tmp_path / "m.gguf"))
    metadata = file.metadata
    refused = 0
    for key in metadata:
        file.metadata = {**metadata, key: value}
        try:
            config_from_gguf(file)
        except models.ModelError:
            refused += 1
    assert refused >= 3


def test_an_option_that_is_not_built_is_refused_by_name():
    config = json.loads((FOLDER / "qwen3_moe" / "config.json").read_text())
    for key, value in {"decoder_sparse_step": 2, "mlp_only_layers": [0], "use_sliding_window": True}.items():
        with pytest.raises(models.UnsupportedModelError, match=key):
            config_from_hf({**config, key: value})
    config = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    for key, value in {"use_bidirectional_attention": True, "rope_parameters": {"full_attention": {}}}.items():
        with pytest.raises(models.UnsupportedModelError, match=key):
            config_from_hf({**config, key: value})


def test_a_qwen3moe_file_that_does_not_count_its_experts_is_refused_with_the_key(tmp_path):
    file = GgufFile(write_oracle_gguf("qwen3_moe", tmp_path / "m.gguf"))
    key = "qwen3moe.expert_count"
    whole = file.metadata
    file.metadata = {name: value for name, value in whole.items() if name != key}
    with pytest.raises(models.ModelFormatError, match=f"the key '{key}' is missing"):
        config_from_gguf(file)
    file.metadata = {**whole, key: 0}
    with pytest.raises(models.ModelFormatError, match=f"{key} must be a positive integer, not 0"):
        config_from_gguf(file)


def _tanh_form(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _exact_form(x):
    return x * 0.5 * (1 + np.array([math.erf(each / math.sqrt(2)) for each in x]))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", _exact_form),
        ("gelu_new", _tanh_form),
        ("gelu_fast", _tanh_form),
        ("gelu_pytorch_tanh", _tanh_form),
        (None, _exact_form),
    ],
)
def test_gelu_of_gpt_neox_is_the_form_that_its_config_names(name, formula):
    values = json.loads((FOLDER / "gpt_neox" / "config.json").read_text())
    values = {key: value for key, value in values.items() if key != "hidden_act"}
    config = config_from_hf(values if name is None else {**values, "hidden_act": name})
    mlp = build(config, rngs=nnx.Rngs(0), dtype=jnp.float32).blocks[0].mlp
    x = np.linspace(-4, 4, 201)
    np.testing.assert_allclose(mlp.activation(jnp.asarray(x, jnp.float32)), formula(x), atol=1e-6)
    assert np.abs(_exact_form(x) - _tanh_form(x)).max() > 1e-4
