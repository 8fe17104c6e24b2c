"""One connection without its socket: bytes in, messages out; messages in, bytes out."""

from __future__ import annotations

from transport.codec import decode_message, encode_message
from transport.frames import Buffer, FrameDecoder, FrameEncoder, FrameLimits
from transport.handshake import Handshake, Role
from transport.messages import Message


class Connection:
    """Handshake first, then messages; nothing of an unknown peer goes further than the handshake.

    Fill `receive_buffer()`, tell `received()`; send what `take_output()` and `encode()` give, in the order in which
    they gave it. After an error, send what `take_output()` has and close.
    """

    def __init__(self, role: Role, secret: bytes | None = None, limits: FrameLimits | None = None) -> None:
        self._handshake = Handshake(role, secret)
        self._limits = limits
        self._decoder: FrameDecoder | None = None
        self._encoder: FrameEncoder | None = None

    @property
    def established(self) -> bool:
        """The peer has proven itself, where a secret asks for it."""
        return self._decoder is not None

    @property
    def may_end(self) -> bool:
        """The peer may close here: nothing has begun that is not complete."""
        return self._decoder is not None and self._decoder.between_frames

    def take_output(self) -> bytes:
        """Bytes of the handshake to send now."""
        return self._handshake.take_output()

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return (self._decoder or self._handshake).receive_buffer()

    def received(self, count: int) -> list[Message]:
        """Messages that are complete now that `count` bytes were written into `receive_buffer()`.

        Raises:
          HandshakeError: the peer is not one that we talk to.
          FrameError: it sent something else than messages, or they were tampered with.
        """
        if self._decoder is not None:
            return [decode_message(frame) for frame in self._decoder.received(count)]
        self._handshake.received(count)
        if (keys := self._handshake.keys) is not None:
            self._decoder = FrameDecoder(keys.receive, self._limits)
            self._encoder = FrameEncoder(keys.send, self._limits)
        return []

    def encode(self, message: Message) -> tuple[list[Buffer], int]:
        """The buffers that carry `message`, tensors uncopied, and how many bytes they are.

        Raises:
          FrameError: the message does not fit a frame.
        """
        assert self._encoder is not None, "messages follow the handshake"
        return self._encoder.encode(*encode_message(message))
