"""Where a worker listens, and what protects its connection to the engine: a shared secret, TLS."""

from __future__ import annotations

import ssl
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


def worker_tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """The worker's side of TLS 1.3 with PEM files of its certificate (and what leads to its CA) and key; None without.

    Raises:
      ConfigError: one of the two alone.
      OSError: no such file, or not such a file.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError(f"tls_cert={certificate!r}, tls_key={key!r}; allowed: both or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


def engine_tls(authorities: str | None) -> ssl.SSLContext | None:
    """The engine's side: workers must show a certificate of these CAs (PEM) that names their host; None without.

    Raises:
      OSError: no such file, or not such a file.
    """
    if authorities is None:
        return None
    context = ssl.create_default_context(cafile=authorities)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
