"""The checkpoints of tests/data/models with their logits, and the same weights as a GGUF converter would write them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from model_files import byte_tokenizer, write_gguf

FOLDER = Path(__file__).parents[1] / "data" / "models"
NAMES = sorted(path.name for path in FOLDER.iterdir())

# Hugging Face's part of a layer -> GGUF's, from the tables of the gguf package's converters
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
_GPT_NEOX = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
}


def oracle(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [2, 20] and the logits f32 [2, 20, vocab] that PyTorch's transformers gave for them."""
    with np.load(FOLDER / name / "oracle.npz") as stored:
        return stored["tokens"], stored["logits"]


def write_oracle_gguf(name: str, path: Path) -> Path:
    """The same model as a GGUF file."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    tensors = load_file(FOLDER / name / "model.safetensors")
    write = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}[config["model_type"]]
    arch, values, renamed = write(config, tensors)
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    tokenizer = byte_tokenizer()
    return write_gguf(path, {"general.architecture": arch, **metadata, **tokenizer}, renamed)


_Written = tuple[str, dict[str, Any], dict[str, np.ndarray]]


def _rename(name: str, parts: dict[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    layer = re.fullmatch(r"[a-z_.]+\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{parts[layer[2]]}.{suffix}" if layer else f"{parts[stem]}.{suffix}"


def _gpt2(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> _Written:
    values = {
        "block_count": config["n_layer"],
        "context_length": config["n_positions"],
        "embedding_length": config["n_embd"],
        "feed_forward_length": 4 * config["n_embd"],
        "attention.head_count": config["n_head"],
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
    }
    renamed = {_rename(name, _GPT2): value for name, value in tensors.items()}
    for name in renamed:
        if renamed[name].ndim == 2 and name.startswith("blk."):
            renamed[name] = renamed[name].T.copy()
    return "gpt2", values, renamed


def _gpt_neox(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> _Written:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
        "rope.dimension_count": int(config["rotary_pct"] * (hidden // heads)),
        "use_parallel_residual": config["use_parallel_residual"],
    }
    renamed = {_rename(name, _GPT_NEOX): value for name, value in tensors.items()}
    for name, value in renamed.items():
        if "attn_qkv" in name:
            per_head = np.split(value, 3 * heads)  # q, k, v of the first head, of the second, ...
            renamed[name] = np.concatenate([part for kind in range(3) for part in per_head[kind::3]])
    return "gptneox", values, renamed
