"""Verification finds what is right and what is wrong, and where; the picture shows what the text says."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

import zoo_attention
from partition import PartitionError, partition
from small_model import SmallModel

TOKENS = np.random.default_rng(0).integers(0, 31, 26)
MODELS = {
    "recognised": SmallModel(layers=3),
    "by its own equations": SmallModel(attention=zoo_attention.relative_bias, extra={"table": (12, 6)}),
    "sinks": SmallModel(attention=zoo_attention.sink_logits, extra={"sinks": (6,)}),
    "bfloat16": SmallModel(encode=lambda x, positions: x),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_plan_differs_by_rounding_alone(name):
    model = MODELS[name]
    dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
    params = model.params(dtype=dtype)
    found = partition(model, params, max_rows=64).verify(params, TOKENS)
    bound = 16 * float(jnp.finfo(dtype).eps)
    assert sum(found.chunks) == 26
    assert {1} < set(found.chunks)
    assert (len(found.stages), len(found.sites)) == (model.layers + 1, model.layers)
    assert max(*found.stages, *found.sites, found.logits) <= bound
    assert found.logits > 0


def _with_site(plan, index, **changes):
    site = plan.sites[index]
    wrong = dataclasses.replace(site, spec=dataclasses.replace(site.spec, **changes))
    return dataclasses.replace(plan, sites=(*plan.sites[:index], wrong, *plan.sites[index + 1 :]))


def test_a_wrong_site_is_found_where_it_is():
    model = MODELS["recognised"]
    plan = partition(model, model.params(), max_rows=64)
    found = _with_site(plan, 1, window=3).verify(model.params(), TOKENS)
    assert max(*found.stages[:2], found.sites[0]) < 1e-5
    assert min(*found.stages[2:], *found.sites[1:], found.logits) > 1e-3
    assert "site 1" in repr(found)
    assert "logits" in repr(found)


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [1] * 65])
def test_tokens_that_no_sequence_has_are_refused(tokens):
    model = SmallModel(layers=1)
    with pytest.raises(PartitionError, match="allowed: 1 to 64 ids"):
        partition(model, model.params(), max_rows=64).verify(model.params(), tokens)


def test_the_picture_is_svg_with_every_stage_and_site(tmp_path):
    model = SmallModel(layers=4)
    plan = partition(model, model.params(), max_rows=64)
    plan.draw(tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    text = " ".join(each.text or "" for each in root.iter(f"{space}text"))
    assert len(list(root.iter(f"{space}rect"))) == 5
    for name in (
        "stage 0",
        "site 0",
        "stages 1..3",
        "sites 1..3",
        "stage 4",
        "sends 160 B/row",
        "6 heads over 2 kv heads",
    ):
        assert name in text
