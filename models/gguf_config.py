"""DecoderConfig from a GGUF file; whatever would change the arithmetic and is not built is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.config import DecoderConfig
from models.errors import ModelFormatError, UnsupportedModelError
from models.gguf_file import GgufFile
from models.rope import RopeScaling, yarn_attention_factor

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM2 files call themselves llama

_MAX_FREQUENCIES = 2048
ROPE_FACTORS = "rope_freqs.weight"  # how converters store the llama3 rule: a divisor per frequency


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
            raise UnsupportedModelError(
                f"{file.path}: {key}={file.metadata[key]!r} differs from the head size {head_dim}"
            )
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
    if ROPE_FACTORS in file.tensors:
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
    key = prefix + ("attn_factor" if prefix + "attn_factor" in file.metadata else "yarn_attn_factor")
    extra = _get(file, key, 1.0)
    if not isinstance(extra, int | float):
        raise ModelFormatError(f"{file.path}: {key} must be a positive number, not {extra!r}")
    return dataclasses.replace(scaling, attention_factor=yarn_attention_factor(scaling) * extra)


def _rope_factors(file: GgufFile, kind: str) -> RopeScaling:
    if kind != "none":
        raise UnsupportedModelError(f"{file.path}: tensor {ROPE_FACTORS!r} together with rope scaling {kind!r}")
    shape = file.tensors[ROPE_FACTORS].shape
    if len(shape) != 1 or shape[0] > _MAX_FREQUENCIES:
        raise ModelFormatError(
            f"{file.path}: tensor {ROPE_FACTORS!r} has shape {shape}, the config needs (head_dim / 2,)"
        )
    return RopeScaling(rope_type="factors", freq_factors=tuple(file.tensor(ROPE_FACTORS).tolist()))


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
