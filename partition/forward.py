"""What users hand over - a function, an nnx module, a bound linen module - as one kind of function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from partition.errors import TraceError

# fn(params, tokens [1, T] int32, positions [1, T] int32) -> logits [1, T, vocab], or of the last token [1, vocab]
CausalFunction = Callable[[Any, jax.Array, jax.Array], jax.Array]

_ALLOWED = (
    "allowed: fn(params, tokens[, positions][, mask]) with params, an nnx.Module or a bound linen module called as "
    "module(tokens[, positions][, mask])"
)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The forward pass `fn` and its params, a pytree."""

    fn: CausalFunction
    params: Any


def as_forward(model: Any, params: Any = None) -> Forward:
    """The plain forward pass of `model`.

    Args:
      model: `fn(params, tokens[, positions][, mask])`, an `nnx.Module`, or a linen module bound to its variables;
        arguments with defaults are left to them. mask [1, T] int32 is 1 for every token, as no row is padding.
      params: pytree of arrays or `jax.ShapeDtypeStruct`, for a function only.

    Raises:
      TraceError: anything else, or more arguments.
    """
    if isinstance(model, (nnx.Module, linen.Module)):
        if params is not None:
            raise TraceError(f"{type(model).__name__} has its own parameters, and others are given; {_ALLOWED}")
        return _of_module(model)
    if not callable(model):
        raise TraceError(f"the model is a {type(model).__name__}; {_ALLOWED}")
    if params is None:
        raise TraceError(f"params are missing for the function {_name(model)}; {_ALLOWED}")
    return _of_function(model, params)


def _of_function(function: Callable[..., Any], params: Any) -> Forward:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TraceError(
                f"parameter {jax.tree_util.keystr(path)} is a {type(leaf).__name__}; allowed: arrays and "
                "jax.ShapeDtypeStruct"
            )
    taken = _arguments(function, 1)
    return Forward(fn=lambda params, *rows: function(params, *_given(taken, *rows)), params=params)


def _of_module(module: Any) -> Forward:
    taken = _arguments(module, 0)
    if isinstance(module, nnx.Module):
        graph, state = nnx.split(module)

        def merged(state: Any, *rows: jax.Array) -> Any:
            # A copy, so that counters of random streams may advance while tracing.
            return nnx.merge(graph, state, copy=True)(*_given(taken, *rows))

        return Forward(fn=merged, params=state)
    if module.scope is None:
        raise TraceError(f"the linen module {type(module).__name__} is not bound to variables; {_ALLOWED}")
    unbound, variables = module.unbind()
    return Forward(fn=lambda values, *rows: unbound.apply(values, *_given(taken, *rows)), params=variables)


def _arguments(function: Any, given: int) -> int:
    """How many of tokens, positions and mask a callable must be given, after `given` others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TraceError(f"the arguments of {_name(function)} cannot be read: {error}; {_ALLOWED}") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [each.name for each in parameters if each.kind in positional and each.default is each.empty]
    needed = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    if needed or not 1 <= len(names) - given <= 3:
        raise TraceError(f"{_name(function)} takes {', '.join([*names, *needed]) or 'no arguments'}; {_ALLOWED}")
    return len(names) - given


def _given(count: int, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
    return (tokens, positions, jnp.ones_like(tokens))[:count]


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
