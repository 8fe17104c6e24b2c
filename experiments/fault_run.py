"""Kills and stops workers and the engine of a real job at random points, and compares with an undisturbed run.

    python -m experiments.fault_run --points=50
    python -m experiments.fault_run --points=20 --kv_partition=head
    python -m experiments.fault_run --points=20 --workers=0 --model=SmolLM2-135M-Instruct.Q4_1.gguf --input=in.jsonl

A point is one of: a worker is killed (SIGKILL) and started again; a worker is stopped (SIGSTOP) and goes on after up to
12 s; the engine is killed and the same command given again. The undisturbed run has no workers at all. Exit code 0 if
every file came out with the same rows, byte for byte, each once; 1 if not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

_MODEL = flags.DEFINE_string("model", "random:tiny", "As for hetero-jax generate.")
_INPUT = flags.DEFINE_string("input", None, "As for hetero-jax generate; default: --rows random prompts.")
_ROWS = flags.DEFINE_integer("rows", 150, "Rows of a job without --input.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Worker processes; 0: the engine keeps its attention.", lower_bound=0)
_KV_PARTITION = flags.DEFINE_enum("kv_partition", "sequence", ["sequence", "head"], "As for hetero-jax generate.")
_KV_CACHE_BYTES = flags.DEFINE_string("kv_cache_bytes", "4M", "Of each worker.")
_POINTS = flags.DEFINE_integer("points", 50, "Faults in all.", lower_bound=0)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Tokens of a row.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the prompts, the faults and their moments.")
_LONGEST_STOP_S = 12.0  # a worker is lost after 8 s of silence


class Worker:
    """A `hetero-jax worker` that is started again at the same address."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self._start()

    def listen(self) -> str:
        """Its address, once it listens."""
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().decode().removeprefix("listening on ").strip()
        return self.address

    def kill(self, chance: random.Random) -> None:
        """SIGKILL, and a new process."""
        del chance
        self.end()
        self._start()

    def stop(self, chance: random.Random) -> None:
        """SIGSTOP, and SIGCONT after a while; the process may be another one by then."""
        process = self._process
        process.send_signal(signal.SIGSTOP)
        threading.Timer(chance.uniform(0, _LONGEST_STOP_S), lambda: process.send_signal(signal.SIGCONT)).start()

    def end(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-m", "hetero_jax", "worker", f"--listen={self.address}"]
        command += [f"--kv_cache_bytes={_KV_CACHE_BYTES.value}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


class Job:
    """`hetero-jax generate` on one output file, begun again as often as it is killed."""

    def __init__(self, source: Path, output: Path, options: list[str]) -> None:
        self.output, self._log = output, output.with_suffix(".log")
        self._command = [sys.executable, "-m", "hetero_jax", "generate", f"--model={_MODEL.value}"]
        self._command += [f"--input={source}", f"--output={output}", f"--max_tokens={_MAX_TOKENS.value}"]
        self._command += ["--max_num_seqs=8", "--max_model_len=256", "--wire_dtype=float32", *options]
        self._start()

    @property
    def runs(self) -> bool:
        """It has not come to its end."""
        return self._process.poll() is None

    def rows(self) -> Counter[bytes]:
        """Rows of its file; the last one may be torn."""
        content = self.output.read_bytes() if self.output.exists() else b""
        # Not splitlines: a carriage return may stand in a torn row.
        return Counter(line for line in content.split(b"\n") if line)

    def kill(self, chance: random.Random) -> None:
        """SIGKILL, and the same command again."""
        del chance
        self._process.kill()
        self._process.wait()
        self._start()

    def finish(self) -> int:
        """Its exit code, waited for."""
        return self._process.wait()

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text()[-3000:]

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stderr=log)


def main(argv: list[str]) -> int:
    """Run, disturb, compare."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        # Every process would otherwise compile the same programs again.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        source = Path(_INPUT.value) if _INPUT.value is not None else _write_prompts(Path(folder) / "prompts.jsonl")
        workers = [Worker() for _ in range(_WORKERS.value)]
        try:
            undisturbed = Job(source, Path(folder) / "undisturbed.jsonl", [])
            code, expected = undisturbed.finish(), undisturbed.rows()
            if code == 1:
                print(f"the undisturbed run failed: {undisturbed.log()}")
                return 1
            problems = _disturb_often(Path(folder), source, expected, code, workers)
        finally:
            for worker in workers:
                worker.end()
    print(f"DIFFERENT: {'; '.join(problems)}" if problems else "OK: 0 rows lost, 0 doubled, every byte the same")
    return 1 if problems else 0


def _write_prompts(path: Path) -> Path:
    chance = random.Random(_SEED.value)
    rows = [
        {
            "id": number,
            "prompt_token_ids": [chance.randrange(1, 250) for _ in range(chance.randrange(1, 40))],
            "sampling_params": {"max_tokens": chance.randrange(1, _MAX_TOKENS.value + 1), "seed": number},
        }
        for number in range(_ROWS.value)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _disturb_often(folder: Path, source: Path, expected: Counter[bytes], code: int, workers: list[Worker]) -> list[str]:
    """Job after job until all faults have been; what was wrong with their files."""
    chance, done, files = random.Random(_SEED.value), Counter[str](), 0
    options = []
    if workers:
        (folder / "workers").write_text("".join(f"{worker.listen()}\n" for worker in workers))
        options = [f"--workers_file={folder / 'workers'}", f"--kv_partition={_KV_PARTITION.value}"]
        options += ["--worker_wait_s=120"]
    problems: list[str] = []
    start_s = time.monotonic()
    while not problems and done.total() < _POINTS.value:
        job = Job(source, folder / f"disturbed-{files}.jsonl", options)
        while done.total() < _POINTS.value and _await_moment(job, chance, expected.total()):
            name, fault = _draw_fault(job, workers, chance)
            fault(chance)
            done[name] += 1
            print(f"{done.total():3} {name} at {job.rows().total()} of {expected.total()} rows", flush=True)
        problems = _compare(job, expected, code)
        files += 1
    counts = ", ".join(f"{name}: {count}" for name, count in sorted(done.items()))
    took_s = time.monotonic() - start_s
    print(f"{done.total()} faults ({counts}) in {files} jobs of {expected.total()} rows, {took_s:.0f} s")
    return problems


def _draw_fault(job: Job, workers: list[Worker], chance: random.Random) -> tuple[str, Callable[[random.Random], None]]:
    kind = chance.choice(["worker killed", "worker stopped", "engine killed"]) if workers else "engine killed"
    if kind == "engine killed":
        return kind, job.kill
    worker = chance.choice(workers)
    return kind, worker.kill if kind == "worker killed" else worker.stop


def _await_moment(job: Job, chance: random.Random, num_rows: int) -> bool:
    """Wait a random time, or for a random number of further rows; False if the job came to its end first."""
    deadline_s = time.monotonic() + chance.uniform(0, 8)
    goal = job.rows().total() + chance.randrange(1, max(num_rows // 3, 2))
    by_rows = chance.random() < 0.5
    while job.runs:
        if job.rows().total() >= goal if by_rows else time.monotonic() >= deadline_s:
            return True
        time.sleep(0.01)
    return False


def _compare(job: Job, expected: Counter[bytes], code: int) -> list[str]:
    last = job.finish()
    if last != code:
        return [f"exit code {last} instead of {code}: {job.log()}"]
    seen = job.rows()
    missing, surplus = (expected - seen).total(), (seen - expected).total()
    return [f"{missing} rows missing, {surplus} other or surplus rows"] if missing or surplus else []


if __name__ == "__main__":
    app.run(main)
