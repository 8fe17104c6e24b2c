"""What it costs to carry a value across an attention, and to compute one again behind it: both in FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from partition.jaxpr import Equation, Value
from partition.structure import size_bytes

# A carried byte is written by one stage and read by a later one: two bytes of traffic. Vector units, which would
# compute instead, do about 14 FLOPs in the time of a byte on an H200 (67 TFLOP/s in f32, 4.8 TB/s), 10 on an A100
# (19.5, 2), 2 to 8 on CPUs: twice a middling 8. Matrix units do 200, but a product done again reads its weights again.
FLOPS_PER_CARRIED_BYTE = 16


def carry_flops(value: Value) -> int:
    """What carrying a value costs, at the traced number of rows."""
    return FLOPS_PER_CARRIED_BYTE * size_bytes(value)


def flops(eqn: Equation) -> int:
    """What evaluating an equation costs, at the traced number of rows: at least one operation per element.

    A lookup reads its result from somewhere in a table, so carrying the result is never dearer.
    """
    touched = max(math.prod(value.shape) for value in (*eqn.inputs, *eqn.outputs))
    if eqn.primitive == "gather":
        return math.prod(eqn.outputs[0].shape) + carry_flops(eqn.outputs[0])
    if eqn.primitive in ("dot_general", "ragged_dot_general"):
        return 2 * math.prod(eqn.outputs[0].shape) * _contracted(eqn)
    return touched


def _contracted(eqn: Equation) -> int:
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    axes: Sequence[int] = numbers[0][0]
    return math.prod(eqn.inputs[0].shape[axis] for axis in axes)
