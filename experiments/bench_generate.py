"""Prefill and decode tokens/s of hetero_jax, and of llama.cpp and transformers where they are installed.

    python -m experiments.bench_generate --model=SmolLM2-135M-Instruct.Q4_1.gguf

Every contender runs every point in a process of its own, one after the other on the same cores, so the ratios of a
point are of one run. Prefill: all prompts, each with its first token. Decode: all sequences decode and nothing else
runs. hetero_jax's decode step is split into dense stages, attention, sampling and host by a second, profiled run that
waits after every call. llama.cpp and transformers may live in another virtual environment (--contender_python), which
needs absl-py, gguf and NumPy besides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.bench_point import Point, num_cores
from experiments.contenders import CONTENDERS, dequantised_gguf
from experiments.markdown import print_header, print_row

_DTYPE_NAMES = ("float32", "bfloat16")

_MODEL = flags.DEFINE_string("model", None, "GGUF file (or random:NAME, for hetero_jax alone).", required=True)
_SEQUENCES = flags.DEFINE_list("sequences", ["64", "128"], "Numbers of sequences.")
_CONTEXTS = flags.DEFINE_list("contexts", ["32", "512"], "Prompt lengths in tokens.")
_DTYPES = flags.DEFINE_list("dtypes", list(_DTYPE_NAMES), "Types of weights and KV cache.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 16, "Decode steps to time.", lower_bound=2)
_MICROBATCHES = flags.DEFINE_integer("num_microbatches", 1, "hetero_jax: microbatches in flight.")
_TOKEN_BUDGET = flags.DEFINE_integer("max_num_batched_tokens", 512, "hetero_jax: rows of a microbatch.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 128, "hetero_jax: token positions in a page.")
_KV_CACHE_BYTES = flags.DEFINE_integer("kv_cache_bytes", 0, "hetero_jax: memory of the KV pools; 0: what is needed.")
_CONTENDERS = flags.DEFINE_list("contenders", list(CONTENDERS), "Who runs.")
_PYTHON = flags.DEFINE_string("contender_python", sys.executable, "Python that runs llama.cpp and transformers.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON lines file to which the figures are appended.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: contender and point, as JSON.")

flags.register_validator("dtypes", lambda names: set(names) <= set(_DTYPE_NAMES), f"allowed: {_DTYPE_NAMES}")
flags.register_validator("contenders", lambda names: set(names) <= set(CONTENDERS), f"allowed: {(*CONTENDERS,)}")

_RESULT = "RESULT "
_PARTS = ("dense_s", "attention_s", "sample_s", "host_s")
_COLUMNS = (
    *("sequences", "context", "dtype", "contender", "prefill tokens/s", "decode tokens/s"),
    *("ours / its prefill", "ours / its decode", "peak GiB", "compile s"),
    *("dense ms", "attention ms", "sampling ms", "host ms", "host"),
)


def main(argv: list[str]) -> None:
    """Run all points and print a Markdown table."""
    del argv
    if _WORKER.value:
        name, point = json.loads(_WORKER.value)
        figures = CONTENDERS[name].run(Point(**point))
        print(_RESULT + json.dumps({**dataclasses.asdict(figures), "version": _version(name)}))
        return
    print_header(_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        weights = functools.cache(functools.partial(_llama_weights, Path(folder)))
        for point in _points():
            _measure(point, weights)


def _version(name: str) -> str:
    distribution = CONTENDERS[name].distribution
    return f"{distribution} {version(distribution)}"


def _points() -> list[Point]:
    return [
        Point(
            model=_MODEL.value,
            sequences=sequences,
            context=context,
            new_tokens=_NEW_TOKENS.value,
            dtype=dtype,
            num_microbatches=_MICROBATCHES.value,
            max_num_batched_tokens=_TOKEN_BUDGET.value,
            page_size=_PAGE_SIZE.value,
            kv_cache_bytes=_KV_CACHE_BYTES.value,
        )
        for dtype in _DTYPES.value
        for context in map(int, _CONTEXTS.value)
        for sequences in map(int, _SEQUENCES.value)
    ]


def _measure(point: Point, weights: Callable[[str], str]) -> None:
    """One point: a row for each contender, ours first, so that the others' rows can be compared with it."""
    ours: dict[str, Any] | None = None
    for name in sorted(_CONTENDERS.value, key=list(CONTENDERS).index):
        figures = _in_own_process(name, point, weights)
        where = (point.sequences, point.context, point.dtype, name)
        if isinstance(figures, str):
            print_row([*where, figures, *[""] * (len(_COLUMNS) - len(where) - 1)])
            continue
        ours = figures if name == "hetero_jax" else ours
        print_row([*where, *_cells(figures, None if name == "hetero_jax" else ours)])
        if _OUTPUT.value:
            with Path(_OUTPUT.value).open("a", encoding="utf-8") as file:
                row = {**dataclasses.asdict(point), "contender": name, "cores": num_cores(), **figures}
                file.write(json.dumps(row) + "\n")


def _in_own_process(name: str, point: Point, weights: Callable[[str], str]) -> dict[str, Any] | str:
    """The contender's figures, or a word on why there are none."""
    python = sys.executable if name == "hetero_jax" else _PYTHON.value
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({CONTENDERS[name].module!r}) is None)"
    if subprocess.run([python, "-c", find], check=False).returncode:
        return "not installed"
    if name != "hetero_jax" and not Path(point.model).is_file():
        return "needs a GGUF file"
    if name == "llama.cpp":
        point = dataclasses.replace(point, model=weights(point.dtype))
    worker = json.dumps([name, dataclasses.asdict(point)])
    command = [python, "-m", "experiments.bench_generate", "--model=-", f"--worker={worker}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT))
    return f"failed ({done.returncode}): {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}"


def _llama_weights(folder: Path, dtype: str) -> str:
    """The model's weights as llama.cpp is to read them; written once per dtype and not within its memory."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    path = folder / f"{dtype}.gguf"
    dequantised_gguf(Path(_MODEL.value), path, dtype)
    return str(path)


def _cells(figures: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    """Figures as text; `ours` is what they are compared with, if anything."""
    rates = ("prefill_per_s", "decode_per_s")
    cells = [f"{figures[rate]:.0f}" for rate in rates]
    cells += [f"{ours[rate] / figures[rate]:.2f}" if ours else "" for rate in rates]
    cells += [f"{figures['peak_bytes'] / 2**30:.2f}", f"{figures['compile_s']:.1f}" if figures["compile_s"] else ""]
    split = figures["split"]
    if split is None:
        return cells + [""] * (len(_PARTS) + 1)
    cells += [f"{split[part] * 1e3:.1f}" for part in _PARTS]
    return [*cells, f"{split['host_s'] / sum(split.values()):.1%}"]


if __name__ == "__main__":
    app.run(main)
