"""What is carried across a cut of the program and what is computed behind it: a minimum cut in a network of choices.

The program is cut in two. Some equations must be done in front (what they make is sent), some values are needed behind.
A value that is needed behind is carried, or its equation is done behind; then its operands are needed behind in turn.
Doing behind what is not done in front costs nothing; what is done on both sides is computed twice.

Three yes-or-no questions make the nodes, "yes" being the source's side:

needed v    is the value needed behind?
behind e    is the equation done behind?
not ahead e is the equation not done in front?

An edge of the network is paid for where its tail says yes and its head no. An infinite one is an implication.
Among equally cheap cuts it is the one that does most behind (the minimum cut with the fewest nodes at the sink), so the
choice depends on nothing but the structure: identical layers are cut in the same way.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from networkx.algorithms.flow import edmonds_karp

from partition.jaxpr import Equation, Value

_SOURCE, _SINK = "needed", "sent"


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """carried: values that are kept across the cut. behind: equations that are done behind it.

    cost: of what is carried, and of what is computed on both sides.
    """

    carried: frozenset[Value]
    behind: frozenset[Equation]
    cost: int


def cheapest_crossing(
    needed: Iterable[Value],
    made_by: Mapping[Value, Equation],
    ahead: Collection[Equation],
    *,
    carry_cost: Callable[[Value], int | None],
    cost: Callable[[Equation], int],
) -> Crossing:
    """The cheapest way to have `needed` behind the cut.

    Args:
      needed: values, of those that can be made in front.
      made_by: the equation of each value that has one.
      ahead: equations that are done in front in any case.
      carry_cost: of a value; 0: it is at hand on both sides, None: it cannot be carried.
      cost: of computing an equation a second time.
    """
    needed = [value for value in needed if carry_cost(value) != 0]
    network = _Network(made_by, ahead, carry_cost, cost, _limit(needed, carry_cost))
    network.need(needed)
    # The flow is small, a few values, and the paths are long: no preflows.
    total, (yes, _) = nx.minimum_cut(network.graph, _SOURCE, _SINK, flow_func=edmonds_karp)
    behind = frozenset(eqn for eqn in network.choices if ("behind", eqn) in yes)
    return Crossing(
        carried=frozenset(v for v in network.values if ("needed", v) in yes and made_by.get(v) not in behind),
        behind=behind,
        cost=total,
    )


def _limit(needed: Iterable[Value], carry_cost: Callable[[Value], int | None]) -> float:
    """What no cheapest way exceeds: carrying all."""
    costs = [carry_cost(value) for value in needed]
    return float("inf") if None in costs else sum(cost for cost in costs if cost is not None)


class _Network:
    """graph: the network. values, choices: those that it asks about."""

    def __init__(
        self,
        made_by: Mapping[Value, Equation],
        ahead: Collection[Equation],
        carry_cost: Callable[[Value], int | None],
        cost: Callable[[Equation], int],
        limit: float,
    ) -> None:
        self.made_by, self.ahead, self.carry_cost, self.cost, self.limit = made_by, ahead, carry_cost, cost, limit
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from((_SOURCE, _SINK))
        self.values: dict[Value, None] = {}
        self.choices: dict[Equation, None] = {}

    def add_edge(self, tail: Any, head: Any, cost: int | None = None) -> None:
        """Without a cost: infinite, as networkx has it."""
        self.graph.add_edge(tail, head, **({} if cost is None else {"capacity": cost}))

    def need(self, needed: Iterable[Value]) -> None:
        """Ask about these values and about all that they are made of, the cheapest to reach first.

        What is done in front and, with the way to it, costs more than any cheapest cut is not done again.
        """
        order = itertools.count()
        queue = [(0, next(order), value) for value in needed]
        for _, _, value in queue:
            self.add_edge(_SOURCE, ("needed", value))
        while queue:
            spent, _, value = heapq.heappop(queue)
            if value in self.values:
                continue
            self.values[value] = None
            eqn = self.made_by.get(value)
            if eqn is not None and eqn in self.ahead:
                spent += self.cost(eqn)
            if eqn is None or spent > self.limit:
                self.add_edge(("needed", value), _SINK, self.carry_cost(value))
                continue
            self.add_edge(("needed", value), ("behind", eqn), self.carry_cost(value))
            for operand in self.choose(eqn):
                heapq.heappush(queue, (spent, next(order), operand))

    def choose(self, eqn: Equation) -> list[Value]:
        """Ask where an equation is done; the operands that this is about."""
        if eqn in self.choices:
            return []
        self.choices[eqn] = None
        self.add_edge(("behind", eqn), ("not ahead", eqn), self.cost(eqn))
        self.add_edge(("not ahead", eqn), ("behind", eqn))
        if eqn in self.ahead:
            self.add_edge(("not ahead", eqn), _SINK)
        operands = [value for value in eqn.inputs if self.carry_cost(value) != 0]
        for value in operands:
            self.add_edge(("behind", eqn), ("needed", value))
            maker = self.made_by.get(value)
            if maker is not None:  # what is done in front has its operands made there
                self.add_edge(("not ahead", maker), ("not ahead", eqn))
        return operands
