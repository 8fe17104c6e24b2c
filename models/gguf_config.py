"""A model's config from a GGUF file; whatever would change the arithmetic and is not built is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.config import DecoderConfig
from models.errors import ModelFormatError, UnsupportedModelError
from models.families import ModelConfig
from models.gguf_file import GgufFile
from models.gguf_gpt_config import GPT_ARCHITECTURES, gpt_config_from_gguf
from models.gguf_values import get, integer, need, refuse_options, vocab_size
from models.gguf_variants import expert_fields, gemma_fields
from models.rope import RopeScaling, yarn_attention_factor

# Mistral, SmolLM2 and Mixtral files call themselves llama
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3")

_MAX_FREQUENCIES = 2048
ROPE_FACTORS = "rope_freqs.weight"  # how converters store the llama3 rule: a divisor per frequency


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Reads the metadata.

    Raises UnsupportedModelError naming an architecture or option that is not built, ModelFormatError naming a
    missing or impossible key.
    """
    arch = file.metadata.get("general.architecture")
    if arch in tuple(GPT_ARCHITECTURES):  # a damaged file may hold a list here
        return gpt_config_from_gguf(file, arch)
    if arch in ARCHITECTURES:
        return _decoder_config(file, arch)
    allowed = (*ARCHITECTURES, *GPT_ARCHITECTURES)
    raise UnsupportedModelError(f"{file.path}: general.architecture {arch!r} is not supported; allowed: {allowed}")


def _decoder_config(file: GgufFile, arch: str) -> DecoderConfig:
    refuse_options(
        file,
        {
            **({} if arch in ("llama", "qwen3moe") else {f"{arch}.expert_count": (0,)}),
            f"{arch}.logit_scale": (1.0,),
            f"{arch}.rope.scaling.yarn_ext_factor": (-1.0, 1.0),
            f"{arch}.rope.scaling.yarn_log_multiplier": (0.0,),
        },
    )
    heads, hidden = integer(file, f"{arch}.attention.head_count"), integer(file, f"{arch}.embedding_length")
    head_dim = get(file, f"{arch}.attention.key_length", hidden // heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if get(file, key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{file.path}: {key}={file.metadata[key]!r} differs from the head size {head_dim}"
            )
    variant: dict[str, Any] = {}
    if arch in ("gemma2", "gemma3"):
        variant = gemma_fields(file, arch, head_dim=head_dim)
    elif arch == "qwen3moe" or get(file, f"{arch}.expert_count", 0) != 0:
        variant = expert_fields(file, arch)
    shared = dict(
        model_type=arch,
        vocab_size=vocab_size(file),
        hidden_size=hidden,
        intermediate_size=integer(file, f"{arch}.feed_forward_length"),
        num_hidden_layers=integer(file, f"{arch}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get(file, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=integer(file, f"{arch}.context_length"),
        rms_norm_eps=need(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=get(file, f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, arch),
        sliding_window=get(file, f"{arch}.attention.sliding_window", 0) or None,
        qkv_bias=arch == "qwen2",
        qk_norm=arch in ("qwen3", "qwen3moe", "gemma3"),
        tie_word_embeddings="output.weight" not in file.tensors,
    )
    return DecoderConfig(**{**shared, **variant})


def _rope_scaling(file: GgufFile, arch: str) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling."
    kind = get(file, prefix + "type", "linear" if f"{arch}.rope.scale_linear" in file.metadata else "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path}: {prefix}type {kind!r} is not supported; allowed: ('none', 'linear', 'yarn')"
        )
    if ROPE_FACTORS in file.tensors:
        return _rope_factors(file, kind)
    if kind == "none":
        return None
    factor = get(file, prefix + "factor", get(file, f"{arch}.rope.scale_linear", 1.0))
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    plain = RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=get(
            file, prefix + "original_context_length", file.metadata.get(f"{arch}.context_length")
        ),
        beta_fast=get(file, prefix + "yarn_beta_fast", 32.0),
        beta_slow=get(file, prefix + "yarn_beta_slow", 1.0),
    )
    return _with_attention_factor(file, prefix, plain)


def _with_attention_factor(file: GgufFile, prefix: str, scaling: RopeScaling) -> RopeScaling:
    """GGUF's factor multiplies the one that follows from the formula, Hugging Face's replaces it."""
    key = prefix + ("attn_factor" if prefix + "attn_factor" in file.metadata else "yarn_attn_factor")
    extra = get(file, key, 1.0)
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
