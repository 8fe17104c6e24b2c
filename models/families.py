"""The families of models: which config builds which module, and what leaves that has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models import config as decoder_config
from models import gpt_config
from models.config import DecoderConfig
from models.decoder import Decoder
from models.decoder_leaves import decoder_leaves
from models.errors import ModelFormatError, UnsupportedModelError
from models.gpt import GptDecoder
from models.gpt_config import GptConfig
from models.gpt_leaves import gpt_leaves
from models.leaf import Leaf
from models.rope import RopeScaling

ModelConfig = DecoderConfig | GptConfig
LanguageModel = Decoder | GptDecoder
MODEL_TYPES = decoder_config.MODEL_TYPES + gpt_config.MODEL_TYPES


def build(config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> LanguageModel:
    """The module of this config with random weights."""
    if isinstance(config, GptConfig):
        return GptDecoder(config, rngs=rngs, dtype=dtype)
    return Decoder(config, rngs=rngs, dtype=dtype)


def leaves_of(config: ModelConfig) -> Iterator[Leaf]:
    """Every leaf of the module that `build` makes, by path, with the tensors it is read from."""
    return gpt_leaves(config) if isinstance(config, GptConfig) else decoder_leaves(config)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """All fields as JSON-safe values; `config_from_dict` takes them back."""
    return dataclasses.asdict(config)


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_to_dict`; unknown or missing names raise ModelFormatError."""
    values = dict(fields)
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; allowed: {MODEL_TYPES}")
    try:
        if model_type in gpt_config.MODEL_TYPES:
            return GptConfig(**values)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = _scaling_from_dict(values["rope_scaling"])
        if values.get("layer_types") is not None:
            values["layer_types"] = tuple(values["layer_types"])
        return DecoderConfig(**values)
    except (TypeError, ValueError) as error:
        raise ModelFormatError(f"decoder config: {error}") from error


def _scaling_from_dict(fields: Mapping[str, Any]) -> RopeScaling:
    scaling = dict(fields)
    if scaling.get("freq_factors") is not None:
        scaling["freq_factors"] = tuple(scaling["freq_factors"])
    return RopeScaling(**scaling)
