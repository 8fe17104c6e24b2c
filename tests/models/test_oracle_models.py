"""Architectures beyond plain Llama against logits of PyTorch's transformers, from safetensors and from GGUF."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import models
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
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt_neox_sequential"])
def test_a_gguf_file_gives_the_logits_of_pytorch(tmp_path, name):
    assert_gives_the_logits(models.load(write_oracle_gguf(name, tmp_path / "m.gguf")).module, name)
