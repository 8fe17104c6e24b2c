"""When are two pieces of a program the same computation? Equal keys share one executable and one recognition."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from partition.jaxpr import Equation, Value


def producers(equations: Iterable[Equation]) -> dict[Value, Equation]:
    """The equation that makes each value."""
    return {value: eqn for eqn in equations for value in eqn.outputs}


def closure(
    roots: Iterable[Value], made_by: Mapping[Value, Equation], wanted: Callable[[Value], bool]
) -> set[Equation]:
    """All equations that `roots` need, following only values that are `wanted`."""
    found: set[Equation] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        eqn = made_by.get(value)
        if eqn is None or eqn in found or not wanted(value):
            continue
        found.add(eqn)
        stack.extend(eqn.inputs)
    return found


def in_order_of_need(
    roots: Iterable[Value], made_by: Mapping[Value, Equation], members: Collection[Equation]
) -> tuple[Equation, ...]:
    """The `members` that `roots` need, operands first. The order is the same wherever the program has each of them."""
    ordered: dict[Equation, None] = {}
    stack = [(made_by.get(value), False) for value in reversed(list(roots))]
    while stack:
        eqn, is_ready = stack.pop()
        if eqn is None or eqn in ordered or eqn not in members:
            continue
        if is_ready:
            ordered[eqn] = None
        else:
            stack.append((eqn, True))
            stack.extend((made_by.get(value), False) for value in reversed(eqn.inputs))
    return tuple(ordered)


def structure_key(
    equations: Sequence[Equation],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Mapping[Value, Any],
    note: str = "",
) -> str:
    """Hash of a piece of program up to renaming: same primitives, parameters, shapes, wiring and constants."""
    digest = hashlib.sha256(note.encode())
    numbers = {value: index for index, value in enumerate(inputs)}

    def number(value: Value) -> int:
        if value not in numbers:
            numbers[value] = len(numbers)
            if value in constants:
                array = np.asarray(constants[value])
                digest.update(f"const {array.shape} {array.dtype}".encode() + array.tobytes())
        return numbers[value]

    for value in inputs:
        digest.update(f"in {value.shape} {value.dtype};".encode())
    for eqn in equations:
        names = [number(value) for value in eqn.inputs] + [number(value) for value in eqn.outputs]
        shapes = [(value.shape, str(value.dtype)) for value in eqn.outputs]
        digest.update(f"{eqn.primitive} {sorted(eqn.params.items(), key=lambda p: p[0])} {names} {shapes};".encode())
    digest.update(str([number(value) for value in outputs]).encode())
    return digest.hexdigest()


def size_bytes(value: Value) -> int:
    """Bytes of a value as traced."""
    return math.prod(value.shape) * np.dtype(value.dtype).itemsize


def row_bytes(value: Value, traced_rows: int) -> int:
    """Bytes of one row of a token value."""
    return size_bytes(value) // traced_rows
