"""Tiny models with random weights, written as GGUF files and Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from models import DecoderConfig

F32 = gguf.GGMLQuantizationType.F32
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_config(**changes: Any) -> DecoderConfig:
    """Two layers, every extent different from the others, rows long enough for one block of 32 quantised values."""
    base = DecoderConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
    )
    return dataclasses.replace(base, **changes)


FAMILIES = {
    "llama2": tiny_config(num_key_value_heads=4),
    "llama3": tiny_config(rope_theta=5e5),
    "smollm2": tiny_config(rope_theta=1e5, tie_word_embeddings=True),
    "mistral": tiny_config(model_type="mistral", sliding_window=5),
    "qwen2": tiny_config(model_type="qwen2", qkv_bias=True, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "qwen2-mixed": tiny_config(
        model_type="qwen2", qkv_bias=True, sliding_window=3, layer_types=("full_attention", "sliding_attention")
    ),
    "qwen3": tiny_config(model_type="qwen3", qk_norm=True, rms_norm_eps=1e-6),
}


def random_tensors(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """f32 tensors under Hugging Face's names, matrices [out, in]; norms near one, biases of size one."""
    rng = np.random.default_rng(seed)
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        if config.qkv_bias:
            block |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
        if config.qk_norm:
            block |= {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return {name: _draw(rng, name, shape) for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        return values / np.float32(np.sqrt(shape[1]))
    return values if name.endswith("bias") else 1 + values / 4


def byte_tokenizer() -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE over all 256 bytes, with two merges and two control tokens: 260 tokens."""
    alphabet = _byte_alphabet()
    tokens = [*alphabet, "th", "the", "<|start|>", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3, 3],
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
    }


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0..255."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


def gguf_metadata(config: DecoderConfig) -> dict[str, Any]:
    """The keys that a converter would write for this config, with `byte_tokenizer`."""
    arch = "llama" if config.model_type == "mistral" else config.model_type
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    return {
        "general.architecture": arch,
        **{f"{arch}.{key}": value for key, value in values.items()},
        **byte_tokenizer(),
    }


def gguf_tensors(config: DecoderConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under GGUF's names; in llama files with q and k rows paired for neighbour rotation."""
    renamed = {}
    for name, value in tensors.items():
        if config.model_type in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = paired_rows(value, config.head_dim)
        renamed[_gguf_name(name)] = value
    return renamed


def paired_rows(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from two halves that rotate against each other to neighbours that do."""
    halves = np.split(value.reshape(-1, head_dim, value.shape[-1]), 2, axis=1)
    return np.stack(halves, axis=2).reshape(value.shape)


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        stem, _, suffix = rest.rpartition(".")
        return f"blk.{layer}.{GGUF_NAMES[stem]}.{suffix}"
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    return top[name] + ".weight"


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = F32,
) -> Path:
    """A GGUF file; matrices are quantised to `kind`, vectors stay f32."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, value in tensors.items():
        wanted = kind if value.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(value, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def hf_config(config: DecoderConfig, **changes: Any) -> dict[str, Any]:
    """The config.json that describes `config` (no rope scaling)."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    skipped = ("rope_scaling", "layer_types", "qkv_bias", "qk_norm")
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in skipped}
    if config.layer_types is not None:
        values |= {"use_sliding_window": True, "layer_types": list(config.layer_types)}
    return {**values, "architectures": [names[config.model_type] + "ForCausalLM"], "hidden_act": "silu", **changes}


def write_hf(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A Hugging Face folder without a tokenizer; with an index when there is more than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    owner = {name: f"model-{index % shards:05d}.safetensors" for index, name in enumerate(tensors)}
    for file in set(owner.values()):
        save_file({name: value for name, value in tensors.items() if owner[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    return folder
