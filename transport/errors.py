"""Errors of the transport.

TransportError                 anything this package raises on purpose
|-- FrameError                 bytes that are no frame or message of this protocol, or a message that fits no frame
|   `-- IntegrityError         a frame that was altered, repeated, left out or put elsewhere in the stream
|-- HandshakeError             no connection came about
|   |-- AuthenticationError    the peer does not know our secret, or only one side has one
|   |-- VersionError           the peer speaks another version
|   `-- RefusedError           the peer is who it says but may not join: other plan, stale generation
|-- InsecureAddressError       no secret, and an address that is not loopback
|-- ConnectionLostError        the peer closed, fell silent, or takes nothing any more
`-- RemoteError                the peer's handler failed; the message is its own
"""

from __future__ import annotations


class TransportError(Exception):
    """Base class; the message says what was seen and what is allowed."""


class FrameError(TransportError):
    """Bytes that are no frame or message of this protocol, or a message that fits no frame."""


class IntegrityError(FrameError):
    """A frame that was altered, repeated, left out or put elsewhere in the stream."""


class HandshakeError(TransportError):
    """No connection came about."""


class AuthenticationError(HandshakeError):
    """The peer does not know our secret, or only one side has one."""


class VersionError(HandshakeError):
    """The peer speaks another version; the message names both."""


class RefusedError(HandshakeError):
    """The peer is who it says but may not join: other plan, stale generation."""


class InsecureAddressError(TransportError):
    """Without a secret only loopback addresses may be used."""


class ConnectionLostError(TransportError):
    """The peer closed, fell silent, or takes nothing any more."""


class RemoteError(TransportError):
    """The peer's handler failed; the message is its own."""
