"""Where the tiers live, and how arrays cross between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hetero_jax.config import EngineConfig
from hetero_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """tier1: device of the weights and dense stages. tier2: device of the KV pools and the attention."""

    tier1: Any
    tier2: Any


def place(config: EngineConfig) -> Placement:
    """The devices of a configuration.

    Tier 2 is the last XLA CPU device, which differs from tier 1's only where several were asked for
    (`--xla_force_host_platform_device_count`).

    Raises:
      ConfigError: the platform asked for is not there.
    """
    platform = config.tier1 or jax.default_backend()
    try:
        tier1 = jax.local_devices(backend=platform)[0]
    except RuntimeError as error:
        found = sorted({device.platform for device in jax.local_devices()})
        raise ConfigError(f"tier1={platform!r}: JAX sees no such device; it sees {found} ({error})") from error
    tier2 = tier1 if config.attention == "tier1" else jax.local_devices(backend="cpu")[-1]
    return Placement(tier1=tier1, tier2=tier2)


def start_copy(arrays: tuple[jax.Array, ...], source: Any, target: Any) -> None:
    """Begin to bring arrays of an accelerator to the host, if that is their way; returns at once."""
    if _leaves_accelerator(source, target):
        for array in arrays:
            array.copy_to_host_async()


def are_ready(arrays: Iterable[Any]) -> bool:
    """Whether all of these jax.Arrays have been computed."""
    return all(array.is_ready() for array in arrays)


def land(array: Any, device: Any) -> jax.Array:
    """A jax.Array on `device`; waits only for a copy from an accelerator to the host."""
    source = _device_of(array)
    if source == device:
        return array
    return jax.device_put(np.asarray(array) if _leaves_accelerator(source, device) else array, device)


def _leaves_accelerator(source: Any, target: Any) -> bool:
    return target.platform == "cpu" and source.platform != "cpu"


def _device_of(array: jax.Array) -> Any:
    (device,) = array.devices()
    return device
