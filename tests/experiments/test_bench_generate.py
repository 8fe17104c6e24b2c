"""The bench runs our own engine end to end, says who is missing, and times decode with every sequence decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench_engine import head_starts
from experiments.bench_point import Point
from hetero_jax.scheduler import Scheduler
from hetero_jax.scheduler_types import SchedulerConfig


def test_bench_prints_a_row_and_writes_its_figures(tmp_path: Path):
    output = tmp_path / "figures.jsonl"
    command = [sys.executable, "-m", "experiments.bench_generate", "--model=random:tiny", f"--output={output}"]
    command += ["--sequences=4", "--contexts=8", "--dtypes=float32", "--new_tokens=40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 4 | 8 | float32 | hetero_jax |" in done.stdout and "failed" not in done.stdout
    for other in ("llama.cpp", "transformers"):  # random weights are in no file
        assert any(f"{other} | {word}" in done.stdout for word in ("not installed", "needs a GGUF file"))
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert row["decode_per_s"] > 0 and row["prefill_per_s"] > 0 and row["peak_bytes"] > 0 and row["compile_s"] > 0
    assert set(row["split"]) == {"dense_s", "attention_s", "sample_s", "host_s"}


@pytest.mark.parametrize(
    ("sequences", "context", "budget", "microbatches"),
    [(64, 32, 512, 1), (64, 512, 512, 1), (128, 512, 512, 1), (128, 512, 512, 2), (100, 64, 256, 2), (1, 8, 512, 1)],
)
def test_all_sequences_decode_together_from_the_same_context(
    sequences: int, context: int, budget: int, microbatches: int
):
    point = Point(
        model="",
        sequences=sequences,
        context=context,
        new_tokens=8,
        dtype="float32",
        num_microbatches=microbatches,
        max_num_batched_tokens=budget,
    )
    contexts = _contexts_once_prefilled(point, [context - int(ahead) for ahead in head_starts(point)])
    assert max(contexts) - min(contexts) <= 0.02 * context + 3
    assert sum(contexts) / sequences == pytest.approx(context, rel=0.02, abs=3)


def test_more_decode_rows_than_the_budget_holds_are_refused():
    point = Point(model="", sequences=64, context=8, new_tokens=8, dtype="float32", max_num_batched_tokens=64)
    with pytest.raises(ValueError, match="sequences=64; allowed: fewer than"):
        head_starts(point)


def _contexts_once_prefilled(point: Point, lengths: list[int]) -> list[int]:
    """Cached tokens of every sequence when the real scheduler has had all prompts computed."""
    config = SchedulerConfig(
        page_size=16,
        max_num_batched_tokens=point.max_num_batched_tokens,
        max_num_seqs=point.sequences,
        num_microbatches=point.num_microbatches,
        max_model_len=4096,
    )
    scheduler, computed, flying = Scheduler(config, {0: 100_000}), [0] * len(lengths), []
    for index, length in enumerate(lengths):
        scheduler.add(index, length, 1024)
    while any(done < length for done, length in zip(computed, lengths, strict=True)):
        while (batch := scheduler.schedule()) is not None:
            flying.append(batch)
        batch = flying.pop(0)
        for chunk in batch.chunks:
            computed[chunk.seq_id] += chunk.length
        scheduler.complete(batch.batch_id, {})
    return computed
