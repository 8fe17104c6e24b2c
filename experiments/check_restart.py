"""Kills a real job with SIGKILL at random points, runs it again each time, and compares with an undisturbed run.

    python -m experiments.check_restart --model=SmolLM2-135M-Instruct.Q4_1.gguf --input=examples/prompts.jsonl

Exit code 0 if every id came out exactly once with the same bytes as in the undisturbed run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

_MODEL = flags.DEFINE_string("model", None, "As for hetero-jax generate.", required=True)
_INPUT = flags.DEFINE_string("input", None, "As for hetero-jax generate.", required=True)
_KILLS = flags.DEFINE_integer("kills", 20, "How often to kill the job.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Tokens of a row.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")


def main(argv: list[str]) -> int:
    """Run, kill, run again, compare."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        # Restarts would otherwise compile the same programs again each time.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        undisturbed, disturbed = Path(folder) / "undisturbed.jsonl", Path(folder) / "disturbed.jsonl"
        start_s = time.monotonic()
        _start(undisturbed).wait()
        whole_s = time.monotonic() - start_s
        killed = _kill_often(disturbed, whole_s)
        code = _start(disturbed).wait()
        expected, seen = (sorted(path.read_bytes().splitlines()) for path in (undisturbed, disturbed))
    same = expected == seen and code == 0
    print(
        f"undisturbed run: {len(expected)} rows in {whole_s:.0f} s; killed {killed} times; then {len(seen)} rows, "
        f"{len(set(seen) & set(expected))} with the same bytes, last exit code {code}: {'OK' if same else 'DIFFERENT'}"
    )
    return 0 if same and killed == _KILLS.value else 1


def _start(output: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from hetero_jax.cli import main; sys.exit(main())", "generate"]
    command += [f"--model={_MODEL.value}", f"--input={_INPUT.value}", f"--output={output}"]
    command += [f"--max_tokens={_MAX_TOKENS.value}", "--temperature=0"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _kill_often(output: Path, whole_s: float) -> int:
    """Kill at a random moment of a run's length, or when a random number of further bytes is written, in turn."""
    chance, killed = random.Random(_SEED.value), 0
    while killed < _KILLS.value:
        job, size = _start(output), output.stat().st_size if output.exists() else 0
        deadline_s = time.monotonic() + chance.uniform(0, whole_s / 2)
        goal = size + chance.randrange(1, 1500) if killed % 2 else None
        while job.poll() is None:
            written = output.exists() and goal is not None and output.stat().st_size >= goal
            if written or (goal is None and time.monotonic() >= deadline_s):
                job.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        if job.wait() == 0:  # it came to its end first: begin a new file
            output.unlink()
    return killed


if __name__ == "__main__":
    app.run(main)
