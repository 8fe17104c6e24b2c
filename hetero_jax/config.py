"""EngineConfig: what a user may choose about an engine, with vLLM's names where vLLM has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hetero_jax.errors import ConfigError
from hetero_jax.wire import WIRE_DTYPES
from transport import MAX_LAYOUTS

ORDERS = ("deepest", "oldest")
KV_PARTITIONS = ("sequence", "head")
KV_CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and placement of an engine.

    kv_cache_bytes: memory of the paged key-value pools, over all sites, in this process or its local workers.
    kv_cache_dtype: element type of the pools, one of KV_CACHE_DTYPES; None: the model's. int8 has one f32 scale for
      each token and head, and needs the native kernel.
    page_size: token positions in a page. Pages of 128 are read at the speed of a long run of memory, smaller ones waste
      less of it behind the last token of each sequence; the native kernel rounds up to a multiple of 16.
    max_num_batched_tokens: rows of one microbatch, prefill chunks and decode rows together (the token budget).
    max_num_seqs: running sequences over all microbatches.
    enable_prefix_caching: what prompts begin with is taken from pages that are still there from others, in whole pages.
    num_microbatches: microbatches in flight; with 2 or more, one is on tier 1 while another is on tier 2. 0: as many as
      hide the way to the workers and their work, measured while running; 2 in one process.
    order: which microbatch goes on first of those that can, one of ORDERS.
    max_model_len: longest prompt + output in tokens; None: what the model and the pools allow.
    tier1: platform of the dense stages; None: JAX's default backend.
    attention: "tier2" keeps the KV pools and the attention on the CPU; "tier1" puts both on the accelerator.
    workers: HOST:PORT of the workers that serve tier 2 in their own kv_cache_bytes; all must be there at the beginning.
    workers_file: lines of such addresses, watched: workers join and leave while a job runs.
    local_workers: processes to start on this machine as workers, each on its own cores with its part of kv_cache_bytes.
      Without workers of any kind, this process serves tier 2.
    kv_partition: "sequence" gives each sequence to one worker; "head" gives each worker some KV heads of every
      sequence, as evenly as they divide, so that all work on each and hold as much.
    secret_file: holds the secret shared with workers elsewhere, 16 bytes or more; needed unless all are on loopback.
    tls_ca: PEM file of the CAs that sign the workers' certificates; None: no TLS.
    wire_dtype: element type of rows on their way to workers and back, one of WIRE_DTYPES; float32 gives the tokens of
      attention in this process, as does bfloat16 for a bfloat16 model. int8 has one f32 scale for each row and head.
    query_ahead_s: q leaves before k and v, so that a worker attends to the old context meanwhile, where the wire takes
      these at least so long, as measured; 0: always, inf: never. Tokens are the same.
    step_timeout_s: a worker that has calls to answer and answers none for so long is lost, connected or not.
    worker_wait_s: how long a job waits where no worker can go on with it.
    tier1_memory_gb: refuse a configuration that needs more than this on tier 1; None: no limit.
    seed: seed of sequences whose SamplingParams have none.

    Raises:
      ConfigError: a field out of range.
    """

    kv_cache_bytes: int = 1 << 30
    kv_cache_dtype: str | None = None
    page_size: int = 128
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256
    enable_prefix_caching: bool = True
    num_microbatches: int = 2
    order: Literal["deepest", "oldest"] = "deepest"
    max_model_len: int | None = None
    tier1: Literal["cpu", "gpu"] | None = None
    attention: Literal["tier1", "tier2"] = "tier2"
    workers: tuple[str, ...] = ()
    workers_file: str | None = None
    local_workers: int = 0
    kv_partition: Literal["sequence", "head"] = "sequence"
    secret_file: str | None = None
    tls_ca: str | None = None
    wire_dtype: str = "bfloat16"
    query_ahead_s: float = 1e-3
    step_timeout_s: float = 30.0
    worker_wait_s: float = 600.0
    tier1_memory_gb: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kv_cache_bytes", "page_size", "max_num_batched_tokens", "max_num_seqs"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        _check(
            "num_microbatches", self.num_microbatches, 0 <= self.num_microbatches <= MAX_LAYOUTS, f"0 to {MAX_LAYOUTS}"
        )
        _check("order", self.order, self.order in ORDERS, f"one of {ORDERS}")
        _check(
            "kv_cache_dtype",
            self.kv_cache_dtype,
            self.kv_cache_dtype in (None, *KV_CACHE_DTYPES),
            f"one of {KV_CACHE_DTYPES}",
        )
        _check("max_model_len", self.max_model_len, (self.max_model_len or 16) >= 16, "at least 16")
        _check("tier1", self.tier1, self.tier1 in (None, "cpu", "gpu"), "cpu or gpu")
        _check("attention", self.attention, self.attention in ("tier1", "tier2"), "tier1 or tier2")
        _check("workers", self.workers, len(set(self.workers)) == len(self.workers), "each worker once")
        _check("local_workers", self.local_workers, self.local_workers >= 0, "0 or more")
        away = not self.has_workers or self.attention == "tier2"
        _check("attention", self.attention, away, "tier2, as there are workers")
        _check("kv_partition", self.kv_partition, self.kv_partition in KV_PARTITIONS, f"one of {KV_PARTITIONS}")
        whole = self.has_workers or self.kv_partition == "sequence"
        _check("kv_partition", self.kv_partition, whole, "sequence, as there are no workers")
        for name in ("secret_file", "tls_ca"):
            known = getattr(self, name) is None or bool(self.workers or self.workers_file)
            _check(name, getattr(self, name), known, "None, as there are no workers")
        _check("wire_dtype", self.wire_dtype, self.wire_dtype in WIRE_DTYPES, f"one of {WIRE_DTYPES}")
        for name in ("step_timeout_s", "worker_wait_s"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        _check("query_ahead_s", self.query_ahead_s, self.query_ahead_s >= 0, "0 or more")
        limit = self.tier1_memory_gb
        _check("tier1_memory_gb", limit, limit is None or limit > 0, "more than 0")
        _check("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2**63 - 1")

    @property
    def has_workers(self) -> bool:
        """Whether other processes serve tier 2."""
        return bool(self.workers or self.workers_file or self.local_workers)


def _check(name: str, seen: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={seen!r} is not allowed; allowed: {allowed}")
