"""A Decoder from a GGUF file: its config, its tensors by Hugging Face's names, and its rotary layout undone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import ModelFormatError, UnsupportedModelError
from models.gguf_file import GgufFile
from models.rope import RopeScaling
from models.weights import read_decoder, tensor_names

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM2 files call themselves llama

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
_ROPE_FACTORS = "rope_freqs.weight"  # how converters store the llama3 rule: a divisor per frequency


def config_from_gguf(file: GgufFile) -> DecoderConfig:
    """Reads the metadata.

    Raises UnsupportedModelError naming an architecture or option that is not built, ModelFormatError naming a
    missing or impossible key.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: general.architecture {arch!r} is not supported; allowed: {ARCHITECTURES}"
        )
    _refuse_options(file, arch)
    heads, hidden = _integer(file, f"{arch}.attention.head_count"), _integer(file, f"{arch}.embedding_length")
    head_dim = _get(file, f"{arch}.attention.key_length", hidden // heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if _get(file, key, head_dim) != head_dim:
            raise UnsupportedModelError(f"{file.path}: {key}={file.metadata[key]!r} differs from the head size {head_dim}")
    return DecoderConfig(
        model_type=arch,
        vocab_size=_vocab_size(file),
        hidden_size=hidden,
        intermediate_size=_integer(file, f"{arch}.feed_forward_length"),
        num_hidden_layers=_integer(file, f"{arch}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_get(file, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_integer(file, f"{arch}.context_length"),
        rms_norm_eps=_need(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=_get(file, f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, arch),
        sliding_window=_get(file, f"{arch}.attention.sliding_window", 0) or None,
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def load_gguf_decoder(file: GgufFile, config: DecoderConfig, *, dtype: str) -> Decoder:
    """Dequantises every tensor into a module; a missing, surplus or misshapen tensor is an error with its name."""
    used = {_gguf_name(name) for name in tensor_names(config)} | {_ROPE_FACTORS}
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
    """Rows of a head from (0, d/2, 1, d/2+1, ...), for rotation of neighbours, back to halves: (0, 1, ... | d/2, ...)."""
    out, fan_in = weight.shape
    return weight.reshape(out // head_dim, head_dim // 2, 2, fan_in).swapaxes(1, 2).reshape(out, fan_in)


def _refuse_options(file: GgufFile, arch: str) -> None:
    neutral = {
        "split.count": (0, 1),
        f"{arch}.expert_count": (0,),
        f"{arch}.logit_scale": (1.0,),
        f"{arch}.rope.scaling.yarn_ext_factor": (-1.0, 1.0),
        f"{arch}.rope.scaling.yarn_log_multiplier": (0.0,),
    }
    for key, allowed in neutral.items():
        if key in file.metadata and file.metadata[key] not in allowed:
            raise UnsupportedModelError(
                f"{file.path}: {key}={file.metadata[key]!r} is not supported; allowed: {allowed} or absent"
            )


def _vocab_size(file: GgufFile) -> int:
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise ModelFormatError(f"{file.path}: tensor 'token_embd.weight' of shape (vocab, hidden) is missing")
    return info.shape[0]


def _rope_scaling(file: GgufFile, arch: str) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling."
    kind = _get(file, prefix + "type", "linear" if f"{arch}.rope.scale_linear" in file.metadata else "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path}: {prefix}type {kind!r} is not supported; allowed: ('none', 'linear', 'yarn')"
        )
    if _ROPE_FACTORS in file.tensors:
        return _rope_factors(file, kind)
    if kind == "none":
        return None
    factor = _get(file, prefix + "factor", _get(file, f"{arch}.rope.scale_linear", 1.0))
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    plain = RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=_get(
            file, prefix + "original_context_length", file.metadata.get(f"{arch}.context_length")
        ),
        beta_fast=_get(file, prefix + "yarn_beta_fast", 32.0),
        beta_slow=_get(file, prefix + "yarn_beta_slow", 1.0),
    )
    return _with_attention_factor(file, prefix, plain)


def _with_attention_factor(file: GgufFile, prefix: str, scaling: RopeScaling) -> RopeScaling:
    """GGUF's factor multiplies the one that follows from the formula, Hugging Face's replaces it."""
    import dataclasses

    from models.rope import rope_frequencies

    extra = _get(file, prefix + "attn_factor", _get(file, prefix + "yarn_attn_factor", 1.0))
    _, usual = rope_frequencies(2, 10000.0, scaling)
    return dataclasses.replace(scaling, attention_factor=usual * extra)


def _rope_factors(file: GgufFile, kind: str) -> RopeScaling:
    if kind != "none":
        raise UnsupportedModelError(f"{file.path}: tensor {_ROPE_FACTORS!r} together with rope scaling {kind!r}")
    if len(file.tensors[_ROPE_FACTORS].shape) != 1:
        raise ModelFormatError(f"{file.path}: tensor {_ROPE_FACTORS!r} has shape {file.tensors[_ROPE_FACTORS].shape}")
    return RopeScaling(rope_type="factors", freq_factors=tuple(file.tensor(_ROPE_FACTORS).tolist()))


def _need(file: GgufFile, key: str) -> Any:
    if key not in file.metadata:
        raise ModelFormatError(f"{file.path}: the key {key!r} is missing")
    return file.metadata[key]


def _integer(file: GgufFile, key: str) -> int:
    value = _need(file, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelFormatError(f"{file.path}: {key} must be a positive integer, not {value!r}")
    return value


def _get(file: GgufFile, key: str, default: Any) -> Any:
    return file.metadata.get(key, default)
