"""What the analysis says of a value: what it depends on, and one label per axis.

PLAIN       an ordinary axis
UNIFORM     an axis over the tokens along which the value is constant (the model broadcast it)
ROW         entry i belongs to token i (or, for position-only values, to position i)
ENTRY       0, 1, 2 ... over several entries per token: of use to sort them
Grouped(n)  n entries per token: entry i belongs to token i // n
Sorted(o)   the entries of a token axis in order o, which experts are chosen by
Side(p)     one of the two token axes of a pairing p: a value with an entry for every two tokens
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.IntEnum):
    """What a value depends on; the kind of a result is the largest kind of its operands."""

    CONSTANT = 0
    POSITION = 1
    TOKEN = 2


class Axis(enum.Enum):
    """Labels of an axis that say no more than their names."""

    PLAIN = "plain"
    UNIFORM = "uniform"
    ROW = "row"
    ENTRY = "entry"


@dataclass(frozen=True)
class Side:
    """Label of a token axis of a pairing, 0 or 1; which of them is the key side shows when it is reduced."""

    pairing: int
    side: int


@dataclass(frozen=True)
class Grouped:
    """Label of an axis with `entries` of each token, those of a token together."""

    entries: int


@dataclass(frozen=True)
class Sorted:
    """Label of an axis with the entries of another one in an order of their own."""

    order: int


Label = Axis | Side | Grouped | Sorted


def grouped(entries: int) -> Label:
    """The label of an axis with so many entries of each token."""
    return Axis.ROW if entries == 1 else Grouped(entries)


def is_row(label: Label) -> bool:
    """Does each entry of the axis belong to one token?"""
    return label is Axis.ROW or isinstance(label, (Grouped, Sorted))


@dataclass(frozen=True)
class Facts:
    """What is known of one value."""

    kind: Kind
    labels: tuple[Label, ...]

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides among the labels."""
        return tuple(label for label in self.labels if isinstance(label, Side))
