"""Placement with two XLA CPU devices: weights and dense stages on one, KV pools and attention on the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import json, sys
import jax
import hetero_jax as hj
config = hj.EngineConfig(tier1="cpu", attention=sys.argv[1], kv_cache_bytes=1 << 20, max_model_len=64)
engine = hj.Engine(hj.load("random:tiny"), config)
seen = {"q": set(), "dense": set()}
attend, run = engine._attention.attend, engine._dense.run
def spy_attend(site, layouts, inputs):
    outputs = attend(site, layouts, inputs)
    seen["q"] |= {str(d) for array in outputs for d in array.devices()}
    return outputs
def spy_run(*args):
    writes, sends = run(*args)
    seen["dense"] |= {str(d) for array in (*writes, *sends) for d in array.devices()}
    return writes, sends
engine._attention.attend, engine._dense.run = spy_attend, spy_run
params = hj.SamplingParams(max_tokens=8, temperature=0)
tokens = [list(c.token_ids) for c in engine.generate([[1, 2, 3], [4, 5]], params)]
pools = {str(d) for pool in engine._attention._pools for array in jax.tree.leaves(pool) for d in array.devices()}
weights = {str(d) for externals in engine._dense._externals for array in externals for d in array.devices()}
print(json.dumps({"tokens": sorted(tokens), "attention": sorted(seen["q"]), "dense": sorted(seen["dense"]),
                  "pools": sorted(pools), "weights": sorted(weights), "devices": [str(d) for d in jax.devices()]}))
"""


def _run(attention: str) -> dict:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, attention], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def placements() -> dict[str, dict]:
    return {attention: _run(attention) for attention in ("tier1", "tier2")}


def test_tier_2_holds_pools_and_attention_and_tier_1_the_weights(placements):
    seen = placements["tier2"]
    first, second = seen["devices"]
    assert (seen["weights"], seen["dense"]) == ([first], [first])
    assert (seen["pools"], seen["attention"]) == ([second], [second])


def test_attention_on_tier_1_puts_everything_there_and_gives_the_same_tokens(placements):
    seen = placements["tier1"]
    first, _ = seen["devices"]
    assert seen["pools"] == seen["attention"] == seen["weights"] == seen["dense"] == [first]
    assert seen["tokens"] == placements["tier2"]["tokens"]
