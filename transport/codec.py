"""Messages to frames and back.

A message's integers travel as the numbers of its frame; its header has the other fields in order, read by their
annotations. Where these are tensors alone, as in Attend and Result, headers repeat from call to call as shapes do, and
what they say is remembered: making and reading one takes several times as long as the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

from transport.buffers import Bytes, Tensor
from transport.errors import FrameError
from transport.frames import NUMBERS, Buffer, Frame
from transport.header import MAX_TEXT_BYTES, MAX_VALUES, Form, HeaderReader, HeaderWriter, Place, Scalar, body_parts
from transport.messages import MESSAGE_TYPES, Message

_MAX_NAMES = 64  # in a mapping
_MAX_REMEMBERED = 256  # headers, of a few hundred bytes each
_SCALARS = (int, float, str, bool, type(None))


def encode_message(message: Message) -> tuple[int, list[int], bytes, list[Buffer], int]:
    """Type, numbers, header and body of a message's frame, and the body's bytes.

    Raises:
      FrameError: a value that no message may carry.
    """
    code = _CODES[type(message)]
    schema, values = _SCHEMAS[code], message.__dict__
    numbers = [values[name] for name in schema.numbers] + schema.no_numbers
    if schema.only_tensors:
        tensors: list[Tensor | None] = [values[name] for name, _ in schema.fields]
        header, body_bytes = _remembered_header(_forms(tensors))
        return code, numbers, header, body_parts(tensors), body_bytes
    writer = HeaderWriter()
    for name, kind in schema.fields:
        kind.write(writer, values[name])
    try:
        return code, numbers, writer.header(), body_parts(writer.tensors), writer.body_bytes
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"a {type(message).__name__} cannot be written: {error}") from None


def decode_message(frame: Frame) -> Message:
    """The message in a frame; its tensors are views of the frame's body.

    Raises:
      FrameError: it holds none.
    """
    type_, numbers, header, body = frame
    schema = _SCHEMAS.get(type_)
    if schema is None:
        raise FrameError(f"a frame of type {type_}; allowed: 1 to {len(MESSAGE_TYPES)}")
    if numbers[len(schema.numbers) :] != schema.no_numbers:
        allowed = f"{len(schema.numbers)}, then zeros"
        raise FrameError(f"a {schema.type.__name__} has numbers {numbers}; allowed: {allowed}")
    read = _remembered_fields if schema.only_tensors else _read_fields
    message = object.__new__(schema.type)
    # The schema has every field; a frozen dataclass's own __init__ would take four times as long.
    values = message.__dict__
    for name, number in zip(schema.numbers, numbers, strict=False):
        values[name] = number
    for name, bind, value in read(type_, header, len(body)):
        values[name] = bind(value, body)
    return message


def _forms(tensors: list[Tensor | None]) -> tuple[Form | None, ...]:
    return tuple([None if tensor is None else (tensor.dtype, tensor.shape) for tensor in tensors])


@lru_cache(_MAX_REMEMBERED)
def _remembered_header(forms: tuple[Form | None, ...]) -> tuple[bytes, int]:
    """Header of a message of these tensors alone, and the body's bytes."""
    writer = HeaderWriter()
    for form in forms:
        writer.form(form)
    return writer.header(), writer.body_bytes


def _read_fields(type_: int, header: bytes, body_bytes: int) -> list[tuple[str, Callable[[Any, Bytes], Any], Any]]:
    """The names of the fields that a header has, how to bind them to a body, and what, tensors by their places."""
    reader = HeaderReader(header, body_bytes)
    found = [(name, kind.bind, kind.read(reader)) for name, kind in _SCHEMAS[type_].fields]
    reader.end()
    return found


_remembered_fields = lru_cache(_MAX_REMEMBERED)(_read_fields)


class _Kind(NamedTuple):
    """How values of one annotation are written, read, and what they are once tensors are bound to a body."""

    write: Callable[[HeaderWriter, Any], None]
    read: Callable[[HeaderReader], Any]
    bind: Callable[[Any, Bytes], Any]


def _write_text(writer: HeaderWriter, text: str) -> None:
    if len(text.encode()) > MAX_TEXT_BYTES:
        raise FrameError(f"a text of {len(text.encode())} bytes; allowed: at most {MAX_TEXT_BYTES}")
    writer.values.append(text)


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

    def bind(values: tuple[Any, ...], body: Bytes) -> tuple[Any, ...]:
        return tuple(item.bind(value, body) for value in values)

    return _Kind(write, read, bind)


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

    def bind(values: dict[str, Any], body: Bytes) -> dict[str, Any]:
        return {name: item.bind(value, body) for name, value in values.items()}

    return _Kind(write, read, bind)


def _write_length(writer: HeaderWriter, length: int, high: int) -> None:
    if length > high:
        raise FrameError(f"{length} items in a message; allowed: at most {high}")
    writer.values.append(length)


def _read_some_tensor(reader: HeaderReader) -> Place | None:
    return reader.tensor(optional=True)


def _bind_some_tensor(place: Place | None, body: Bytes) -> Tensor | None:
    return None if place is None else place.view(body)


def _read_text(reader: HeaderReader) -> str:
    return reader.value((str,))


def _read_scalar(reader: HeaderReader) -> Scalar:
    return reader.value(_SCALARS)


def _as_read(value: Any, body: Bytes) -> Any:
    del body
    return value


_TENSOR = _Kind(HeaderWriter.tensor, HeaderReader.tensor, Place.view)
_SOME_TENSOR = _Kind(HeaderWriter.tensor, _read_some_tensor, _bind_some_tensor)
_ANY_SCALAR = _Kind(_write_scalar, _read_scalar, _as_read)
_KINDS: dict[Any, _Kind] = {
    str: _Kind(_write_text, _read_text, _as_read),
    Tensor: _TENSOR,
    Tensor | None: _SOME_TENSOR,
    tuple[Tensor, ...]: _tuple_of(_TENSOR),
    Mapping[str, Tensor]: _mapping_of(_TENSOR),
    Mapping[str, Scalar]: _mapping_of(_ANY_SCALAR),
    tuple[Mapping[str, Scalar], ...]: _tuple_of(_mapping_of(_ANY_SCALAR)),
}
_CODES: dict[type, int] = {kind: code for code, kind in enumerate(MESSAGE_TYPES, 1)}


class _Schema(NamedTuple):
    """A message's fields.

    numbers: names of the integers.
    no_numbers: zeros in place of those that a frame has beyond.
    fields: names and kinds of the others.
    """

    type: type[Message]
    numbers: tuple[str, ...]
    no_numbers: list[int]
    fields: tuple[tuple[str, _Kind], ...]
    only_tensors: bool


def _schema(type_: type[Message]) -> _Schema:
    hints = get_type_hints(type_)
    names = [field.name for field in fields(type_)]
    numbers = tuple(name for name in names if hints[name] is int)
    assert len(numbers) <= NUMBERS, f"{type_.__name__} has more integers than a frame"
    others = tuple((name, _KINDS[hints[name]]) for name in names if name not in numbers)
    only_tensors = all(kind in (_TENSOR, _SOME_TENSOR) for _, kind in others)
    return _Schema(type_, numbers, [0] * (NUMBERS - len(numbers)), others, only_tensors)


_SCHEMAS = {code: _schema(kind) for kind, code in _CODES.items()}
