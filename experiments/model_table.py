"""Which models are partitioned, how completely, and what that costs: makes docs/models.md.

    pip install -e '.[zoo]' && python -m experiments.model_table --output=docs/models.md

Every model is small, random and unmodified. Times are of the processor, over all threads, so that other processes count
less; compiling is what an engine's first request takes over its second, at one shape of call. The error is the largest
difference of a logit of cached decoding (random prefill chunks and single rows) from the plain forward pass, as a part
of the largest logit.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import hetero_jax as hj
from experiments import scanned_model, third_party
from experiments.markdown import print_header, print_row

_OUTPUT = flags.DEFINE_string("output", None, "File to write; default: print.")
_LAYERS = flags.DEFINE_list("layers", ["2", "24"], "Two numbers of layers to compare.")

_INTRODUCTION = """# Models

What the partitioner makes of unmodified models: small random configurations of them, in f32 on a CPU with JAX {jax}.
Made by `python -m experiments.model_table`, which says what is measured. Executables are dense + attention ones, for
each number of rows that a call may have. Times are for {few} / {many} layers, sites and error those of {few} layers.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one model at one number of layers; times in CPU seconds of all threads."""

    sites: int
    recognised: int
    executables: str
    partition_s: float
    compile_s: float
    error: float


def measure(model_of_layers: Callable[[int], tuple[Any, Any]], layers: int) -> Figures:
    """Partition a model of `layers` layers, verify the plan, and time an engine's first requests."""
    model, params = model_of_layers(layers)
    start_s = time.process_time()
    plan = hj.partition(model, params, max_rows=third_party.MAX_ROWS)
    partition_s = time.process_time() - start_s
    tokens = np.random.default_rng(0).integers(0, plan.vocab_size, 40).tolist()
    error = plan.verify(plan.forward.params, tokens).logits
    engine = hj.Engine(plan, hj.EngineConfig(kv_cache_bytes=1 << 24, max_num_batched_tokens=8))
    first_s, second_s = (_seconds_of_request(engine) for _ in range(2))
    return Figures(
        sites=len(plan.sites),
        recognised=sum(site.spec is not None for site in plan.sites),
        executables=f"{plan.num_dense_executables} + {plan.num_attention_executables}",
        partition_s=partition_s,
        compile_s=first_s - second_s,
        error=error,
    )


def _seconds_of_request(engine: hj.Engine) -> float:
    start_s = time.process_time()
    list(engine.generate([[1, 2, 3]], hj.SamplingParams(max_tokens=2, temperature=0)))
    return time.process_time() - start_s


def _third_party(name: str, layers: int) -> tuple[Any, Any]:
    model = third_party.build(name, layers=layers)
    return model.fn, model.params


def _own(layers: int) -> tuple[Any, Any]:
    loaded = hj.load("random:tiny")
    config = dataclasses.replace(loaded.config, num_hidden_layers=layers)
    build: Any = type(loaded.module)
    return build(config, rngs=nnx.Rngs(0)), None


class _Scanned(nnx.Module):
    """Layers of one kind with their weights stacked, run by nnx.scan."""

    def __init__(self, layers: Sequence[Any]) -> None:
        graph, _ = nnx.split(layers[0])
        self.stacked = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, layers)))

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """[B, T, hidden] -> [B, T, hidden]."""
        over_layers = nnx.scan(lambda x, layer: layer(x, cos, sin), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return over_layers(x, self.stacked)


def _own_scanned(layers: int) -> tuple[Any, Any]:
    module, _ = _own(layers)
    module.blocks = nnx.List([_Scanned(module.blocks)])
    return module, None


# Other families of this project's models, by the names of their small shapes.
_FAMILIES = {
    "GPT-2": "tiny-gpt2",
    "GPT-NeoX": "tiny-gpt-neox",
    "Gemma 2": "tiny-gemma-2",
    "Gemma 3": "tiny-gemma-3",
    "Qwen3-MoE": "tiny-qwen3-moe",
    "Mixtral": "tiny-mixtral",
}


def _family(shape: str, layers: int) -> tuple[Any, Any]:
    loaded = hj.load(f"random:{shape}")
    config: Any = loaded.config
    types = getattr(config, "layer_types", None)
    repeated = {} if types is None else {"layer_types": (types * layers)[:layers]}
    build: Any = type(loaded.module)
    return build(dataclasses.replace(config, num_hidden_layers=layers, **repeated), rngs=nnx.Rngs(0)), None


def _models() -> Iterator[tuple[str, str, Callable[[int], tuple[Any, Any]]]]:
    """(name, library, the model and its parameters by number of layers)."""
    yield "Llama", "this project's", _own
    for name, shape in _FAMILIES.items():
        yield name, "this project's", functools.partial(_family, shape)
    yield "layers by linen.scan", "flax", scanned_model.build
    yield "Llama, layers by nnx.scan", "this project's", _own_scanned
    for name, (library, _) in third_party.MODELS.items():
        yield name, library, functools.partial(_third_party, name)


def _row(name: str, library: str, few: Figures, many: Figures) -> Sequence[object]:
    return (
        name,
        library,
        few.sites,
        few.recognised,
        few.executables,
        many.executables,
        f"{few.partition_s:.1f} / {many.partition_s:.1f}",
        f"{few.compile_s:.1f} / {many.compile_s:.1f}",
        f"{few.error:.1e}",
    )


def _print_table() -> None:
    few, many = _LAYERS.value
    print(_INTRODUCTION.format(jax=jax.__version__, few=few, many=many))
    columns = ("model", "library", "sites", "recognised", f"executables, {few} layers", f"{many} layers")
    print_header([*columns, "partition, CPU s", "compile, CPU s", "largest error"])
    for name, library, model_of_layers in _models():
        print_row(_row(name, library, *(measure(model_of_layers, int(layers)) for layers in (few, many))))


def main(argv: Sequence[str]) -> None:
    """Print the table, or write the file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if _OUTPUT.value is None:
        _print_table()
        return
    with Path(_OUTPUT.value).open("w", encoding="utf-8") as file, redirect_stdout(file):
        _print_table()


if __name__ == "__main__":
    app.run(main)
