from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import models
from model_files import FAMILIES, hf_config, random_tensors, tiny_config, write_hf
from models.families import config_from_dict, config_to_dict
from models.hf_config import config_from_hf
from numpy_decoder import reference_logits
from oracle_models import FOLDER, NAMES

TOKENS = np.random.default_rng(3).integers(0, 260, 12)
CONFIG = FAMILIES["llama3"]
LLAMA_32_1B = {  # as published, without what does not concern the arithmetic
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def logits_of(module):
    return np.asarray(module(jnp.asarray(TOKENS)[None], jnp.arange(len(TOKENS))[None]))[0]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["mistral", "qwen2-mixed", "smollm2"])
def test_a_folder_gives_the_model_that_was_written(tmp_path, family, shards):
    config = FAMILIES[family]
    tensors = random_tensors(config)
    loaded = models.load(write_hf(tmp_path / "m", hf_config(config), tensors, shards))
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    np.testing.assert_allclose(logits_of(loaded.module), reference_logits(config, tensors, TOKENS, plain), atol=3e-5)
    assert loaded.config == config
    assert loaded.tokenizer is None


def test_half_precision_files_are_read_exactly(tmp_path):
    narrow = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_tensors(CONFIG).items()}
    wide = {name: value.astype(np.float32) for name, value in narrow.items()}
    a = models.load(write_hf(tmp_path / "narrow", hf_config(CONFIG), narrow)).module
    b = models.load(write_hf(tmp_path / "wide", hf_config(CONFIG), wide)).module
    np.testing.assert_array_equal(logits_of(a), logits_of(b))


def test_published_configs_give_the_known_shapes():
    assert config_from_hf(LLAMA_32_1B) == models.SHAPES["llama-3.2-1b"]
    assert config_from_hf(QWEN2_7B) == models.SHAPES["qwen2-7b"]
    # the same facts in the newer spelling
    moved = {key: value for key, value in LLAMA_32_1B.items() if key not in ("rope_theta", "rope_scaling")}
    moved["rope_parameters"] = {**LLAMA_32_1B["rope_scaling"], "rope_theta": 500000.0}
    assert config_from_hf(moved) == models.SHAPES["llama-3.2-1b"]


def test_defaults_of_a_config_are_those_of_its_family():
    sparse = {key: LLAMA_32_1B[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sparse |= {"num_attention_heads": 32}
    assert config_from_hf({**sparse, "model_type": "llama"}).num_key_value_heads == 32
    assert config_from_hf({**sparse, "model_type": "mistral"}).sliding_window == 4096
    assert config_from_hf({**sparse, "model_type": "mistral", "sliding_window": None}).sliding_window is None
    assert config_from_hf({**sparse, "model_type": "qwen3"}).head_dim == 128


def test_qwen_layers_slide_from_max_window_layers_on():
    config = config_from_hf({**QWEN2_7B, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 26})
    assert [config.layer_window(layer) for layer in (0, 25, 26, 27)] == [None, None, 100, 100]


def test_yarn_falls_back_on_the_context_of_the_config():
    yarn = {**QWEN2_7B, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    assert config_from_hf(yarn).rope_scaling == models.RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32768
    )
    del yarn["rope_scaling"]["original_max_position_embeddings"]
    scaling = config_from_hf(yarn).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 131072


REFUSED = [
    ("model_type", "mamba"),
    ("architectures", ["LlamaForSequenceClassification"]),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("partial_rotary_factor", 0.5),
    ("num_local_experts", 8),
    ("quantization_config", {"quant_method": "awq"}),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda item: str(item)[:30])
def test_what_is_not_built_is_refused_by_name(key, value):
    with pytest.raises(models.UnsupportedModelError, match=key if key != "architectures" else "architecture"):
        config_from_hf({**LLAMA_32_1B, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 5),
        ("head_dim", 63),
        ("vocab_size", 1 << 40),
        ("num_hidden_layers", 10**9),
        ("rope_theta", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": "8"}),
        ("hidden_size", None),
    ],
    ids=str,
)
def test_impossible_values_are_named(key, value):
    with pytest.raises(models.ModelFormatError, match=key):
        config_from_hf({**LLAMA_32_1B, key: value})


SOURCES = {
    "llama": LLAMA_32_1B,
    "qwen2": QWEN2_7B | {"use_sliding_window": True},
    **{name: json.loads((FOLDER / name / "config.json").read_text()) for name in NAMES},
}


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 1.5, "x", [1], {"a": 1}, True, float("nan")], ids=repr)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_values_of_the_wrong_kind_end_in_a_model_error(source, value):
    refused = 0
    for key in (*source, "rope_parameters", "layer_types", "sliding_window"):
        try:
            config_from_hf({**source, key: value})
        except models.ModelError:
            refused += 1
    assert refused >= 3


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    tensors = random_tensors(CONFIG)
    some = "model.layers.1.mlp.up_proj.weight"
    without = {name: value for name, value in tensors.items() if name != some}
    with pytest.raises(models.ModelFormatError, match=rf"{some}' of shape \(96, 64\) is missing"):
        models.load(write_hf(tmp_path / "a", hf_config(CONFIG), without))
    surplus = {**tensors, "model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}
    with pytest.raises(models.UnsupportedModelError, match=r"layers\.0\.self_attn\.o_proj\.bias"):
        models.load(write_hf(tmp_path / "b", hf_config(CONFIG), surplus))
    with pytest.raises(models.ModelFormatError, match=rf"{some}' has shape \(64, 96\), the config needs \(96, 64\)"):
        models.load(write_hf(tmp_path / "c", hf_config(CONFIG), {**tensors, some: tensors[some].T.copy()}))
    with pytest.raises(models.UnsupportedModelError, match=rf"{some}' has dtype I32"):
        models.load(write_hf(tmp_path / "d", hf_config(CONFIG), {**tensors, some: np.ones((96, 64), np.int32)}))


def test_a_tied_model_may_carry_its_head_and_its_frequencies(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    extra = {
        "lm_head.weight": np.zeros((260, 64), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
    }
    a = models.load(write_hf(tmp_path / "a", hf_config(config), tensors)).module
    b = models.load(write_hf(tmp_path / "b", hf_config(config), {**tensors, **extra})).module
    np.testing.assert_array_equal(logits_of(a), logits_of(b))


def test_truncated_files_are_refused_with_their_name(tmp_path):
    folder = write_hf(tmp_path / "m", hf_config(CONFIG), random_tensors(CONFIG))
    data = (folder / "model.safetensors").read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(models.ModelFormatError, match=r"model\.safetensors: not a sound"):
            models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(models.ModelFormatError, match=r"config\.json: not JSON"):
        models.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(models.ModelFormatError, match="JSON object"):
        models.load(folder)


def test_an_index_stays_in_its_folder_and_its_shards_exist(tmp_path):
    folder = write_hf(tmp_path / "m", hf_config(CONFIG), random_tensors(CONFIG), shards=2)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {**names, "x": "../outside.safetensors"}}))
    with pytest.raises(models.ModelFormatError, match="not a plain file name"):
        models.load(folder)
    index.write_text(json.dumps({"weight_map": {**names, "x": "model-7.safetensors"}}))
    with pytest.raises(models.ModelNotFoundError, match=r"model-7\.safetensors"):
        models.load(folder)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(models.ModelFormatError, match="weight_map"):
        models.load(folder)


def test_a_folder_without_weights_or_config_is_no_model(tmp_path):
    with pytest.raises(models.ModelNotFoundError, match=r"config\.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    with pytest.raises(models.ModelNotFoundError, match=r"model\.safetensors"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_survives_its_dict(name):
    config = config_from_hf(SOURCES[name])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_config_survives_its_dict():
    scaling = models.RopeScaling(rope_type="factors", freq_factors=tuple(range(1, 17)))
    config = dataclasses.replace(FAMILIES["qwen2-mixed"], rope_scaling=scaling)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    with pytest.raises(models.ModelFormatError, match="no_such_field"):
        config_from_dict({**config_to_dict(config), "no_such_field": 1})
