"""A Decoder from a GGUF file: tensors under Hugging Face's names, and their rotary layout undone."""

from __future__ import annotations

import re

import numpy as np

from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import ModelFormatError, UnsupportedModelError
from models.gguf_config import ROPE_FACTORS
from models.gguf_file import GgufFile
from models.weights import read_decoder, tensor_names

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


def load_gguf_decoder(file: GgufFile, config: DecoderConfig, *, dtype: str) -> Decoder:
    """Dequantises every tensor into a module; a missing, surplus or misshapen tensor is an error with its name."""
    used = {_gguf_name(name) for name in tensor_names(config)} | {ROPE_FACTORS}
    surplus = sorted(set(file.tensors) - used)
    if surplus:
        raise UnsupportedModelError(f"{file.path}: tensor {surplus[0]!r} has no place in a {config.model_type} decoder")
    permuted = config.model_type == "llama"

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = _checked(file, _gguf_name(name), shape)
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            return _unpermute(array, config.head_dim)
        return array

    return read_decoder(config, read, dtype=dtype)


def _gguf_name(name: str) -> str:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    return f"{_TOP[name.removesuffix('.weight')]}.weight"


def _checked(file: GgufFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    info = file.tensors.get(name)
    if info is None:
        raise ModelFormatError(f"{file.path}: tensor {name!r} of shape {shape} is missing")
    if info.shape != shape:
        raise ModelFormatError(f"{file.path}: tensor {name!r} has shape {info.shape}, the config needs {shape}")
    return file.tensor(name)


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...), where neighbours rotate, back to two halves."""
    out, fan_in = weight.shape
    return weight.reshape(out // head_dim, head_dim // 2, 2, fan_in).swapaxes(1, 2).reshape(out, fan_in)
