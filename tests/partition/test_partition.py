"""The cut decoder equals the plain model; plans do not grow with depth; stages work at any number of rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo_attention
from partition import TraceError, partition, prepare_weights, reference_attention, stage_functions
from small_model import SmallModel, library_attention, softmax_attention


def run_stages(plan, params, tokens):
    """Logits [T, vocab] by the plan's stages, with the NumPy definition of each site in between."""
    weights = prepare_weights(plan, params)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    values = {}
    for stage, run in zip(plan.stages, stage_functions(plan, jax.jit), strict=True):
        externals = [weights[value] for value in stage.externals]
        writes, sends = run(externals, tokens, positions, [values[value] for value in stage.reads])
        values.update(zip(stage.writes, writes, strict=True))
        if sends:
            site = plan.sites[stage.index]
            q, k, v = (np.asarray(array, np.float64) for array in sends)
            out = reference_attention(site.spec, q, k, v, np.asarray(positions), np.asarray(positions))
            values[site.site.outputs[0]] = jnp.asarray(out, sends[0].dtype)
    return np.asarray(writes[0]).reshape(len(tokens), -1)


MODELS = {
    "jax.nn": SmallModel(),
    "jax.nn window": SmallModel(attention=functools.partial(library_attention, local_window_size=(4, 0))),
    "einsum": SmallModel(attention=softmax_attention),
    "einsum window": SmallModel(attention=functools.partial(softmax_attention, window=5)),
    "soft cap": SmallModel(attention=functools.partial(softmax_attention, cap=2.0, scale=0.9)),
    "finite mask": SmallModel(attention=functools.partial(softmax_attention, mask_value=-1e9)),
    "multi head": SmallModel(kv_heads=6),
    "multi query": SmallModel(kv_heads=1),
    "no positions": SmallModel(encode=lambda x, positions: x),
    "arange inside": SmallModel(encode=lambda x, p: x * jnp.cos(jnp.arange(x.shape[1]) * 0.3)[None, :, None, None]),
    "numpy arange inside": SmallModel(
        encode=lambda x, p: x * jnp.cos(np.arange(x.shape[1], dtype=np.float32) * 0.3)[None, :, None, None]
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 9, 64])
def test_stages_equal_the_plain_model(name, rows):
    model, params = MODELS[name], MODELS[name].params()
    plan = partition(model, params, max_rows=128)
    tokens = jnp.asarray(np.random.default_rng(rows).integers(0, model.vocab, rows), jnp.int32)
    expected = model(params, tokens[None], jnp.arange(rows, dtype=jnp.int32)[None])[0]
    np.testing.assert_allclose(run_stages(plan, params, tokens), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            SmallModel(),
            {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "scale": 0.5, "window": None, "softcap": None},
        ),
        (MODELS["jax.nn window"], {"window": 5}),
        (MODELS["einsum window"], {"window": 5, "num_kv_heads": 2}),
        (MODELS["soft cap"], {"softcap": 2.0, "scale": pytest.approx(0.9, rel=1e-4)}),
        (MODELS["multi query"], {"num_kv_heads": 1, "num_heads": 6}),
        (SmallModel(attention=zoo_attention.alibi), {"alibi_slopes": (0.5, 0.25, 0.125, 2**-4, 2**-5, 2**-6)}),
    ],
)
def test_site_parameters_are_read_by_running_the_site(model, expected):
    plan = partition(model, model.params(), max_rows=128)
    assert len(plan.sites) == model.layers
    for site in plan.sites:
        assert {name: getattr(site.spec, name) for name in expected} == expected


def test_a_long_window_is_found_exactly():
    model = SmallModel(layers=1, attention=functools.partial(library_attention, local_window_size=(4095, 0)))
    assert partition(model, model.params(), max_rows=8192).sites[0].spec.window == 4096


def test_window_longer_than_any_sequence_is_full_attention():
    model = SmallModel(layers=1, attention=functools.partial(softmax_attention, window=500))
    assert partition(model, model.params(), max_rows=256).sites[0].spec.window is None


def test_executables_do_not_grow_with_depth():
    plans = [partition(SmallModel(layers=n), SmallModel(layers=n).params(), max_rows=64) for n in (3, 30)]
    assert [plan.num_dense_executables for plan in plans] == [3, 3]
    assert [plan.num_attention_executables for plan in plans] == [1, 1]
    assert [len(plan.stages) for plan in plans] == [4, 31]


def test_stages_with_different_constants_do_not_share_an_executable():
    class Scaled(SmallModel):
        def __call__(self, params, tokens, positions):
            depth = iter(range(1, 10))
            inner = SmallModel(layers=self.layers, mix=lambda x: x * float(next(depth)))
            return inner(params, tokens, positions)

    plan = partition(Scaled(layers=3), Scaled(layers=3).params(), max_rows=64)
    assert plan.num_dense_executables == 4


def test_last_stage_for_chosen_rows_equals_those_rows():
    model, params = SmallModel(), SmallModel().params()
    plan = partition(model, params, max_rows=64)
    functions, last = stage_functions(plan, lambda function: function), plan.stages[-1]
    weights = [prepare_weights(plan, params)[value] for value in last.externals]
    random = np.random.default_rng(0)
    shapes = {value: value.shape for value in last.reads}
    reads = []
    for value in last.reads:
        is_site = value in plan.sites[-1].site.outputs
        shape = (7, 6, 4) if is_site else (1, 7, *shapes[value][2:])
        reads.append(jnp.asarray(random.normal(size=shape), jnp.float32))
    tokens, positions = jnp.zeros(7, jnp.int32), jnp.arange(7, dtype=jnp.int32)
    (whole,) = functions[-1](weights, tokens, positions, reads)[0]
    (chosen,) = functions[-1].select(weights, tokens, positions, reads, jnp.array([5, 0, 5]))
    np.testing.assert_allclose(chosen[0], whole[0][np.array([5, 0, 5])], rtol=1e-5, atol=1e-6)


def test_grouped_heads_cache_only_kv_heads_and_the_carry_stays():
    plan = partition(SmallModel(), SmallModel().params(), max_rows=64)
    middle = plan.stages[1]
    assert {send.port.name: plan.row_bytes(send.value) for send in middle.sends} == {"q": 96, "k": 32, "v": 32}
    assert [plan.row_bytes(value) for value in middle.writes] == [24 * 4]
    assert plan.kv_bytes_per_token(4) == 2 * 2 * 8 * 4


def test_keys_repeated_or_widened_before_attention_are_cached_few_and_narrow():
    model = SmallModel(attention=zoo_attention.upcast_and_repeated)
    plan = partition(model, model.params(), max_rows=64)
    sent = {send.port.name: plan.row_bytes(send.value) for send in plan.stages[1].sends}
    assert sent == {"q": 48, "k": 16, "v": 16}
    assert plan.sites[0].spec.num_kv_heads == 2


def test_layers_that_share_keys_and_values_send_and_keep_them_once():
    shared, own = zoo_attention.SharedKeysModel(layers=3), SmallModel(layers=3)
    plans = [partition(model, model.params(), max_rows=64) for model in (shared, own)]
    assert [plan.kv_bytes_per_token(4) for plan in plans] == [2 * 8 * 4, 3 * 2 * 8 * 4]
    sent = [[(send.site, send.port.name) for stage in plan.stages for send in stage.sends] for plan in plans]
    assert sent[0] == [(0, "q"), (0, "k"), (0, "v"), (1, "q"), (2, "q")]
    assert len(sent[1]) == 9
    assert "keys and values are those of an earlier site" in repr(plans[0])


def test_plan_prints_stages_sites_and_bytes():
    text = repr(partition(SmallModel(layers=5), SmallModel(layers=5).params(), max_rows=64))
    assert "6 dense stages and 5 attention sites" in text
    assert "stages 1..4" in text
    assert "6 heads over 2 kv heads of 4" in text
    assert "keeps 96 B/row, sends 160 B/row (q 96, k 32, v 32; q after " in text


def test_rotary_tables_are_looked_up_and_no_weight_is_copied():
    model, params = SmallModel(layers=1), SmallModel(layers=1).params()
    plan = partition(model, params, max_rows=64)
    prepared = prepare_weights(plan, params)
    leaves = {id(leaf) for leaf in jax.tree.leaves(params)}
    extra = [array.shape for array in prepared.values() if id(array) not in leaves]
    assert sorted(extra) == [(1, 64, 2), (1, 64, 2)]


def test_model_that_depends_on_the_number_of_tokens_is_refused():
    model = SmallModel(mix=lambda x: x / x.shape[1])
    with pytest.raises(TraceError, match=r"depends on the number of tokens.*"):
        partition(model, model.params(), max_rows=64)


def test_position_that_counts_from_the_end_is_refused():
    model = SmallModel(encode=lambda x, p: x * (x.shape[1] - jnp.arange(x.shape[1]))[None, :, None, None])
    with pytest.raises(TraceError, match="depends on the number of tokens"):
        partition(model, model.params(), max_rows=64)


def test_model_that_fails_while_traced_names_the_reason():
    def broken(params, tokens, positions):
        raise ValueError("no such layer")

    with pytest.raises(TraceError, match="ValueError: no such layer"):
        partition(broken, {}, max_rows=64)


def test_model_that_returns_no_logits_per_token_is_refused():
    with pytest.raises(TraceError, match=r"must return logits \[1, T, vocab\]"):
        partition(lambda p, t, pos: p["e"][t].mT, {"e": jnp.ones((5, 3))}, max_rows=64)
