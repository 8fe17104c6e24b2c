"""The one file that touches JAX's jaxpr classes: a function becomes a flat, plain `Program`.

Inline calls (jit, remat, custom_jvp/vjp, closed calls) are expanded and scans over layers unrolled, so that the
analysis sees one list of equations; a split becomes slices. One primitive is ours: 'take_layer', one layer's slice of
what a scan runs over. Scans over chunks of the tokens stay, with a program of their step.
Runs on JAX 0.10.2 to 0.12 (from 0.11 a ClosedJaxpr is itself a Jaxpr).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
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
    """outputs = primitive(*inputs, **params). `where` is the model's source line; `loop`: of a scan that stays."""

    primitive: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    where: str
    bind: Callable[..., Any] = field(repr=False)
    loop: Loop | None = None

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Loop:
    """A scan: body(*constants, *carry, *an entry of each other operand) -> (*next carry, *an entry of each result)."""

    body: Program
    num_constants: int
    num_carry: int
    length: int
    reverse: bool


class LoopJudge(Protocol):
    """Says which scans stay, being told of every equation in order."""

    def follow(self, eqn: Equation) -> None:
        """Take note of an equation."""
        ...

    def enter(self, operands: Sequence[Value], inputs: Sequence[Value], num_constants: int, num_carry: int) -> None:
        """The equations that follow are of a scan over `operands`, whose step has these `inputs`."""
        ...

    def leave(self, operands: Sequence[Value], loop: Loop) -> bool:
        """End of that scan's equations: does it stay?"""
        ...


def trace(fn: Callable[..., Any], *args: Any, rows: int | None = None, judge: LoopJudge | None = None) -> Program:
    """Flat program of `fn(*args)` without what its outputs do not need.

    Args:
      args: pytrees of arrays or `jax.ShapeDtypeStruct`.
      rows: scans of so many steps run along the tokens and stay, if they carry something.
      judge: says which others stay; without one all are unrolled.

    Raises:
      TraceError: JAX could not trace the function.
    """
    try:
        closed = jax.make_jaxpr(fn)(*args)
    except Exception as error:
        raise TraceError(f"the model could not be traced: {type(error).__name__}: {error}") from error
    flattener = _Flattener(rows, judge)
    inputs = [flattener.new(var.aval) for var in closed.jaxpr.invars]
    outputs = flattener.inline(closed.jaxpr, closed.consts, inputs)
    return Program(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        equations=tuple(live(flattener.equations, outputs)),
        constants=flattener.constants,
    )


def trace_onto(values: Sequence[Value], fn: Callable[..., Any], where: str) -> Program:
    """The program of `fn` on values of another program, to be put into that at the model's line `where`."""
    traced = trace(fn, *(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values))
    known = dict(zip(traced.inputs, values, strict=True))
    equations = (
        replace(eqn, inputs=tuple(known.get(value, value) for value in eqn.inputs), where=where)
        for eqn in traced.equations
    )
    outputs = tuple(known.get(value, value) for value in traced.outputs)
    return Program(inputs=tuple(values), outputs=outputs, equations=tuple(equations), constants=traced.constants)


def live(equations: Sequence[Equation], outputs: Sequence[Value]) -> list[Equation]:
    """The equations that the outputs need, in order."""
    needed, kept = set(outputs), []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outputs):
            needed.update(eqn.inputs)
            kept.append(eqn)
    return kept[::-1]


class _Flattener:
    """Expands calls and scans; equations that repeat an earlier one (the same rotary table in each layer) become it."""

    def __init__(self, rows: int | None, judge: LoopJudge | None) -> None:
        self.rows, self.judge = rows, judge
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
            value = self.known.setdefault(("array", id(array)), [self.new(aval)])[0]  # the body of a scan comes often
        self.constants[value] = array
        return value

    def add(self, eqn: Any, operands: Sequence[Value], where: str, loop: Loop | None = None) -> list[Value]:
        key = (eqn.primitive, tuple(operands), repr(sorted(eqn.params.items(), key=lambda item: item[0])))
        if key in self.known and not eqn.effects:
            return self.known[key]
        results = [self.new(var.aval) for var in eqn.outvars]
        self.append(_equation(eqn, operands, results, where, loop))
        self.known[key] = results
        return results

    def append(self, eqn: Equation) -> None:
        self.equations.append(eqn)
        if self.judge is not None:
            self.judge.follow(eqn)

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
            elif eqn.primitive.name == "scan":
                results = self.scan(eqn, operands, where)
            elif eqn.primitive.name == "pad" and not np.any(eqn.params["padding_config"]):
                results = operands[:1]
            elif eqn.primitive.name == "split":
                results = self.slices(operands[0], eqn.params["axis"], eqn.params["sizes"], where)
            else:
                results = self.add(eqn, operands, where)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def scan(self, eqn: Any, operands: Sequence[Value], where: str) -> list[Value]:
        if eqn.params["length"] != self.rows:
            loop = None if self.judge is None else self.loop(eqn.params, operands, self.judge)
            return self.unroll(eqn.params, operands, where) if loop is None else self.add(eqn, operands, where, loop)
        if _scan_counts(eqn.params)[1] == 0:
            return self.side_by_side(eqn.params, operands, where)
        return self.add(eqn, operands, where)

    def loop(self, params: Mapping[str, Any], operands: Sequence[Value], judge: LoopJudge) -> Loop | None:
        """The scan as a loop, if it stays one."""
        body, (num_constants, num_carry) = params["jaxpr"], _scan_counts(params)
        inside = _Flattener(self.rows, judge)
        inputs = [inside.new(var.aval) for var in getattr(body, "jaxpr", body).invars]
        judge.enter(operands, inputs, num_constants, num_carry)
        outputs = inside.inline(getattr(body, "jaxpr", body), getattr(body, "consts", ()), inputs)
        loop = Loop(
            body=Program(
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                equations=tuple(live(inside.equations, outputs)),
                constants=inside.constants,
            ),
            num_constants=num_constants,
            num_carry=num_carry,
            length=params["length"],
            reverse=params["reverse"],
        )
        if not judge.leave(operands, loop):
            return None
        self.constants.update(inside.constants)
        return loop

    def unroll(self, params: Mapping[str, Any], operands: Sequence[Value], where: str) -> list[Value]:
        """The equations of every step of a scan."""
        body, (num_consts, num_carry) = params["jaxpr"], _scan_counts(params)
        consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        collected: list[Sequence[Value]] = []
        for index in range(params["length"]):
            step = params["length"] - 1 - index if params["reverse"] else index
            layer = [self.take_layer(value, step, where) for value in operands[num_consts + num_carry :]]
            inner, captured = getattr(body, "jaxpr", body), getattr(body, "consts", ())
            results = self.inline(inner, captured, [*consts, *carry, *layer], where)
            carry = results[:num_carry]
            collected.append(results[num_carry:])
        ordered = collected[::-1] if params["reverse"] else collected
        return [*carry, *(self.stack(layers, where) for layers in zip(*ordered, strict=True))]

    def side_by_side(self, params: Mapping[str, Any], operands: Sequence[Value], where: str) -> list[Value]:
        """The equations of a scan that carries nothing (`lax.map`): what vmap makes of its body."""
        num_consts, _ = _scan_counts(params)
        axes = (None,) * num_consts + (0,) * (len(operands) - num_consts)
        body = jax.vmap(jex_core.jaxpr_as_fun(params["jaxpr"]), in_axes=axes, axis_size=params["length"])
        closed = jax.make_jaxpr(body)(*(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in operands))
        return self.inline(closed.jaxpr, closed.consts, operands, where)

    def take_layer(self, value: Value, index: int, where: str) -> Value:
        key = ("take_layer", value, index)
        if key not in self.known:
            self.known[key] = [
                self.own(
                    "take_layer",
                    [value],
                    value.shape[1:],
                    where,
                    lambda array, *, index: jnp.asarray(array[index]),
                    index=index,
                )
            ]
        return self.known[key][0]

    def slices(self, value: Value, axis: int, sizes: Sequence[int], where: str) -> list[Value]:
        """The parts of a split."""
        key = ("slices", value, axis, tuple(sizes))
        if key not in self.known:
            self.known[key] = []
            for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True):
                starts, limits = [0] * len(value.shape), list(value.shape)
                starts[axis], limits[axis] = int(stop - size), int(stop)
                bounds = {"start_indices": tuple(starts), "limit_indices": tuple(limits), "strides": None}
                shape = tuple(np.subtract(limits, starts).tolist())
                self.known[key].append(self.own("slice", [value], shape, where, jax.lax.slice, **bounds))
        return self.known[key]

    def stack(self, layers: Sequence[Value], where: str) -> Value:
        shape = (len(layers), *layers[0].shape)
        return self.own("stack", layers, shape, where, lambda *arrays, axis: jnp.stack(arrays, axis), axis=0)

    def own(
        self,
        primitive: str,
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        where: str,
        bind: Callable[..., Any],
        **params: Any,
    ) -> Value:
        """The result of an equation that is in no jaxpr."""
        made = Value(shape, inputs[0].dtype)
        self.append(
            Equation(primitive=primitive, inputs=tuple(inputs), outputs=(made,), params=params, where=where, bind=bind)
        )
        return made


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Operands of a scan that are constant, and that are carried; JAX 0.12 keeps them as trees."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _equation(eqn: Any, inputs: Sequence[Value], outputs: Sequence[Value], where: str, loop: Loop | None) -> Equation:
    return Equation(
        primitive=eqn.primitive.name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        params=dict(eqn.params),
        where=where,
        bind=eqn.primitive.bind,
        loop=loop,
    )
