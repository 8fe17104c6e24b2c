"""Messages to frames and back. A message's header has its fields in order, read by their annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

from transport.buffers import Tensor
from transport.errors import FrameError
from transport.frames import Buffer, Frame
from transport.header import MAX_TEXT_BYTES, MAX_VALUES, HeaderReader, HeaderWriter, Scalar
from transport.messages import MESSAGE_TYPES, Message

_MAX_NAMES = 64  # in a mapping
_SCALARS = (int, float, str, bool, type(None))


def encode_message(message: Message) -> tuple[int, bytes, list[Buffer], int]:
    """Type, header, body of a message's frame, and the body's bytes.

    Raises:
      FrameError: a value that no message may carry.
    """
    code = _CODES[type(message)]
    writer = HeaderWriter()
    for name, kind in _SCHEMAS[code]:
        kind.write(writer, getattr(message, name))
    try:
        return code, writer.header(), writer.body, writer.body_bytes
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"a {type(message).__name__} cannot be written: {error}") from None


def decode_message(frame: Frame) -> Message:
    """The message in a frame; its tensors are views of the frame's body.

    Raises:
      FrameError: it holds none.
    """
    schema = _SCHEMAS.get(frame.type)
    if schema is None:
        raise FrameError(f"a frame of type {frame.type}; allowed: 1 to {len(MESSAGE_TYPES)}")
    reader = HeaderReader(frame.header, frame.body)
    message = object.__new__(MESSAGE_TYPES[frame.type - 1])
    # The schema has every field; a frozen dataclass's own __init__ would take four times as long.
    vars(message).update({name: kind.read(reader) for name, kind in schema})
    reader.end()
    return message


class _Kind(NamedTuple):
    """How values of one annotation are written and read."""

    write: Callable[[HeaderWriter, Any], None]
    read: Callable[[HeaderReader], Any]


def _write_text(writer: HeaderWriter, text: str) -> None:
    if len(text.encode()) > MAX_TEXT_BYTES:
        raise FrameError(f"a text of {len(text.encode())} bytes; allowed: at most {MAX_TEXT_BYTES}")
    writer.values.append(text)


def _write_natural(writer: HeaderWriter, value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise FrameError(f"{value} in a message; allowed: 0 to 2**64 - 1")
    writer.values.append(int(value))


def _write_scalar(writer: HeaderWriter, value: Scalar) -> None:
    if isinstance(value, str):
        _write_text(writer, value)
    else:
        writer.values.append(value)


def _tuple_of(item: _Kind) -> _Kind:
    def write(writer: HeaderWriter, values: tuple[Any, ...]) -> None:
        _write_length(writer, len(values), MAX_VALUES)
        for value in values:
            item.write(writer, value)

    def read(reader: HeaderReader) -> tuple[Any, ...]:
        return tuple(item.read(reader) for _ in range(reader.length(MAX_VALUES)))

    return _Kind(write, read)


def _mapping_of(item: _Kind) -> _Kind:
    """Names and values in turn."""

    def write(writer: HeaderWriter, values: Mapping[str, Any]) -> None:
        _write_length(writer, len(values), _MAX_NAMES)
        for name, value in values.items():
            _write_text(writer, name)
            item.write(writer, value)

    def read(reader: HeaderReader) -> dict[str, Any]:
        names = reader.length(_MAX_NAMES)
        values = {_read_text(reader): item.read(reader) for _ in range(names)}
        if len(values) != names:
            raise FrameError("a mapping names something twice")
        return values

    return _Kind(write, read)


def _write_length(writer: HeaderWriter, length: int, high: int) -> None:
    if length > high:
        raise FrameError(f"{length} items in a message; allowed: at most {high}")
    writer.values.append(length)


def _read_some_tensor(reader: HeaderReader) -> Tensor | None:
    return reader.tensor(optional=True)


def _read_text(reader: HeaderReader) -> str:
    return reader.value((str,))


def _read_scalar(reader: HeaderReader) -> Scalar:
    return reader.value(_SCALARS)


_TENSOR = _Kind(HeaderWriter.tensor, HeaderReader.tensor)
_ANY_SCALAR = _Kind(_write_scalar, _read_scalar)
_KINDS: dict[Any, _Kind] = {
    int: _Kind(_write_natural, HeaderReader.natural),
    str: _Kind(_write_text, _read_text),
    Tensor: _TENSOR,
    Tensor | None: _Kind(HeaderWriter.tensor, _read_some_tensor),
    tuple[Tensor, ...]: _tuple_of(_TENSOR),
    Mapping[str, Tensor]: _mapping_of(_TENSOR),
    Mapping[str, Scalar]: _mapping_of(_ANY_SCALAR),
    tuple[Mapping[str, Scalar], ...]: _tuple_of(_mapping_of(_ANY_SCALAR)),
}
_CODES: dict[type, int] = {kind: code for code, kind in enumerate(MESSAGE_TYPES, 1)}


def _schema(kind: type[Message]) -> tuple[tuple[str, _Kind], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, _KINDS[hints[field.name]]) for field in fields(kind))


_SCHEMAS = {code: _schema(kind) for kind, code in _CODES.items()}
