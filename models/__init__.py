"""Plain Flax language models and how their weights and tokenizers are read and stored."""

from models.checkpoint import save
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import (
    ChatTemplateError,
    ModelError,
    ModelExistsError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from models.gpt import GptDecoder
from models.gpt_config import GptConfig
from models.load import fingerprint, load
from models.loaded import LoadedModel
from models.rope import RopeScaling
from models.shapes import SHAPES
from models.tokenizer import Tokenizer

__all__ = [
    "SHAPES",
    "ChatTemplateError",
    "Decoder",
    "DecoderConfig",
    "GptConfig",
    "GptDecoder",
    "LoadedModel",
    "ModelError",
    "ModelExistsError",
    "ModelFormatError",
    "ModelNotFoundError",
    "RopeScaling",
    "Tokenizer",
    "UnsupportedModelError",
    "fingerprint",
    "load",
    "save",
]
