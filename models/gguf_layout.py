"""How a GGUF file holds each tensor: its name there, and whether it lies there in another way."""

from __future__ import annotations

import re

import numpy as np

from models.config import DecoderConfig
from models.families import ModelConfig
from models.weights import StoredTensor

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
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


def gguf_tensor(config: ModelConfig, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Where the tensor that the module calls `name` is in the file."""
    if not isinstance(config, DecoderConfig):  # its names and layouts are GGUF's
        return StoredTensor(name=name, shape=shape)
    stored = _gguf_name(name)
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return StoredTensor(name=stored, shape=shape, restore=lambda array: _unpermute(array, config.head_dim))
    return StoredTensor(name=stored, shape=shape)


def _gguf_name(name: str) -> str:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    return f"{_TOP[name.removesuffix('.weight')]}.weight"


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...), where neighbours rotate, back to two halves."""
    out, fan_in = weight.shape
    return weight.reshape(out // head_dim, head_dim // 2, 2, fan_in).swapaxes(1, 2).reshape(out, fan_in)
