"""The checkpoints of tests/data/models with their logits, and the same weights as a GGUF converter would write them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from model_files import GGUF_NAMES, byte_tokenizer, paired_rows, write_gguf

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

_ARCHITECTURES = {"gemma2": "gemma2", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
_LLAMA_LIKE = {
    **GGUF_NAMES,
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GEMMA = _LLAMA_LIKE | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT_PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def oracle(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [2, 20] and the logits f32 [2, 20, vocab] that PyTorch's transformers gave for them."""
    with np.load(FOLDER / name / "oracle.npz") as stored:
        return stored["tokens"], stored["logits"]


def write_oracle_gguf(name: str, path: Path) -> Path:
    """The same model as a GGUF file."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    tensors = load_file(FOLDER / name / "model.safetensors")
    arch, values, renamed = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(config["model_type"], _llama_like)(
        config, tensors
    )
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


def _llama_like(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> _Written:
    arch, is_gemma = _ARCHITECTURES[config["model_type"]], config["model_type"].startswith("gemma")
    tensors = dict(tensors)
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_theta"]),
    }
    if is_gemma:
        values |= {"attention.sliding_window": config["sliding_window"]}
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            values |= {} if config[key] is None else {key: config[key]}
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name] = tensors[name] + 1
            if name.endswith("q_proj.weight"):  # no key holds the scale of the scores: the head size is meant
                tensors[name] = tensors[name] * np.float32(config["head_dim"] / config["query_pre_attn_scalar"]) ** 0.5
    if config.get("rope_scaling"):
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": config["rope_scaling"]["factor"]}
    if "num_experts_per_tok" in config:
        values |= {
            "expert_count": config.get("num_experts") or config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
        }
    if "moe_intermediate_size" in config:
        values |= {"expert_feed_forward_length": config["moe_intermediate_size"]}
    if arch == "llama":
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensors[name] = paired_rows(tensors[name], config["head_dim"])
    stacked = _stack_experts(tensors)
    return (
        arch,
        values,
        stacked | {_rename(name, _GEMMA if is_gemma else _LLAMA_LIKE): t for name, t in tensors.items()},
    )


def _stack_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the experts out of `tensors`: one tensor for all of a layer."""
    groups: dict[str, dict[int, np.ndarray]] = {}
    for name in list(tensors):
        part = re.fullmatch(r"model\.layers\.(\d+)\..+\.experts\.(\d+)\.(\w+)\.weight", name)
        if part:
            group = groups.setdefault(f"blk.{part[1]}.ffn_{_EXPERT_PARTS[part[3]]}_exps.weight", {})
            group[int(part[2])] = tensors.pop(name)
    return {name: np.stack([group[expert] for expert in range(len(group))]) for name, group in groups.items()}
