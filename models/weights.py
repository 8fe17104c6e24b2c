"""From tensors in a file to the leaves of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import UnsupportedModelError
from models.families import LanguageModel, ModelConfig, build, leaves_of
from models.leaf import Path, TensorReader

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """How a file holds a tensor: its name and shape there, and the way from there to the module's layout."""

    name: str
    shape: tuple[int, ...]
    restore: Callable[[np.ndarray], np.ndarray] = lambda array: array
    index: int | None = None  # along the leading axis, where the file stacks several of our tensors into one


def resolve_dtype(name: str) -> np.dtype:
    """The dtype of weights by name; UnsupportedModelError for anything but those in DTYPES."""
    if name not in DTYPES:
        raise UnsupportedModelError(f"dtype {name!r} is not supported; allowed: {tuple(DTYPES)}")
    return np.dtype(DTYPES[name])


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `read_decoder` reads."""
    return {name: shape for leaf in leaves_of(config) for name, shape in leaf.sources.items()}


def read_decoder(config: ModelConfig, read: TensorReader, *, dtype: str) -> LanguageModel:
    """Reads every tensor once and builds the module on the default device, leaf by leaf."""
    resolved = resolve_dtype(dtype)
    graphdef, variables = abstract_decoder(config, resolved)
    return merge_decoder(graphdef, variables, {leaf.path: leaf.read(read, resolved) for leaf in leaves_of(config)})


def abstract_decoder(
    config: ModelConfig, dtype: np.dtype
) -> tuple[nnx.GraphDef[LanguageModel], dict[Path, nnx.Variable]]:
    """The structure of the module, and its leaves by path as shapes without memory."""
    module = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(module)
    return graphdef, dict(nnx.to_flat_state(state))


def merge_decoder(
    graphdef: nnx.GraphDef[LanguageModel], variables: Mapping[Path, nnx.Variable], arrays: Mapping[Path, jax.Array]
) -> LanguageModel:
    """A module whose leaves are `arrays`; each must have the shape and dtype of its variable."""
    assert variables.keys() == arrays.keys(), variables.keys() ^ arrays.keys()
    filled = []
    for path, variable in variables.items():
        expected = variable.get_value()
        assert (arrays[path].shape, arrays[path].dtype) == (expected.shape, expected.dtype), path
        filled.append((path, variable.replace(arrays[path])))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
