"""Prefill and decode tokens/s of hetero_jax, and of llama.cpp and transformers where they are installed.

    python -m experiments.bench_generate --model=SmolLM2-135M-Instruct.Q4_1.gguf

Every contender runs every point in a process of its own, one after the other on the same cores, so the ratios of a row
are of one run. hetero_jax's decode time is split into dense stages, attention, sampling and host by a second, profiled
run that waits after every call.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from experiments.contenders import CONTENDERS, Point

_MODEL = flags.DEFINE_string("model", None, "GGUF file (or random:NAME, for hetero_jax alone).", required=True)
_SEQUENCES = flags.DEFINE_list("sequences", ["64", "128"], "Numbers of sequences.")
_CONTEXTS = flags.DEFINE_list("contexts", ["32", "512"], "Prompt lengths in tokens.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Types of weights and KV cache.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 16, "Decode steps to time.")
_MICROBATCHES = flags.DEFINE_integer("num_microbatches", 1, "hetero_jax: microbatches in flight.")
_CONTENDERS = flags.DEFINE_list("contenders", list(CONTENDERS), "Who runs.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON lines file for the figures.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: contender and point, as JSON.")


def main(argv: list[str]) -> None:
    """Run all points and print a Markdown table."""
    del argv
    if _WORKER.value:
        name, point = json.loads(_WORKER.value)
        print("RESULT " + json.dumps(dataclasses.asdict(CONTENDERS[name][1](Point(**point)))))
        return
    print("| sequences | context | dtype | contender | prefill tokens/s | decode tokens/s | ours is | split |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in _DTYPES.value:
        for context in map(int, _CONTEXTS.value):
            for sequences in map(int, _SEQUENCES.value):
                _point(
                    Point(
                        model=_MODEL.value,
                        sequences=sequences,
                        context=context,
                        new_tokens=_NEW_TOKENS.value,
                        dtype=dtype,
                        num_microbatches=_MICROBATCHES.value,
                    )
                )


def _point(point: Point) -> None:
    ours = None
    for name in _CONTENDERS.value:
        times = _in_own_process(name, point)
        if isinstance(times, str):
            print(f"| {point.sequences} | {point.context} | {point.dtype} | {name} | {times} | | | |", flush=True)
            continue
        prefill = point.sequences * point.context / times["prefill_s"]
        decode = point.sequences * point.new_tokens / times["decode_s"]
        ours = decode if name == "hetero_jax" else ours
        ratio = f"{ours / decode:.2f} x" if ours and name != "hetero_jax" else ""
        print(
            f"| {point.sequences} | {point.context} | {point.dtype} | {name} | {prefill:.0f} | {decode:.0f} "
            f"| {ratio} | {_split(times['split'])} |",
            flush=True,
        )
        if _OUTPUT.value:
            with Path(_OUTPUT.value).open("a") as file:
                row = {**dataclasses.asdict(point), "contender": name, **times}
                file.write(json.dumps({**row, "prefill_per_s": prefill, "decode_per_s": decode}) + "\n")


def _in_own_process(name: str, point: Point) -> dict | str:
    """The contender's times, or a word on why there are none."""
    if importlib.util.find_spec(CONTENDERS[name][0]) is None:
        return "not installed"
    worker = json.dumps([name, dataclasses.asdict(point)])
    command = [sys.executable, "-m", "experiments.bench_generate", "--model=-", f"--worker={worker}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:120]}"


def _split(split: dict[str, float] | None) -> str:
    if split is None:
        return ""
    total = sum(split.values())
    return ", ".join(f"{name.removesuffix('_s')} {seconds / total:.0%}" for name, seconds in split.items())


if __name__ == "__main__":
    app.run(main)
