"""How a GGUF file holds each tensor: its name there, and whether it lies there in another way."""

from __future__ import annotations

import dataclasses
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
    "mlp.gate": "ffn_gate_inp",
}
_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_tensor(config: ModelConfig, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Where the tensor that the module calls `name` is in the file."""
    if not isinstance(config, DecoderConfig):  # its names and layouts are GGUF's
        return StoredTensor(name=name, shape=shape)
    part = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if part is None:
        return _with_norm(config, StoredTensor(name=f"{_TOP[name.removesuffix('.weight')]}.weight", shape=shape))
    layer, stem, suffix = part.groups()
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", stem)
    if expert and config.num_experts is not None:  # all experts of a layer are one tensor
        stacked = f"blk.{layer}.ffn_{expert[2]}_exps.weight"
        return StoredTensor(name=stacked, shape=(config.num_experts, *shape), index=int(expert[1]))
    names = _LAYER | _POST_NORMS if config.post_norms else _LAYER
    stored = StoredTensor(name=f"blk.{layer}.{names[stem]}.{suffix}", shape=shape)
    if config.model_type in ("llama", "mixtral") and stem in ("self_attn.q_proj", "self_attn.k_proj"):
        return dataclasses.replace(stored, restore=lambda array: _unpermute(array, config.head_dim))
    return _with_norm(config, stored)


def _with_norm(config: DecoderConfig, stored: StoredTensor) -> StoredTensor:
    """Scales of norms are stored with their offset added."""
    if config.norm_offset == 0.0 or not stored.name.endswith("norm.weight"):
        return stored
    return dataclasses.replace(stored, restore=lambda array: array - np.float32(config.norm_offset))


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...), where neighbours rotate, back to two halves."""
    out, fan_in = weight.shape
    return weight.reshape(out // head_dim, head_dim // 2, 2, fan_in).swapaxes(1, 2).reshape(out, fan_in)
