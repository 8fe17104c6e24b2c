"""Who is there: a mutual challenge and response of fixed size, before anything else is read.

    client -> server   magic "HJXC", version u8, mode u8, zero u16, nonce of 32 bytes
    server -> client   the same, with a nonce of its own
    client -> server   HMAC-SHA256(secret, "client" + both challenges)      the last two in mode 1 only
    server -> client   HMAC-SHA256(secret, "server" + both challenges)

Mode 1: both sides know a secret; each direction then gets a key of its own, HMAC-SHA256(secret, label + both
challenges). Mode 0: no secret, which the sockets allow on loopback only. The client proves itself first, so that an
unknown peer learns nothing to try passwords on. As in TLS 1.3's pre-shared keys, labels keep a proof from being
reflected and nonces from being replayed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from enum import Enum
from typing import NamedTuple

from transport.errors import AuthenticationError, HandshakeError, VersionError
from transport.frames import WIRE_VERSION

MIN_SECRET_BYTES = 16

_MAGIC = b"HJXC"
_CHALLENGE = struct.Struct("<4sBBH32s")
_PROOF_BYTES = 32
_MODES = {0: "without a secret", 1: "with a secret"}


class Role(Enum):
    """Which side of a connection this is; the client speaks first."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def other(self) -> Role:
        """The other side."""
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


class Keys(NamedTuple):
    """Keys of the two directions; None without a secret."""

    send: bytes | None
    receive: bytes | None


class Handshake:
    """One side's part. Fill `receive_buffer()`, tell `received()`, send `take_output()`, until `keys` is there.

    nonce: 32 bytes that never come twice; given in tests only.

    Raises:
      AuthenticationError: the secret is too short to be one.
    """

    def __init__(self, role: Role, secret: bytes | None, nonce: bytes | None = None) -> None:
        if secret is not None and len(secret) < MIN_SECRET_BYTES:
            raise AuthenticationError(f"a secret of {len(secret)} bytes; allowed: at least {MIN_SECRET_BYTES}")
        self.keys: Keys | None = None
        self._role, self._secret = role, secret
        nonce = os.urandom(32) if nonce is None else nonce
        self._challenge = _CHALLENGE.pack(_MAGIC, WIRE_VERSION, int(secret is not None), 0, nonce)
        self._transcript = b""
        self._output = self._challenge if role is Role.CLIENT else b""
        self._await(_CHALLENGE.size)

    def take_output(self) -> bytes:
        """What to send now; also after an error, so that the peer can name it too."""
        output, self._output = self._output, b""
        return output

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go: never beyond the handshake's own."""
        return self._section[self._filled :]

    def received(self, count: int) -> None:
        """`count` bytes were written into `receive_buffer()`.

        Raises:
          HandshakeError: the peer speaks something else.
          VersionError: it speaks another version.
          AuthenticationError: it does not know the secret, or one side has none.
        """
        self._filled += count
        if self._filled < len(self._section):
            return
        if not self._transcript:
            self._read_challenge(bytes(self._section))
        else:
            self._read_proof(bytes(self._section))

    def _await(self, size: int) -> None:
        self._section, self._filled = memoryview(bytearray(size)), 0

    def _read_challenge(self, theirs: bytes) -> None:
        is_client = self._role is Role.CLIENT
        magic, version, mode, zero, _ = _CHALLENGE.unpack(theirs)
        if magic != _MAGIC:
            raise HandshakeError(f"the peer begins with {magic!r}; allowed: {_MAGIC!r}")
        self._transcript = self._challenge + theirs if is_client else theirs + self._challenge
        if not is_client:
            self._output += self._challenge
        if version != WIRE_VERSION:
            raise VersionError(f"the peer speaks wire version {version}, this side {WIRE_VERSION}")
        ours = int(self._secret is not None)
        if mode != ours or zero:
            seen = _MODES.get(mode, f"in the unknown mode {mode}") if not zero else f"with reserved bits {zero}"
            raise AuthenticationError(f"the peer comes {seen}, this side {_MODES[ours]}")
        if self._secret is None:
            self.keys = Keys(None, None)
            return
        if is_client:
            self._output += self._derive(f"{self._role.value} proof")
        self._await(_PROOF_BYTES)

    def _read_proof(self, proof: bytes) -> None:
        if not hmac.compare_digest(proof, self._derive(f"{self._role.other.value} proof")):
            raise AuthenticationError("the peer does not know the secret of this side")
        if self._role is Role.SERVER:
            self._output += self._derive(f"{self._role.value} proof")
        self.keys = Keys(self._derive(f"{self._role.value} key"), self._derive(f"{self._role.other.value} key"))

    def _derive(self, label: str) -> bytes:
        assert self._secret is not None
        return hmac.digest(self._secret, f"hetero_jax {label}\0".encode() + self._transcript, hashlib.sha256)
