"""The minimum cut against a graph whose optimum is known, and against trying every choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partition.cost import FLOPS_PER_CARRIED_BYTE, carry_flops, flops
from partition.crossing import cheapest_crossing
from partition.jaxpr import Equation, Value, trace
from partition.structure import closure, producers


class Graph:
    """Named values and equations; `costs` of equations by what they make, `carry` of values (None: impossible)."""

    def __init__(self, made: Mapping[str, tuple[str, ...]], costs: Mapping[str, int], carry: Mapping[str, int | None]):
        self.values = {name: Value((), np.float32) for name in carry}
        self.names = {value: name for name, value in self.values.items()}
        self.equations = [self._equation(out, inputs) for out, inputs in made.items()]
        self.made_by = producers(self.equations)
        self.costs, self.carry = costs, carry

    def _equation(self, out: str, inputs: tuple[str, ...]) -> Equation:
        return Equation(
            primitive="any",
            inputs=tuple(self.values[name] for name in inputs),
            outputs=(self.values[out],),
            params={},
            where="",
            bind=lambda: None,
        )

    def name(self, eqn: Equation) -> str:
        return self.names[eqn.outputs[0]]

    def ahead(self, sent: list[str]) -> set[Equation]:
        return closure([self.values[name] for name in sent], self.made_by, lambda _: True)

    def cut(self, needed: list[str], sent: list[str]) -> tuple[set[str], set[str], int]:
        """(carried, done behind, cost) by the minimum cut."""
        found = cheapest_crossing(
            [self.values[name] for name in needed],
            self.made_by,
            self.ahead(sent),
            carry_cost=lambda value: self.carry[self.names[value]],
            cost=lambda eqn: self.costs[self.name(eqn)],
        )
        return {self.names[v] for v in found.carried}, {self.name(eqn) for eqn in found.behind}, found.cost

    def total(self, needed: list[str], sent: list[str], behind: set[Equation]) -> float:
        """Cost of everything, both sides, if just these are done behind; inf where that does not give `needed`."""
        read = {self.values[name] for name in needed} | {value for eqn in behind for value in eqn.inputs}
        made = {value for eqn in behind for value in eqn.outputs}
        carried = [value for value in read - made if self.carry[self.names[value]] != 0]
        costs = [self.carry[self.names[value]] for value in carried]
        if None in costs:
            return math.inf
        front = self.ahead(sent) | closure(carried, self.made_by, lambda _: True)
        return sum(costs) + sum(self.costs[self.name(eqn)] for eqn in (*front, *behind))


def test_a_gate_waits_behind_and_a_norm_is_done_twice():
    """x -> norm -> q (sent), norm -> gate (needed); the residual x is needed too."""
    graph = Graph(
        made={"norm": ("x",), "q": ("norm",), "gate": ("norm",)},
        costs={"norm": 5, "q": 100, "gate": 100},
        carry={"x": 10, "norm": 10, "q": 10, "gate": 10},
    )
    assert graph.cut(["x", "gate"], sent=["q"]) == ({"x"}, {"norm", "gate"}, 10 + 5)


def test_a_dear_product_is_carried_and_a_widening_is_not():
    """sent: all; the wide form of a cheap cast is needed, and a product."""
    graph = Graph(
        made={"wide": ("x",), "product": ("x",), "q": ("wide", "product")},
        costs={"wide": 1, "product": 1000, "q": 1},
        carry={"x": 4, "wide": 8, "product": 8, "q": 1},
    )
    assert graph.cut(["wide", "product"], sent=["q"]) == ({"x", "product"}, {"wide"}, 4 + 8 + 1)


def test_what_cannot_be_carried_is_done_behind_at_any_price_and_what_is_at_hand_is_free():
    graph = Graph(
        made={"rows": ("tokens",), "sorted": ("rows",), "q": ("sorted",)},
        costs={"rows": 30, "sorted": 1000, "q": 1},
        carry={"tokens": 0, "rows": 20, "sorted": None, "q": 1},
    )
    assert graph.cut(["sorted"], sent=["q"]) == ({"rows"}, {"sorted"}, 1020)
    assert graph.cut(["tokens"], sent=["q"]) == (set(), set(), 0)


@st.composite
def _graphs(draw: st.DrawFn) -> tuple[Graph, list[str], list[str]]:
    count = draw(st.integers(2, 7))
    names = ["a", "b", *(f"v{index}" for index in range(count))]
    made = {
        name: tuple(draw(st.lists(st.sampled_from(names[:index]), min_size=1, max_size=3, unique=True)))
        for index, name in enumerate(names)
        if index >= 2
    }
    costs = {name: draw(st.integers(1, 12)) for name in made}
    carry: dict[str, int | None] = {name: draw(st.integers(1, 12) | st.none()) for name in made}
    carry |= {"a": draw(st.integers(1, 12)), "b": 0}
    pick = st.lists(st.sampled_from(list(made)), min_size=1, max_size=3, unique=True)
    return Graph(made, costs, carry), draw(pick), draw(pick)


@settings(deadline=None, max_examples=150)
@given(_graphs())
def test_no_choice_is_cheaper_than_the_minimum_cut(drawn):
    graph, needed, sent = drawn
    leading = closure([graph.values[name] for name in needed], graph.made_by, lambda _: True)
    choices = itertools.chain.from_iterable(itertools.combinations(leading, n) for n in range(len(leading) + 1))
    best = min(graph.total(needed, sent, set(behind)) for behind in choices)
    _, behind, cost = graph.cut(needed, sent)
    chosen = {graph.made_by[graph.values[name]] for name in behind}
    assert graph.total(needed, sent, chosen) == best
    once = graph.ahead(sent) | leading
    assert cost == best - sum(graph.costs[graph.name(eqn)] for eqn in once)


@pytest.mark.parametrize(
    ("fn", "operands", "expected"),
    [
        (lambda x, w: x @ w, ((5, 7), (7, 3)), 2 * 5 * 7 * 3),
        (lambda x, w: x.sum(1) + w, ((5, 7), (5,)), 5 * 7 + 5),
        (lambda x, w: x * w[0], ((5, 7), (1,)), 1 + 35),
    ],
)
def test_flops_are_counted_by_the_operations_of_each_element(fn, operands, expected):
    program = trace(fn, *(np.zeros(shape, np.float32) for shape in operands))
    counted = [eqn for eqn in program.equations if eqn.primitive in ("dot_general", "mul", "add", "reduce_sum")]
    counted += [eqn for eqn in program.equations if eqn.primitive in ("squeeze",)]
    assert sum(flops(eqn) for eqn in counted) == expected


def test_a_lookup_is_never_cheaper_than_carrying_what_it_gives():
    program = trace(lambda table, ids: table[ids], np.zeros((50, 8), np.float32), np.zeros(3, np.int32))
    (lookup,) = [eqn for eqn in program.equations if eqn.primitive == "gather"]
    assert carry_flops(lookup.outputs[0]) == 3 * 8 * 4 * FLOPS_PER_CARRIED_BYTE < flops(lookup)
