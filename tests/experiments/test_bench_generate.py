"""The bench runs its own engine end to end, says who is missing, and splits the decode time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_bench_prints_a_row_and_writes_its_figures(tmp_path: Path):
    output = tmp_path / "figures.jsonl"
    command = [sys.executable, "-m", "experiments.bench_generate", "--model=random:tiny", f"--output={output}"]
    command += ["--sequences=4", "--contexts=8", "--dtypes=float32", "--new_tokens=2", "--contenders=hetero_jax"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 4 | 8 | float32 | hetero_jax |" in done.stdout and "failed" not in done.stdout
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert row["decode_per_s"] > 0 and row["prefill_per_s"] > 0
    assert set(row["split"]) == {"dense_s", "attention_s", "sample_s", "host_s"}
