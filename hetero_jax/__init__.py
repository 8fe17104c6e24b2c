"""hetero_jax: offline LLM generation in JAX when the accelerator's memory, not its arithmetic, is the limit."""

from hetero_jax.config import EngineConfig
from hetero_jax.engine import Engine
from hetero_jax.engine_stats import EngineStats
from hetero_jax.errors import HeteroJaxError
from hetero_jax.outputs import Completion, Request, Sample
from hetero_jax.restore import restore
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.tracing import Trace
from models import Tokenizer, load
from partition import Plan, partition

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "HeteroJaxError",
    "Plan",
    "Request",
    "Sample",
    "SamplingParams",
    "Tokenizer",
    "Trace",
    "load",
    "partition",
    "restore",
]
