"""How long an engine takes to notice that its worker is lost: killed (SIGKILL), or there but mute (SIGSTOP).

    python -m experiments.loss_detection --repeats=3

From the signal to the error of an engine that waits for no other worker. What is promised: 10 s for a mute one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

import hetero_jax as hj
from experiments.markdown import print_header, print_row

_REPEATS = flags.DEFINE_integer("repeats", 3, "Workers lost of each kind.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Print a table."""
    del argv
    model = hj.load("random:tiny")
    print_header(["signal", "seconds until noticed"])
    for kind in (signal.SIGKILL, signal.SIGSTOP):
        print_row([kind.name, ", ".join(f"{_seconds(model, kind):.2f}" for _ in range(_REPEATS.value))])


def _seconds(model: Any, kind: signal.Signals) -> float:
    worker = subprocess.Popen(
        [sys.executable, "-m", "hetero_jax", "worker", "--listen=127.0.0.1:0", "--kv_cache_bytes=4M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        assert worker.stdout is not None
        address = worker.stdout.readline().decode().removeprefix("listening on ").strip()
        engine = hj.Engine(model, hj.EngineConfig(workers=(address,), worker_wait_s=0.01, max_model_len=512))
        sampling = [hj.SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in (1, 400)]
        requests = [
            hj.Request(id=str(number), prompt_token_ids=(1,), sampling_params=each)
            for number, each in enumerate(sampling)
        ]
        completions = engine.generate(requests)
        next(completions)  # of the short one: all is compiled, and the long one goes on
        worker.send_signal(kind)
        start_s = time.monotonic()
        try:
            list(completions)
        except hj.HeteroJaxError:
            return time.monotonic() - start_s
        raise RuntimeError("the job came to its end before the worker was lost")
    finally:
        worker.kill()
        worker.wait()


if __name__ == "__main__":
    app.run(main)
