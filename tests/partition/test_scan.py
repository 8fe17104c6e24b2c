"""A scan over layers is what its layers written out are, with slices of weights; one along the tokens is refused."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cached_decoding import decode
from partition import TokenMixingError, partition, prepare_weights
from small_model import SmallModel
from zoo_attention import sink_logits

MODEL = SmallModel(layers=3)


def _stacked(params):
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def _plain(params, tokens, positions, **options):
    """Layers by lax.scan, checkpointed."""

    def layer(x, weights):
        return jax.checkpoint(MODEL.block)(x, weights, positions), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"], **options)
    return x @ params["embed"].T


def _reversed(params, tokens, positions):
    backwards = {**params, "layers": jax.tree.map(lambda leaf: leaf[::-1], params["layers"])}
    return _plain(backwards, tokens, positions, reverse=True)


def _with_collected(params, tokens, positions):
    """Every layer's residual stream is collected, and the last one read; another collection is dropped."""

    def layer(x, weights):
        x = MODEL.block(x, weights, positions)
        return x, (x, x.sum(axis=1))

    _, (streams, _) = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return streams[-1] @ params["embed"].T


def _by_counter(params, tokens, positions):
    """Layers by fori_loop, each looked up by the counter."""

    def layer(index, x):
        return MODEL.block(x, jax.tree.map(lambda leaf: leaf[index], params["layers"]), positions)

    return jax.lax.fori_loop(0, 3, layer, params["embed"][tokens], unroll=False) @ params["embed"].T


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, positions):
        weights = MODEL.params()["layers"][0]
        mine = {
            name: self.param(name, lambda key, leaf=leaf: leaf) for name, leaf in weights.items() if name != "extra"
        }
        return MODEL.block(x, {**mine, "extra": {}}, positions), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, tokens, positions):
        embed = self.param("embed", lambda key: MODEL.params()["embed"])
        layers = linen.scan(
            linen.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=linen.broadcast,
            length=3,
        )
        x, _ = layers(name="layers")(embed[tokens], positions)
        return x @ embed.T


def _linen(params, tokens, positions):
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "extra"}
    return Scanned().apply({"params": {**params, "layers": layers}}, tokens, positions)


SCANS = {
    "lax.scan": _plain,
    "backwards": _reversed,
    "collected": _with_collected,
    "nn.scan": _linen,
    "fori_loop": _by_counter,
}


@pytest.mark.parametrize("name", SCANS)
def test_scanned_layers_decode_as_the_layers_written_out(name):
    params = _stacked(MODEL.params())
    plan = partition(SCANS[name], params, max_rows=64)
    assert [site.spec is not None for site in plan.sites] == [True] * 3
    assert plan.num_dense_executables == 3
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab, 12)
    (found,) = decode(plan, params, [tokens])
    expected = np.asarray(MODEL(MODEL.params(), jnp.asarray(tokens)[None], jnp.arange(12)[None])[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["lax.scan", "nn.scan"])
def test_stages_take_slices_of_stacked_weights_and_nothing_twice(name):
    params = _stacked(MODEL.params())
    prepared = prepare_weights(partition(SCANS[name], params, max_rows=64), params)
    tables = 2 * 64 * 2 * 4
    assert (
        sum(array.nbytes for array in prepared.values())
        == sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + tables
    )


class NnxBlock(nnx.Module):
    """MODEL's block with weights of its own."""

    def __init__(self, weights):
        self.weights = nnx.Dict({name: nnx.Param(leaf) for name, leaf in weights.items() if name != "extra"})

    def __call__(self, x, positions):
        return MODEL.block(x, {**{name: leaf[...] for name, leaf in self.weights.items()}, "extra": {}}, positions)


class NnxScanned(nnx.Module):
    """Layers stacked by nnx.vmap, and run by nnx.scan, checkpointed."""

    def __init__(self):
        params = _stacked(MODEL.params())
        self.embed = nnx.Param(params["embed"])
        self.layers = nnx.vmap(NnxBlock)({name: leaf for name, leaf in params["layers"].items() if name != "extra"})

    def __call__(self, tokens, positions):
        step = nnx.remat(lambda x, layer, positions: layer(x, positions))
        over_layers = nnx.scan(step, in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
        return over_layers(self.embed[...][tokens], self.layers, positions) @ self.embed[...].T


def test_layers_scanned_by_nnx_decode_as_the_layers_written_out():
    plan = partition(NnxScanned(), max_rows=64)
    assert [site.spec is not None for site in plan.sites] == [True] * 3
    assert (plan.num_dense_executables, plan.num_attention_executables) == (3, 1)
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab, 12)
    (found,) = decode(plan, plan.forward.params, [tokens])
    expected = np.asarray(MODEL(MODEL.params(), jnp.asarray(tokens)[None], jnp.arange(12)[None])[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_executables_of_scanned_layers_do_not_grow_with_depth():
    def plan(layers):
        return partition(_plain, _stacked(SmallModel(layers=layers).params()), max_rows=64)

    assert [plan(layers).num_dense_executables for layers in (3, 24)] == [3, 3]


def test_weights_inside_scanned_attention_are_sliced_too():
    model = SmallModel(attention=sink_logits, extra={"sinks": (6,)}, layers=4)

    def scanned(params, tokens, positions):
        x, _ = jax.lax.scan(
            lambda x, layer: (model.block(x, layer, positions), None), params["embed"][tokens], params["layers"]
        )
        return x @ params["embed"].T

    params = _stacked(model.params())
    plan = partition(scanned, params, max_rows=64)
    assert (plan.num_dense_executables, plan.num_attention_executables) == (3, 1)
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab, 12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the attention opened at")
        (found,) = decode(plan, params, [tokens])
    expected = np.asarray(model(model.params(), jnp.asarray(tokens)[None], jnp.arange(12)[None])[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_scan_along_the_tokens_is_refused_with_its_line():
    model = SmallModel(mix=lambda x: jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(24), x[0])[1][None])
    with pytest.raises(
        TokenMixingError, match=r"'scan' at .*test_scan\.py:\d+.*steps along the token axis.*recurrence"
    ):
        partition(model, model.params(), max_rows=64)
