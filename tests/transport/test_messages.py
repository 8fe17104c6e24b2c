from __future__ import annotations

import dataclasses
import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.codec import decode_message, encode_message
from transport.errors import FrameError, RefusedError, VersionError
from transport.frames import Frame, FrameDecoder, FrameEncoder
from transport.header import DTYPES, MAX_VALUES
from transport.messages import (
    MESSAGE_TYPES,
    Attend,
    Error,
    FetchPages,
    Hello,
    Layout,
    Pages,
    Ping,
    Query,
    Release,
    Result,
    Stats,
    StorePages,
    check_hello,
)
from wire import feed, joined

EMPTY = np.empty(0, np.uint8)


def over_the_wire(message):
    (frame,) = feed(FrameDecoder(), joined(FrameEncoder().encode(*encode_message(message))), [1, 5, 1000])
    return decode_message(frame)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and (a == b or a != a)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 2, (*shape, 16)).astype(dtype),
    shapes,
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
numbers = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | texts
mappings = st.dictionaries(texts, scalars, max_size=4)
messages = st.one_of(
    st.builds(
        Hello,
        fingerprint=texts,
        generation=numbers,
        page_budget=numbers,
        sites=st.lists(mappings, max_size=3).map(tuple),
        artifacts=st.lists(tensors, max_size=3).map(tuple),
    ),
    st.builds(
        Attend,
        request_id=numbers,
        site=numbers,
        layout=numbers,
        q=st.none() | tensors,
        k=st.none() | tensors,
        v=st.none() | tensors,
    ),
    st.builds(Query, site=numbers, layout=numbers, q=tensors),
    st.builds(Layout, slot=numbers, arrays=st.dictionaries(texts, tensors, max_size=3)),
    st.builds(Result, request_id=numbers, out=tensors, log_sum_exp=st.none() | tensors),
    st.builds(Release, pages=tensors),
    st.builds(FetchPages, request_id=numbers, pages=tensors),
    st.builds(Pages, request_id=numbers, arrays=st.lists(tensors, max_size=3).map(tuple)),
    st.builds(StorePages, pages=tensors, arrays=st.lists(tensors, max_size=3).map(tuple)),
    st.builds(Stats, request_id=numbers, values=mappings),
    st.builds(Ping, token=numbers),
    st.builds(Error, request_id=numbers, kind=texts, text=texts),
)


@given(message=messages)
def test_messages_arrive_as_they_were_sent(message):
    assert same(over_the_wire(message), message)


def test_tensors_need_not_be_contiguous_and_arrive_aligned():
    q = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    message = Attend(request_id=1, site=0, layout=0, q=q[::-1, :, ::2], k=q.T)
    arrived = over_the_wire(message)
    np.testing.assert_array_equal(arrived.q, q[::-1, :, ::2])
    np.testing.assert_array_equal(arrived.k, q.T)
    assert arrived.q.ctypes.data % 64 == arrived.k.ctypes.data % 64 == 0


def test_contiguous_tensors_are_sent_from_where_they_are():
    q = np.zeros((64, 8, 128), ml_dtypes.bfloat16)
    _, _, _, body, body_bytes = encode_message(Attend(request_id=1, site=0, layout=0, q=q))
    assert body_bytes == q.nbytes and np.shares_memory(body[0], q)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Release(pages=np.zeros(2)), "a tensor float64"),
        (Release(pages=np.zeros((1,) * 9, np.int64)), "at most 8 axes"),
        (Release(pages=np.array(["pickle"], object)), "a tensor object"),
        (Error(request_id=0, kind="", text="x" * 5000), "a text of 5000 bytes; allowed: at most 4096"),
        (
            Stats(request_id=0, values={str(name): 0 for name in range(65)}),
            "65 items in a message; allowed: at most 64",
        ),
        (Stats(request_id=0, values={"a": 1 << 70}), "a Stats cannot be written"),
    ],
)
def test_what_may_not_travel_is_refused_by_the_sender(message, error):
    with pytest.raises(FrameError, match=error):
        encode_message(message)


PING, RELEASE, HELLO, STATS, ATTEND = (MESSAGE_TYPES.index(kind) + 1 for kind in (Ping, Release, Hello, Stats, Attend))


@pytest.mark.parametrize(
    ("type_", "header", "body", "error"),
    [
        (0, b"\x90", 0, "a frame of type 0; allowed: 1 to"),
        (200, b"\x90", 0, "a frame of type 200"),
        (RELEASE, b"", 0, "cannot be read"),
        (RELEASE, msgpack.packb({"token": 1}), 0, "cannot be read"),
        (PING, msgpack.packb([1]), 0, "uses 0 of 1 values"),
        (RELEASE, msgpack.packb([]), 0, "ends after 0 values"),
        (RELEASE, msgpack.packb(["1"]), 0, "has a str where only int of 0 or more may be"),
        (RELEASE, msgpack.packb([True]), 0, "has True where only int"),
        (RELEASE, msgpack.packb([-1]), 0, "has -1 where only int of 0 or more may be"),
        (RELEASE, msgpack.packb([[]]), 0, "has a list where only int"),
        (RELEASE, msgpack.packb([[1]]), 0, "cannot be read: 1 exceeds max_array_len"),
        (RELEASE, msgpack.packb([{1: 1}]), 0, "cannot be read: 1 exceeds max_map_len"),
        (RELEASE, msgpack.packb([b"1"]), 0, "cannot be read: 1 exceeds max_bin_len"),
        (RELEASE, msgpack.packb([msgpack.ExtType(1, b"1")]), 0, "cannot be read"),
        (RELEASE, b"\x91\xdb\xff\xff\xff\xff", 0, "a header of 1 values has 0"),
        (RELEASE, b"\x91\xc1", 0, "cannot be read"),
        (RELEASE, b"\x91", 0, "a header of 1 values has 0"),
        (RELEASE, b"\x91\xcd\x01", 0, "a header of 1 values has 0"),
        (RELEASE, msgpack.packb([1]) + b"\x00", 0, "in 2 of 3 bytes"),
        (PING, msgpack.packb([]), 64, "0 of 64 bytes of its body"),
        (RELEASE, msgpack.packb([7, 1, 3]), 0, "needs 64 bytes, 0 are left"),
        (RELEASE, msgpack.packb([7, 1, 3]), 128, "64 of 128 bytes of its body"),
        (RELEASE, msgpack.packb([len(DTYPES) + 1, 1, 3]), 64, "element type number 9; allowed: 1 to 8"),
        (RELEASE, msgpack.packb([7, 9, *[1] * 9]), 64, "9 items where at most 8 may be"),
        (RELEASE, msgpack.packb([7, 2, 1 << 63, 1 << 63]), 64, "needs"),
        (RELEASE, msgpack.packb([7, 2, 0, 1 << 63]), 64, "needs"),
        (RELEASE, msgpack.packb([0]), 0, "element type number 0; allowed: 1 to 8"),
        (STATS, msgpack.packb([2, "a", 1, "a", 2]), 0, "names something twice"),
        (STATS, msgpack.packb([1, "a"]), 0, "ends after 2 values"),
        (STATS, msgpack.packb([65]), 0, "65 items where at most 64 may be"),
        (STATS, msgpack.packb([1, "a", "\udc80"], unicode_errors="surrogatepass"), 0, "cannot be read"),
        (STATS, msgpack.packb([1, "a", "x" * 4097]), 0, "cannot be read: 4097 exceeds max_str_len"),
        (HELLO, b"\xdd\xff\xff\xff\xff", 0, "4294967295 values; allowed"),
        (HELLO, b"\xdc\x20\x01" + b"\x01" * 8193, 0, f"8193 values; allowed: at most {MAX_VALUES}"),
    ],
)
def test_headers_that_are_no_message_are_refused(type_, header, body, error):
    for _ in range(2):  # what is refused is not remembered
        with pytest.raises(FrameError, match=error):
            decode_message(Frame(type_, [0] * 4, header, np.zeros(body, np.uint8)))


def test_numbers_that_a_message_has_not_are_refused():
    with pytest.raises(FrameError, match=r"a Ping has numbers \[7, 1, 0, 0\]; allowed: 1, then zeros"):
        decode_message(Frame(PING, [7, 1, 0, 0], b"\x90", EMPTY))


def test_a_header_that_came_before_is_held_against_the_frame_that_it_came_with():
    header, numbers = msgpack.packb([7, 1, 3]), [0] * 4
    for pages in (np.arange(3), np.arange(3) + 5):
        body = np.pad(pages, (0, 5)).view(np.uint8)
        np.testing.assert_array_equal(decode_message(Frame(RELEASE, numbers, header, body)).pages, pages)
    with pytest.raises(FrameError, match="64 of 128 bytes of its body"):
        decode_message(Frame(RELEASE, numbers, header, np.zeros(128, np.uint8)))
    with pytest.raises(FrameError, match="a header ends after 3 values"):
        decode_message(Frame(ATTEND, numbers, header, np.zeros(64, np.uint8)))


def test_thousands_of_headers_are_not_all_remembered():
    shapes = [(rows, *[1] * 7) for rows in range(4000)]
    tracemalloc.start()
    try:
        for shape in shapes:
            over_the_wire(Attend(request_id=1, site=0, layout=0, q=np.zeros(shape, np.int8)))
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20


@pytest.mark.parametrize("value", [b"\xa2xy", b"\x90", b"\xcb" + b"\x01" * 8, b"\xcf" + b"\xff" * 8])
def test_headers_do_not_grow_in_memory(value):
    header = (b"\xdc\x20\x00" + b"\x01\xa0\x01\x01\xcd\x1f\xf0" + value * 8192)[: 1 << 16]
    tracemalloc.start()
    try:
        decode_message(Frame(HELLO, [0] * 4, header, EMPTY))
    except FrameError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 4 * len(header) + (1 << 20)


def test_another_version_or_plan_is_refused_with_both_values():
    hello = Hello(protocol_version=9, fingerprint="theirs", generation=1, page_budget=1)
    with pytest.raises(VersionError, match="protocol version 9, this side 1"):
        check_hello(theirs=hello, protocol_version=1, fingerprint="theirs")
    with pytest.raises(RefusedError, match="plan is 'theirs', that of this side 'ours'"):
        check_hello(theirs=hello, protocol_version=9, fingerprint="ours")
    check_hello(theirs=hello, protocol_version=9, fingerprint=None)
