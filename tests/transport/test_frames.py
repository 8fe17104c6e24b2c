from __future__ import annotations

import gc
import hashlib
import hmac
import random
import struct
import tracemalloc
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.buffers import ALIGNMENT, BufferPool
from transport.errors import FrameError, IntegrityError
from transport.frames import MAX_HEADER_BYTES, FrameDecoder, FrameEncoder, FrameLimits
from wire import feed, joined

KEY = b"k" * 32


NUMBERS = [1, 0, (1 << 64) - 1, 3]


def frame_by_hand(
    number: int, type_: int, header: bytes, body: bytes, key: bytes | None = None, numbers: Sequence[int] = NUMBERS
) -> bytes:
    """The layout as the module's docstring has it, written independently."""
    checked = struct.pack("<BBHIQQ4Q", 2, type_, 0, len(header), len(body), number, *numbers) + header
    while (8 + len(checked) + (32 if key else 0)) % 64:
        checked += b"\0"
    head = b"HJXF" + struct.pack("<I", zlib.crc32(checked)) + checked
    return head + (hmac.new(key, head + body, hashlib.sha256).digest() if key else b"") + body


@pytest.mark.parametrize("key", [None, KEY])
def test_encoder_writes_the_documented_layout(key):
    encoder = FrameEncoder(key)
    assert joined(
        encoder.encode(7, NUMBERS, b"head", [memoryview(b"bo"), memoryview(b"dy" * 31)], 64)
    ) == frame_by_hand(0, 7, b"head", b"bo" + b"dy" * 31, key)
    assert joined(encoder.encode(1, [0] * 4, b"")) == frame_by_hand(1, 1, b"", b"", key, [0] * 4)


bodies = st.builds(lambda data, times: data * 64 * times, st.binary(max_size=40), st.sampled_from([1, 3, 50, 150]))


@given(
    contents=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300), bodies), max_size=5),
    chunks=st.lists(st.integers(1, 5000), max_size=60),
    key=st.sampled_from([None, KEY]),
)
def test_decoder_gives_the_frames_however_the_bytes_are_split(contents, chunks, key):
    data = b"".join(frame_by_hand(number, *content, key) for number, content in enumerate(contents))
    decoder = FrameDecoder(key)
    frames = feed(decoder, data, chunks)
    assert [(frame.type, frame.header, frame.body.tobytes()) for frame in frames] == contents
    assert all(frame.numbers == NUMBERS and frame.body.ctypes.data % ALIGNMENT == 0 for frame in frames)
    assert decoder.between_frames


@given(cut=st.integers(0, 20_000), key=st.sampled_from([None, KEY]))
def test_a_cut_frame_gives_nothing(cut, key):
    whole = frame_by_hand(0, 3, b"h" * 100, b"b" * 19_200, key)
    cut = min(cut, len(whole) - 1)
    decoder = FrameDecoder(key)
    assert feed(decoder, whole[:cut]) == []
    assert decoder.between_frames == (cut == 0)


def test_ten_thousand_altered_replayed_and_reordered_frames_are_refused():
    chance = random.Random(0)
    frames = [frame_by_hand(n, n % 11, chance.randbytes(20), chance.randbytes(n % 5 * 64), KEY) for n in range(100)]
    for trial in range(10_000):
        at = chance.randrange(3, 90)
        stream = list(frames[at - 3 : at])
        match trial % 4:
            case 0:  # one bit
                altered = bytearray(frames[at])
                altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
                stream.append(bytes(altered))
            case 1:  # again
                stream.append(chance.choice(stream))
            case 2:  # one left out
                stream.append(frames[at + chance.randrange(1, 9)])
            case 3:  # that of another connection
                stream.append(frame_by_hand(at, 1, b"", b"", chance.randbytes(32)))
        decoder = FrameDecoder(KEY)
        decoder._number = at - 3  # the connection is that old
        # A header made longer swallows what follows before its checksum is looked at.
        assert frames_before_refusal(decoder, [*stream, *frames[at + 1 :], bytes(MAX_HEADER_BYTES)]) == 3, trial


def frames_before_refusal(decoder: FrameDecoder, stream: list[bytes]) -> int:
    seen = 0
    try:
        for data in stream:
            seen += len(feed(decoder, data))
    except FrameError:
        return seen
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, b"X", "begins with b'XJXF'; allowed: b'HJXF'"),
        (8, b"\x01", "version 1 and reserved bits 0; allowed: 2 and 0"),
        (10, b"\x01", "version 2 and reserved bits 1"),
        (12, struct.pack("<I", MAX_HEADER_BYTES + 1), "a header of 65537 bytes; allowed: at most 65536"),
        (16, struct.pack("<Q", 1024), "tensors of 1024 bytes in a frame; allowed: multiples of 64, at most 1000"),
        (16, struct.pack("<Q", 65), "tensors of 65 bytes in a frame; allowed: multiples of 64"),
        (24, b"\x05", "frame number 5 came; expected: 0"),
        (32, b"\xff", "checksum"),
        (65, b"\x00", "checksum"),
        (70, b"\x01", "checksum"),
    ],
)
def test_a_wrong_prefix_is_named(at, value, error):
    frame = bytearray(frame_by_hand(0, 1, b"head", b"body" * 16))
    frame[at : at + len(value)] = value
    with pytest.raises(FrameError, match=error):
        feed(FrameDecoder(limits=FrameLimits(max_body_bytes=1000)), bytes(frame))


def test_encoder_refuses_what_no_decoder_takes():
    with pytest.raises(FrameError, match="65537 bytes; allowed"):
        FrameEncoder().encode(1, NUMBERS, bytes(MAX_HEADER_BYTES + 1))
    for size in (1024, 65):
        with pytest.raises(FrameError, match=f"{size} bytes in a frame; allowed: multiples of 64, at most 1000"):
            FrameEncoder(limits=FrameLimits(max_body_bytes=1000)).encode(1, NUMBERS, b"", [bytes(size)], size)
    for number in (-1, 1 << 64):
        with pytest.raises(FrameError, match=f"{number}, 0, 0] in a message; allowed: 4 from 0 to 2"):
            FrameEncoder().encode(1, [0, number, 0, 0], b"")


@pytest.mark.parametrize("sent", [0, 100, 600_000, 5_000_000, 20_000_000])
def test_a_claim_of_a_gigabyte_allocates_four_times_what_came_and_a_megabyte(sent):
    checked = struct.pack("<BBHIQQ4Q", 2, 1, 0, 0, 1 << 30, 0, 0, 0, 0, 0)
    data = b"HJXF" + struct.pack("<I", zlib.crc32(checked)) + checked + bytes(sent)
    tracemalloc.start()
    try:
        assert feed(FrameDecoder(), data, [1 << 16] * 400) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 4 * len(data) + (1 << 20)


def test_tag_is_checked_before_a_frame_is_seen():
    frame = bytearray(frame_by_hand(0, 1, b"head", b"body" * 16, KEY))
    frame[-34] ^= 1  # of the body, which the checksum does not cover
    with pytest.raises(IntegrityError, match="wrong authentication tag"):
        feed(FrameDecoder(KEY), bytes(frame))


def test_a_buffer_comes_back_only_when_no_view_of_it_is_left():
    pool = BufferPool()
    first = pool.allocate(1 << 20)
    address = first.ctypes.data
    assert address % ALIGNMENT == 0
    view = first[100:200].view(np.float32).reshape(5, 5)[1:, 2]
    del first
    gc.collect()
    assert pool.reuse(1 << 20) is None
    del view
    again = pool.reuse(1 << 19)
    assert again is not None and again.ctypes.data == address and len(again) == 1 << 19
    del again
    assert pool.reuse(1 << 17) is None  # too large to be kept busy by so little
