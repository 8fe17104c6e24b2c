"""What stays on tier 1 across an attention: as little as one sees in the model, and the same in every layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from partition import partition
from partition.labels import Kind
from small_model import SmallModel, rms_norm, rope

ROW = 24 * 4  # bytes of a row of the residual stream


class ParallelModel(SmallModel):
    """Attention and MLP read one normed input side by side (GPT-J)."""

    def block(self, x, layer, positions):
        attended, h = self.attend(x, layer, positions)
        return x + attended @ layer["out"] + jax.nn.silu(h @ layer["up"]) @ layer["down"]

    def attend(self, x, layer, positions):
        h = rms_norm(x, layer["norm"])
        cuts = [self.heads * self.dim, (self.heads + self.kv_heads) * self.dim]
        parts = jnp.split(h @ layer["qkv"], cuts, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.dim) for part in parts)
        attended = self.attention(rope(q, positions), rope(k, positions), v, positions)
        return attended.reshape(*x.shape[:2], -1), h


class GatedModel(ParallelModel):
    """What attention gives is gated by the layer's input (Qwen3-Next)."""

    def block(self, x, layer, positions):
        attended, h = self.attend(x, layer, positions)
        return x + (attended * jax.nn.sigmoid(h @ layer["extra"]["gate"])) @ layer["out"]


class SkippingModel(ParallelModel):
    """The embedding is normed and added behind the last layer, and each layer looks up an embedding of its own."""

    def __call__(self, params, tokens, positions):
        x = first = params["embed"][tokens]
        for layer in params["layers"]:
            x = self.block(x, layer, positions) + layer["extra"]["embed"][tokens]
        return (x + rms_norm(first, layer["norm"])) @ params["embed"].T


MODELS = {
    "sequential": SmallModel(layers=4),
    "parallel": ParallelModel(layers=4),
    "gated": GatedModel(layers=4, extra={"gate": (24, 24)}),
    "skipping": SkippingModel(layers=4, extra={"embed": (31, 24)}),
}


@pytest.fixture(scope="module")
def plans():
    return {name: partition(model, model.params(), max_rows=64) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_the_plain_forward(plans, name):
    model, params = MODELS[name], MODELS[name].params()
    random = np.random.default_rng(0)
    sequences = [random.integers(0, model.vocab, length) for length in (21, 5)]
    for tokens, logits in zip(sequences, decode(plans[name], params, sequences), strict=True):
        expected = np.asarray(model(params, jnp.asarray(tokens)[None], jnp.arange(len(tokens))[None])[0])
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "rows"), [("sequential", 1), ("parallel", 1), ("gated", 1), ("skipping", 2)])
def test_what_is_carried_is_the_residual_stream_and_what_was_kept_from_the_start(plans, name, rows):
    assert [plans[name].carried_bytes(stage) for stage in plans[name].stages[1:-1]] == [rows * ROW] * 3


@pytest.mark.parametrize("name", MODELS)
def test_executables_do_not_grow_with_depth(plans, name):
    model = type(MODELS[name])(layers=8, extra=MODELS[name].extra)
    deeper = partition(model, model.params(), max_rows=64)
    # In the second stage the residual stream is the embedding that is kept.
    expected = 4 if name == "skipping" else 3
    assert deeper.num_dense_executables == plans[name].num_dense_executables == expected


@pytest.mark.parametrize("name", ["parallel", "gated"])
def test_the_norm_is_repeated_and_the_products_wait_behind_the_attention(plans, name):
    for stage in plans[name].stages[1:]:
        repeated = {eqn.primitive for eqn in stage.repeated}
        assert "rsqrt" in repeated
        assert "dot_general" not in repeated
    first, last = plans[name].stages[0], plans[name].stages[-1]
    products = [sum(eqn.primitive == "dot_general" for eqn in stage.equations) for stage in (first, last)]
    assert products == [1, {"parallel": 4, "gated": 3}[name]]
    assert "recomputes 8 equations (100 FLOPs/row) of small_model.py:47 (rms_norm)" in repr(plans[name])


def test_a_lookup_by_tokens_is_made_where_it_is_needed(plans):
    lookups = [sum(eqn.primitive == "gather" for eqn in stage.equations) for stage in plans["skipping"].stages]
    assert lookups == [1] * 5


@pytest.mark.parametrize("name", MODELS)
def test_only_values_of_tokens_are_carried(plans, name):
    facts = plans[name].analysis.facts
    rows = plans[name].analysis.traced.rows
    carried = [value for stage in plans[name].stages for value in stage.carried]
    assert all(facts[value].kind is Kind.TOKEN and value.shape[:2] == (1, rows) for value in carried)


def test_q_is_made_before_k_and_v_and_leaves_first(plans):
    plan = plans["parallel"]
    for stage in plan.stages[:-1]:
        assert [send.port.name for send in stage.sends] == ["q", "k", "v"]
        q, k, _ = (stage.equations_until([send.value]) for send in stage.sends)
        assert q < k <= len(stage.equations)
