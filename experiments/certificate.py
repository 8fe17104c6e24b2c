"""A certificate to try TLS with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def loopback_certificate(folder: Path) -> tuple[str, str]:
    """PEM files of a new certificate for 127.0.0.1 that signs itself, and of its key, by the command openssl."""
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return certificate, key
