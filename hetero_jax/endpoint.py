"""Where a worker listens, and the secret that it shares with its engine."""

from __future__ import annotations

from pathlib import Path

from hetero_jax.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
      ConfigError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"address {address!r}; allowed: HOST:PORT, such as 127.0.0.1:7000")
    return host.strip("[]"), int(port)


def read_secret(path: str | None) -> bytes | None:
    """The secret in a file, without white space around it; None without a file."""
    return None if path is None else Path(path).read_bytes().strip()
