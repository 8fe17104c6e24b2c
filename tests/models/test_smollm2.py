"""The demo model against tokens that another implementation made."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import models


@pytest.fixture(scope="module")
def loaded(smollm2_gguf):
    return models.load(smollm2_gguf)


@pytest.fixture(scope="module")
def forward(loaded):
    graphdef, state = nnx.split(loaded.module)
    jitted = jax.jit(lambda state, tokens, positions: nnx.merge(graphdef, state)(tokens, positions))
    return lambda tokens, positions: jitted(state, tokens, positions)


@pytest.mark.parametrize(("shortest", "longest"), [(0, 96), (97, 544), (545, 2080)])
def test_greedy_tokens_equal_the_reference(forward, smollm2_golden, shortest, longest):
    lengths = {row["id"]: len(row["prompt_ids"]) + len(row["greedy_ids"]) for row in smollm2_golden}
    rows = [row for row in smollm2_golden if shortest <= lengths[row["id"]] <= longest]
    assert rows
    tokens = np.zeros((len(rows), longest), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : lengths[row["id"]]] = row["prompt_ids"] + row["greedy_ids"]
    logits = np.asarray(forward(tokens, np.tile(np.arange(longest, dtype=np.int32), (len(rows), 1))))
    for index, row in enumerate(rows):
        steps = logits[index, len(row["prompt_ids"]) - 1 : lengths[row["id"]] - 1]
        sure = np.asarray(row["top2_gap"]) >= 0.001
        np.testing.assert_array_equal(steps.argmax(-1)[sure], np.asarray(row["greedy_ids"])[sure], err_msg=row["id"])
        second, first = np.partition(steps, -2, axis=-1)[:, -2:].T
        np.testing.assert_allclose(first - second, row["top2_gap"], atol=3e-4)


def test_prompts_encode_as_the_reference(loaded, smollm2_golden):
    prompts = [row for row in smollm2_golden if "prompt" in row]
    assert prompts
    for row in prompts:
        assert loaded.tokenizer.encode(row["prompt"]) == row["prompt_ids"]
        assert loaded.tokenizer.decode(row["prompt_ids"]) == row["prompt"]


def test_messages_encode_as_the_reference(loaded, smollm2_golden):
    chats = [row for row in smollm2_golden if "messages" in row]
    assert chats
    for row in chats:
        text = loaded.tokenizer.apply_chat_template(row["messages"])
        assert loaded.tokenizer.encode(text, add_special_tokens=False) == row["prompt_ids"]


def test_facts_of_the_file(loaded):
    assert loaded.config.rms_norm_eps == pytest.approx(1e-5)  # stored as f32
    assert dataclasses.replace(loaded.config, rms_norm_eps=1e-5) == models.SHAPES["smollm2-135m"]
    assert loaded.eos_token_ids == (2,)
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size == 49152
    assert "30 layers" in repr(loaded) and "float32" in repr(loaded)
