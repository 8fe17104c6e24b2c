"""The golden tokens of SmolLM2 through the Flax Llama of another library, with the same weights, unmodified."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hetero_jax as hj
from golden import first_difference, golden_rows

MAX_ROWS = 256


def _angles(theta: float, num_positions: int, dim: int) -> jnp.ndarray:
    """[num_positions, 1, 2 * dim]: sines, then cosines, each half of `dim` twice."""
    angles = np.outer(np.arange(num_positions), theta ** (-np.arange(0, dim, 2) / dim))
    angles = np.concatenate([angles, angles], axis=-1)[:, None]
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)


def _llama(loaded, monkeypatch):
    """The Flax Llama of transformers as fn(params, tokens, positions), and the loaded model's weights in its tree."""
    transformers = importlib.import_module("transformers")
    library = importlib.import_module("transformers.models.llama.modeling_flax_llama")
    ours, weights = loaded.config, nnx.to_pure_dict(nnx.split(loaded.module)[1])
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_theta",
    )  # fmt: skip
    config = transformers.LlamaConfig(**{name: getattr(ours, name) for name in names}, max_position_embeddings=MAX_ROWS)
    # This library's table of angles is made for 10000 whatever `rope_theta` says; its model is used as it is.
    monkeypatch.setattr(library, "create_sinusoidal_positions", functools.partial(_angles, ours.rope_theta))
    module = library.FlaxLlamaForCausalLMModule(config)
    q_size, kv_size = ours.num_attention_heads * ours.head_dim, ours.num_key_value_heads * ours.head_dim

    def layer(block):
        q, k, v = np.split(np.asarray(block["attention"]["qkv"]), [q_size, q_size + kv_size], axis=1)
        gate, up = np.split(np.asarray(block["mlp"]["gate_up"]), 2, axis=1)
        kernels = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": block["attention"]["out"]}
        mlp = {"gate_proj": gate, "up_proj": up, "down_proj": block["mlp"]["down"]}
        return {
            "input_layernorm": {"weight": block["attention_norm"]["scale"]},
            "post_attention_layernorm": {"weight": block["mlp_norm"]["scale"]},
            "self_attn": {name: {"kernel": kernel} for name, kernel in kernels.items()},
            "mlp": {name: {"kernel": kernel} for name, kernel in mlp.items()},
        }

    blocks = weights["blocks"]
    params = {
        "model": {
            "embed_tokens": {"embedding": weights["embedding"]},
            "norm": {"weight": weights["norm"]["scale"]},
            "layers": {str(index): layer(blocks[index]) for index in range(ours.num_hidden_layers)},
        },
        "lm_head": {"kernel": weights["embedding"].T},
    }

    def fn(params, tokens, positions):
        return module.apply({"params": params}, tokens, jnp.ones_like(tokens), positions).logits

    return fn, params


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers not installed; pip install -e '.[zoo]' brings its models",
)
def test_greedy_tokens_equal_the_reference(smollm2_gguf, monkeypatch):
    loaded = hj.load(str(smollm2_gguf))
    fn, params = _llama(loaded, monkeypatch)
    engine = hj.Engine(
        hj.partition(fn, params, max_rows=MAX_ROWS),
        hj.EngineConfig(kv_cache_bytes=256 << 20),
        tokenizer=loaded.tokenizer,
    )
    assert engine.plan.num_dense_executables == 3
    rows = {row["id"]: row for row in golden_rows() if len(row["prompt_ids"]) + 48 <= MAX_ROWS}
    assert len(rows) >= 20
    requests = [
        hj.Request(
            id=name,
            prompt_token_ids=tuple(row["prompt_ids"]),
            sampling_params=hj.SamplingParams(max_tokens=len(row["greedy_ids"]), temperature=0, ignore_eos=True),
        )
        for name, row in rows.items()
    ]
    found = {each.id: first_difference(rows[each.id], each.token_ids) for each in engine.generate(requests)}
    assert found == dict.fromkeys(rows)
