"""The file that says which workers a job shall use, read again whenever it changes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hetero_jax.endpoint import split_address
from hetero_jax.errors import ConfigError

_logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5


class WorkersFile:
    """One HOST:PORT a line; what follows # is a comment. For one thread.

    Raises:
      ConfigError: a line that is no address, or an address that comes twice.
      OSError: no such file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._seen = self._state()
        self._look_at_s = 0.0
        self._complaint = ""  # the last one
        self.addresses = self._read()

    def changed(self) -> bool:
        """Whether `addresses` are other ones now. A file that cannot be used is reported once and changes nothing."""
        if time.monotonic() < self._look_at_s:
            return False
        self._look_at_s = time.monotonic() + _LOOK_EVERY_S
        before = self.addresses
        try:
            state = self._state()
            if state != self._seen:
                self._seen = state
                self.addresses = self._read()
        except (OSError, ConfigError) as error:
            if str(error) != self._complaint:
                _logger.warning("workers_file=%s cannot be used, the workers stay as they are: %s", self._path, error)
            self._complaint = str(error)
        return self.addresses != before

    def _state(self) -> tuple[int, int, int]:
        state = self._path.stat()
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _read(self) -> tuple[str, ...]:
        lines = (line.partition("#")[0].strip() for line in self._path.read_text().splitlines())
        addresses = tuple(line for line in lines if line)
        for address in addresses:
            split_address(address)
        if len(set(addresses)) < len(addresses):
            raise ConfigError(f"workers_file={str(self._path)!r} has an address twice; allowed: once")
        return addresses
