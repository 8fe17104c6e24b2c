"""Tables as the benches print them: a row at a time, as its figures come."""

from __future__ import annotations

from collections.abc import Sequence


def print_header(columns: Sequence[str]) -> None:
    """The first two lines of a Markdown table."""
    print_row(columns)
    print_row(["---"] * len(columns))


def print_row(cells: Sequence[object]) -> None:
    """One line of a Markdown table, written at once."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
