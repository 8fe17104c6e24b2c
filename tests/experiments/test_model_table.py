"""What model_table measures, on the project's own model: nothing outside the project is needed."""

from __future__ import annotations

from pathlib import Path

from experiments import model_table


def test_a_deeper_model_has_as_many_executables_and_more_sites():
    few, many = (model_table.measure(model_table._own, layers) for layers in (2, 5))
    assert (few.sites, many.sites) == (2, 5) == (few.recognised, many.recognised)
    assert few.executables == many.executables == "3 + 1"
    assert 0 < few.error < 1e-5
    assert model_table._row("Llama", "ours", few, many)[:6] == ("Llama", "ours", 2, 2, "3 + 1", "3 + 1")


def test_every_model_has_its_row_in_the_documentation():
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ")[:2] for line in table if line.startswith("| ")][2:]
    assert rows == [[name, library] for name, library, _ in model_table._models()]
