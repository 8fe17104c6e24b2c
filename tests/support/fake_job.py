"""A job with a fake engine: the text is a function of the request's id."""

from __future__ import annotations

import hashlib
import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from hetero_jax.errors import RequestError
from hetero_jax.job import JobConfig, run_job
from hetero_jax.outputs import Completion, Sample
from hetero_jax.sampling_params import SamplingParams


class FakeEngine:
    """Yields completions in an order that is not the input's, some of them errors, `pause_s` apart."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.asked: list[str] = []
        self.stats = SimpleNamespace(tokens_per_s=1.0, pages_used=0, pages_total=1)

    def generate(self, prompts, sampling_params=None, *, on_error="fail"):
        self.asked += [request.id for request in prompts]
        if on_error == "fail" and any(request.prompt == "too long" for request in prompts):
            raise RequestError("too long")
        for request in sorted(prompts, key=lambda request: hashlib.sha256(request.id.encode()).digest()):
            time.sleep(self.pause_s)
            yield self._completion(request)

    def _completion(self, request):
        text = hashlib.sha256(request.id.encode()).hexdigest() + " é"
        error = "too long" if request.prompt == "too long" else None
        sample = Sample(
            index=0, text="" if error else text, token_ids=(1, 2), finish_reason="error" if error else "length"
        )
        return Completion(id=request.id, prompt_token_ids=(7,), outputs=(sample,), error=error)


def config(source: Path, target: Path, **more) -> JobConfig:
    """A job with fixed defaults and context, either of which `more` may change."""
    values = {"defaults": SamplingParams(max_tokens=4), "context": {"model": "fake"}, **more}
    return JobConfig(input=source, output=target, **values)


def run_slowly(source: Path, target: Path) -> None:
    """The whole of a process that runs the job, slowly enough to be killed in the middle; exits with its code."""
    sys.exit(run_job(config(source, target), lambda: FakeEngine(0.004), log=io.StringIO()))
