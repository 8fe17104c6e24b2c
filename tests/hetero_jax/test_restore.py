"""An Orbax checkpoint of training goes leaf by leaf to the tier that reads it, with two XLA CPU devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import hetero_jax as hj
from hetero_jax.errors import CheckpointError
from small_model import SmallModel, softmax_attention
from zoo_attention import sink_logits

MODEL = SmallModel(attention=sink_logits, extra={"sinks": (6,)})
GREEDY = hj.SamplingParams(max_tokens=6, temperature=0)
CONFIG = hj.EngineConfig(kv_cache_bytes=1 << 18, page_size=4, max_num_batched_tokens=8)

_SCRIPT = """
import json, sys
import jax
import orbax.checkpoint as ocp
import hetero_jax as hj
from test_restore import CONFIG, GREEDY, MODEL
from jax.sharding import Mesh, NamedSharding, PartitionSpec

params = {**MODEL.params(), "optimizer": jax.numpy.ones(3)}
split = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))  # as training on two devices had it
saved = {**params, "layers": jax.tree.map(lambda leaf: jax.device_put(leaf, split), params["layers"])}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], saved)
plan = hj.partition(MODEL, jax.eval_shape(MODEL.params), max_rows=64)
restored = hj.restore(plan, sys.argv[1], CONFIG)
tokens = [[list(each.token_ids) for each in hj.Engine(of, CONFIG).generate([[1, 2, 3]], GREEDY)]
          for of in (restored, hj.partition(MODEL, MODEL.params(), max_rows=64))]
where = {jax.tree_util.keystr(path): str(leaf.sharding.device_set.pop())
         for path, leaf in jax.tree_util.tree_leaves_with_path(restored.forward.params)}
print(json.dumps({"tokens": tokens, "where": where, "devices": [str(d) for d in jax.devices()]}))
"""


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory) -> dict:
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)]),
    }
    folder = tmp_path_factory.mktemp("restore") / "checkpoint"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_leaf_goes_to_the_tier_that_reads_it(two_devices):
    first, second = two_devices["devices"]
    assert len(two_devices["where"]) == len(jax.tree.leaves(MODEL.params()))
    for name, device in two_devices["where"].items():
        assert device == (second if "sinks" in name else first), name


def test_an_engine_of_it_gives_the_tokens_of_the_parameters_that_were_saved(two_devices):
    restored, expected = two_devices["tokens"]
    assert restored == expected


def _save(params, folder: Path) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:  # a file for each leaf
        checkpointer.save(folder, args=ocp.args.PyTreeSave(params))
    return folder


def _first_layer(params, tokens, positions):
    """A model that leaves its second layer unread."""
    return SmallModel()({**params, "layers": params["layers"][:1]}, tokens, positions)


def test_what_nothing_reads_is_not_read(tmp_path):
    params, abstract = SmallModel().params(), jax.eval_shape(SmallModel().params)
    folder = _save(params, tmp_path / "checkpoint")
    for chunk in folder.glob("layers.1.*/[0-9]*"):
        chunk.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="checkpoint: "):
        hj.restore(hj.partition(SmallModel(), abstract, max_rows=64), folder)
    plan = hj.restore(hj.partition(_first_layer, abstract, max_rows=64), folder)
    assert isinstance(plan.forward.params["layers"][1]["up"], jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(plan.forward.params["layers"][0]["up"], params["layers"][0]["up"])
    assert len(list(hj.Engine(plan, CONFIG).generate([[1, 2]], GREEDY))) == 1


def test_leaves_come_in_the_dtype_of_the_plan(tmp_path):
    params = SmallModel().params()
    abstract = jax.eval_shape(lambda: SmallModel().params(dtype=jnp.bfloat16))
    plan = hj.partition(SmallModel(attention=softmax_attention), abstract, max_rows=64)
    restored = hj.restore(plan, _save(params, tmp_path / "checkpoint")).forward.params["embed"]
    assert restored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored, params["embed"].astype(jnp.bfloat16))


class Module(nnx.Module):
    def __init__(self, seed):
        params = SmallModel().params(seed)
        self.embed = nnx.Param(params["embed"])
        self.layers = nnx.List([nnx.Dict(jax.tree.map(nnx.Param, layer)) for layer in params["layers"]])
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    def __call__(self, tokens, positions):
        layers = [{name: leaf[...] for name, leaf in layer.items() if name != "extra"} for layer in self.layers]
        params = {"embed": self.embed[...], "layers": [{**layer, "extra": {}} for layer in layers]}
        return SmallModel()(params, tokens, positions)


def test_a_state_of_an_nnx_module_is_found_by_its_names(tmp_path):
    folder = _save(nnx.state(Module(3)), tmp_path / "checkpoint")
    plan = hj.restore(hj.partition(nnx.eval_shape(lambda: Module(0)), max_rows=64), folder)
    np.testing.assert_array_equal(plan.forward.params["embed"][...], SmallModel().params(3)["embed"])
    ids = list(range(9))
    logits = plan.forward.fn(plan.forward.params, jnp.asarray([ids]), jnp.arange(9)[None])
    expected = SmallModel()(SmallModel().params(3), jnp.asarray([ids]), jnp.arange(9)[None])
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_checkpoints_of_something_else_are_refused_with_the_leaf(tmp_path):
    plan = hj.partition(SmallModel(), SmallModel().params(), max_rows=64)
    params = SmallModel().params()
    with pytest.raises(CheckpointError, match="nowhere: not a sound Orbax checkpoint"):
        hj.restore(plan, tmp_path / "nowhere")
    folder = _save({**params, "layers": params["layers"][:1]}, tmp_path / "fewer")
    with pytest.raises(CheckpointError, match=r"fewer: the leaf 'layers.1.down' is missing; it has 7: embed, layers.0"):
        hj.restore(plan, folder)
    folder = _save({**params, "embed": jnp.zeros((5, 24))}, tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"the leaf 'embed' has shape \(5, 24\); the plan was made for \(31, 24\)"
    ):
        hj.restore(plan, folder)
