"""The one file that touches JAX's jaxpr classes: a function becomes a flat, plain `Program`.

Inline calls (jit, remat, custom_jvp/vjp, closed calls) are expanded, so that the analysis sees one list of equations.
Runs on JAX 0.10.2 to 0.12 (from 0.11 a ClosedJaxpr is itself a Jaxpr).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core
from jax.extend import source_info_util

from partition.errors import TraceError

# The parameter that holds the inner jaxpr of each primitive that means nothing but "evaluate this".
_INLINE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


@dataclass(frozen=True, eq=False)
class Value:
    """One array of the program, compared by identity."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Equation:
    """outputs = primitive(*inputs, **params). `where` is the model's source line."""

    primitive: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    where: str
    bind: Callable[..., Any] = field(repr=False)

    def evaluate(self, args: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
        """Run the equation on `args`; `params` replaces the traced parameters (after a change of size)."""
        out = self.bind(*args, **(self.params if params is None else params))
        return list(out) if isinstance(out, (list, tuple)) else [out]


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """A flat jaxpr: `inputs` then `equations` in order give `outputs`; `constants` maps literal and captured arrays."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    constants: Mapping[Value, Any]


def trace(fn: Callable[..., Any], *args: Any) -> Program:
    """Flat program of `fn(*args)`; args are pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      TraceError: JAX could not trace the function.
    """
    try:
        closed = jax.make_jaxpr(fn)(*args)
    except Exception as error:
        raise TraceError(f"the model could not be traced: {type(error).__name__}: {error}") from error
    flattener = _Flattener()
    inputs = [flattener.new(var.aval) for var in closed.jaxpr.invars]
    outputs = flattener.inline(closed.jaxpr, closed.consts, inputs)
    return Program(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        equations=tuple(flattener.equations),
        constants=flattener.constants,
    )


class _Flattener:
    """Expands inline calls; equations that repeat an earlier one (the same rotary table in every layer) become it."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.constants: dict[Value, Any] = {}
        self.known: dict[Any, list[Value]] = {}

    def new(self, aval: Any) -> Value:
        return Value(tuple(aval.shape), aval.dtype)

    def constant(self, array: Any, aval: Any) -> Value:
        if aval.ndim == 0:
            key = (np.asarray(array).tobytes(), str(aval.dtype))
            if key not in self.known:
                self.known[key] = [self.new(aval)]
            value = self.known[key][0]
        else:
            value = self.new(aval)
        self.constants[value] = array
        return value

    def add(self, eqn: Any, operands: Sequence[Value], where: str) -> list[Value]:
        key = (eqn.primitive, tuple(operands), repr(sorted(eqn.params.items(), key=lambda item: item[0])))
        if key in self.known and not eqn.effects:
            return self.known[key]
        results = [self.new(var.aval) for var in eqn.outvars]
        self.equations.append(_equation(eqn, operands, results, where))
        self.known[key] = results
        return results

    def inline(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], caller: str = "") -> list[Value]:
        env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(const, var.aval)

        def read(atom: Any) -> Value:
            if isinstance(atom, jex_core.Literal):
                aval: Any = atom.aval
                return self.constant(np.asarray(atom.val, aval.dtype), aval)
            return env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            # Inside a library's jitted helper there is no line of the model; the line that calls it is.
            where = source_info_util.summarize(eqn.source_info) or caller
            inner = eqn.params.get(_INLINE.get(eqn.primitive.name, ""))
            if inner is not None:
                results = self.inline(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, where)
            else:
                results = self.add(eqn, operands, where)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, inputs: Sequence[Value], outputs: Sequence[Value], where: str) -> Equation:
    return Equation(
        primitive=eqn.primitive.name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        params=dict(eqn.params),
        where=where,
        bind=eqn.primitive.bind,
    )
