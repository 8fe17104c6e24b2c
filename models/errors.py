"""Everything that can go wrong while a model is described, read, stored or asked for text.

ModelError
├── ModelNotFoundError      the path or the name leads to no model
├── ModelFormatError        the file is damaged or contradicts itself (truncated, wrong magic, wrong shape, missing key)
├── UnsupportedModelError   the file is sound, but asks for something that is not built (named in the message)
├── ModelExistsError        a checkpoint would overwrite what is already there
└── ChatTemplateError       the model has no chat template, or its template refuses the messages
"""

from __future__ import annotations


class ModelError(Exception):
    """Root of all errors of this package."""


class ModelNotFoundError(ModelError):
    """No model is at this path, or no shape has this name."""


class ModelFormatError(ModelError):
    """A file is truncated, damaged or contradicts itself; the message names the tensor or the key."""


class UnsupportedModelError(ModelError):
    """A sound model needs something that this package does not build; the message names it."""


class ChatTemplateError(ModelError):
    """Messages cannot be turned into text by this model's chat template."""


class ModelExistsError(ModelError):
    """A checkpoint is to be written where something already is."""
