"""Kills a real job with SIGKILL at random points, runs it again each time, and compares with an undisturbed run.

    python -m experiments.check_restart --model=SmolLM2-135M-Instruct.Q4_1.gguf --input=examples/prompts.jsonl

Exit code 0 if every id came out exactly once with the same bytes as in the undisturbed run, 1 if not.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from absl import app, flags

_MODEL = flags.DEFINE_string("model", None, "As for hetero-jax generate.", required=True)
_INPUT = flags.DEFINE_string("input", None, "As for hetero-jax generate.", required=True)
_KILLS = flags.DEFINE_integer("kills", 20, "How often to kill the job.", lower_bound=0)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Tokens of a row.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")
_FAILED = 1  # what hetero-jax generate exits with if the job, not only some rows, failed


def main(argv: list[str]) -> int:
    """Run, kill, run again, compare."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        # Restarts would otherwise compile the same programs again each time.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        undisturbed = Path(folder) / "undisturbed.jsonl"
        code = _start(undisturbed).wait()
        if code == _FAILED:
            print(f"the undisturbed run failed: hetero-jax generate --model={_MODEL.value} --input={_INPUT.value}")
            return 1
        expected = _rows(undisturbed)
        # Again: with everything compiled, as the runs to be killed are, and to see that two runs agree at all.
        start_s = time.monotonic()
        problems = _compare(Path(folder) / "again.jsonl", expected, code)
        whole_s = time.monotonic() - start_s
        print(f"undisturbed: {expected.total()} rows in {whole_s:.0f} s, exit code {code}", flush=True)
        kills = []
        if not problems:
            kills, problems = _kill_often(Path(folder), expected, code, whole_s)
    early = sum(before == after for before, after in kills)
    print(
        f"killed {len(kills)} times, {early} of them before the run's first row "
        f"({', '.join(f'{before}->{after}' for before, after in kills)} rows): "
        f"{'; '.join(problems) or 'every row once, with the same bytes'}: {'DIFFERENT' if problems else 'OK'}"
    )
    return 1 if problems else 0


def _start(output: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from hetero_jax.cli import main; sys.exit(main())", "generate"]
    command += [f"--model={_MODEL.value}", f"--input={_INPUT.value}", f"--output={output}"]
    command += [f"--max_tokens={_MAX_TOKENS.value}", "--temperature=0"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _rows(output: Path) -> Counter[bytes]:
    # Not splitlines: a carriage return may stand in a torn row.
    return Counter(line for line in output.read_bytes().split(b"\n") if line) if output.exists() else Counter()


def _kill_often(
    folder: Path, expected: Counter[bytes], code: int, whole_s: float
) -> tuple[list[tuple[int, int]], list[str]]:
    """Kill --kills times, going on with the same file; one that is complete is compared, and the next one begun.

    Returns:
      Rows in the file before and after each run that was killed, and what was wrong with complete files.
    """
    chance, kills, problems, files = random.Random(_SEED.value), [], [], 0
    while not problems:
        output = folder / f"disturbed-{files}.jsonl"
        before = _rows(output).total()
        if len(kills) < _KILLS.value and _kill(output, chance, whole_s, by_rows=len(kills) % 2 == 1):
            kills.append((before, _rows(output).total()))
            continue
        problems = _compare(output, expected, code)
        files += 1
        if len(kills) == _KILLS.value:
            break
    return kills, problems


def _kill(output: Path, chance: random.Random, whole_s: float, *, by_rows: bool) -> bool:
    """Run the job and kill it at a random moment, or once a random number of further bytes is written.

    Returns:
      False if it came to its end first.
    """
    size = output.stat().st_size if output.exists() else 0
    deadline_s = time.monotonic() + chance.uniform(0, whole_s)
    goal = size + chance.randrange(1, 1500)
    job = _start(output)
    while job.poll() is None:
        written = output.stat().st_size if output.exists() else 0
        if written >= goal if by_rows else time.monotonic() >= deadline_s:
            job.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    return job.wait() == -signal.SIGKILL


def _compare(output: Path, expected: Counter[bytes], code: int) -> list[str]:
    """Run the job to its end (where it has come to it, nothing is left to do); what is wrong with its file."""
    last = _start(output).wait()
    if last != code:
        return [f"exit code {last} instead of {code}"]
    seen = _rows(output)
    missing, surplus = (expected - seen).total(), (seen - expected).total()
    return [f"{missing} rows missing, {surplus} other or surplus rows"] if missing or surplus else []


if __name__ == "__main__":
    app.run(main)
