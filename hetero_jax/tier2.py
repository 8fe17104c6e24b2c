"""Builds tier 2: in this process, or in workers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hetero_jax.attention_tier import AttentionTier
from hetero_jax.config import EngineConfig
from hetero_jax.described_site import describe
from hetero_jax.devices import Placement
from hetero_jax.endpoint import engine_tls, read_secret
from hetero_jax.errors import ConfigError
from hetero_jax.head_fleet import HeadFleet
from hetero_jax.local_worker import LocalWorker, own_cores
from hetero_jax.offer import Offer
from hetero_jax.page_groups import SitePages
from hetero_jax.remote_tier import RemoteTier
from hetero_jax.worker_fleet import WorkerFleet
from hetero_jax.worker_session import WorkerSession
from hetero_jax.workers_file import WorkersFile
from partition import Plan, Value, prepare_site_weights
from transport import Hello


def make_tier2(
    config: EngineConfig,
    plan: Plan,
    params: Any,
    placement: Placement,
    *,
    pages: Sequence[SitePages],
    dtype: Any,
    most_pages: int,
) -> tuple[AttentionTier | RemoteTier, WorkerFleet | None]:
    """The tier, and its workers where it has some.

    Args:
      params: of the plan, with arrays where its sites read them.
      pages: of each site, where it keeps them.
      dtype: element type of the pools.
      most_pages: that all sequences which run at once may hold.
    Raises:
      ConfigError: it does not fit, or has a site that workers do not serve.
      WorkerError: a worker is not there, or refuses.
    """
    with jax.default_device(placement.tier2):
        weights = prepare_site_weights(plan, params, placement.tier2)
    if config.has_workers:
        fleet = _make_fleet(config, plan, weights, pages, dtype=dtype, most_pages=most_pages)
        return RemoteTier(plan.sites, fleet, wire_dtype=config.wire_dtype, tier1=placement.tier1), fleet
    shape = {"page_size": config.page_size, "dtype": dtype, "device": placement.tier2, "tier1": placement.tier1}
    return AttentionTier(plan.sites, weights, pages=pages, kv_cache_bytes=config.kv_cache_bytes, **shape), None


def _make_fleet(
    config: EngineConfig,
    plan: Plan,
    weights: Mapping[Value, jax.Array],
    pages: Sequence[SitePages],
    *,
    dtype: Any,
    most_pages: int,
) -> WorkerFleet:
    shape = {"page_size": config.page_size, "dtype": dtype, "wire_dtype": config.wire_dtype}
    if config.kv_partition == "head":
        _check_heads(plan)
    sites, artifacts = describe(plan.sites, pages, weights, **shape)

    def begin(address: str, secret: bytes | None, hello: Hello, tls: ssl.SSLContext | None = None) -> WorkerSession:
        times = {"step_timeout_s": config.step_timeout_s, "query_ahead_s": config.query_ahead_s}
        return WorkerSession(address, hello, secret, tls, window=plan.window, **times)

    secret, tls = read_secret(config.secret_file), engine_tls(config.tls_ca)
    fleet = HeadFleet if config.kv_partition == "head" else WorkerFleet
    return fleet(
        config.workers,
        connect=lambda address, hello: begin(address, secret, hello, tls),
        local=_start_local_workers(config, begin),
        offer=Offer(sites=sites, artifacts=artifacts, most_pages=most_pages),
        file=None if config.workers_file is None else WorkersFile(config.workers_file),
        wait_s=config.worker_wait_s,
    )


def _check_heads(plan: Plan) -> None:
    for site in plan.sites:
        if site.spec is None:
            raise ConfigError(
                f"kv_partition='head', but the heads of the attention opened at {site.site.opening.where} are not "
                f"known, as {site.unrecognised}; allowed: 'sequence'"
            )


def _start_local_workers(
    config: EngineConfig, begin: Callable[[str, bytes, Hello], WorkerSession]
) -> dict[str, Callable[[Hello], WorkerSession]]:
    """What begins a session with each, by its name."""
    count = config.local_workers
    return {
        f"local worker {index}": LocalWorker(
            kv_cache_bytes=config.kv_cache_bytes // count, cores=cores, begin=begin
        ).connect
        for index, cores in enumerate(own_cores(count) if count else [])
    }
