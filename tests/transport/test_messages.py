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
from transport.messages import MESSAGE_TYPES, Attend, Error, Hello, Ping, Release, Result, Stats, check_hello
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
        layout=st.dictionaries(texts, tensors, max_size=3),
        q=tensors,
        k=st.none() | tensors,
        v=st.none() | tensors,
    ),
    st.builds(Result, request_id=numbers, out=tensors, log_sum_exp=st.none() | tensors),
    st.builds(Release, pages=tensors),
    st.builds(Stats, request_id=numbers, values=mappings),
    st.builds(Ping, token=numbers),
    st.builds(Error, request_id=numbers, kind=texts, text=texts),
)


@given(message=messages)
def test_messages_arrive_as_they_were_sent(message):
    assert same(over_the_wire(message), message)


def test_tensors_need_not_be_contiguous_and_arrive_aligned():
    q = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    message = Attend(request_id=1, site=0, layout={"odd": np.arange(3, dtype=np.int8)}, q=q[::-1, :, ::2], k=q.T)
    arrived = over_the_wire(message)
    np.testing.assert_array_equal(arrived.q, q[::-1, :, ::2])
    np.testing.assert_array_equal(arrived.k, q.T)
    assert arrived.q.ctypes.data % 64 == arrived.k.ctypes.data % 64 == 0


def test_contiguous_tensors_are_sent_from_where_they_are():
    q = np.zeros((64, 8, 128), ml_dtypes.bfloat16)
    _, _, body = encode_message(Attend(request_id=1, site=0, layout={}, q=q))
    assert np.shares_memory(np.frombuffer(body[0], np.uint8), q)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Release(pages=np.zeros(2)), "a tensor float64"),
        (Release(pages=np.zeros((1,) * 9, np.int64)), "at most 8 axes"),
        (Release(pages=np.array(["pickle"], object)), "a tensor object"),
        (Ping(token=-1), "-1 in a message; allowed: 0 to"),
        (Ping(token=1 << 64), "allowed: 0 to 2"),
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


PING, RELEASE, HELLO, STATS = (MESSAGE_TYPES.index(kind) + 1 for kind in (Ping, Release, Hello, Stats))


@pytest.mark.parametrize(
    ("type_", "header", "body", "error"),
    [
        (0, b"\x90", 0, "a frame of type 0; allowed: 1 to"),
        (200, b"\x90", 0, "a frame of type 200"),
        (PING, b"", 0, "no array where one must be"),
        (PING, msgpack.packb({"token": 1}), 0, "no array where one must be"),
        (PING, msgpack.packb([1, 2]), 0, "an array of 2 items; allowed: 1 to 1"),
        (PING, msgpack.packb([]), 0, "an array of 0 items"),
        (PING, msgpack.packb(["1"]), 0, "has a str where only int may be"),
        (PING, msgpack.packb([True]), 0, "has a bool where only int may be"),
        (PING, msgpack.packb([-1]), 0, "has -1; allowed: 0 or more"),
        (PING, msgpack.packb([[1]]), 0, "cannot be read: 1 exceeds max_array_len"),
        (PING, msgpack.packb([{1: 1}]), 0, "cannot be read: 1 exceeds max_map_len"),
        (PING, msgpack.packb([b"1"]), 0, "cannot be read: 1 exceeds max_bin_len"),
        (PING, msgpack.packb([msgpack.ExtType(1, b"1")]), 0, "cannot be read"),
        (PING, b"\x91\xdb\xff\xff\xff\xff", 0, "cannot be read"),
        (PING, b"\x91\xc1", 0, "cannot be read"),
        (PING, b"\x91", 0, "cannot be read"),
        (PING, msgpack.packb([1]) + b"\x00", 0, "uses 2 of 3 bytes of its header"),
        (PING, msgpack.packb([1]), 64, "0 of 64 of its body"),
        (RELEASE, msgpack.packb([[6, 3]]), 0, "needs 64 bytes, 0 are left"),
        (RELEASE, msgpack.packb([[6, 3]]), 128, "64 of 128 of its body"),
        (RELEASE, msgpack.packb([[len(DTYPES), 3]]), 64, "element type number 8; allowed: 0 to 7"),
        (RELEASE, msgpack.packb([[6, *[1] * 9]]), 64, "an array of 10 items; allowed: 1 to 9"),
        (RELEASE, msgpack.packb([[6, 1 << 63, 1 << 63]]), 64, "needs"),
        (RELEASE, msgpack.packb([[6, 0, 1 << 63]]), 64, "needs"),
        (RELEASE, msgpack.packb([[]]), 0, "an array of 0 items; allowed: 1 to 9"),
        (STATS, msgpack.packb([1, ["a", 1, "a", 2]]), 0, "names something twice"),
        (STATS, msgpack.packb([1, ["a"]]), 0, "names a value that it does not have"),
        (STATS, msgpack.packb([1, ["a", "\udc80"]], unicode_errors="surrogatepass"), 0, "cannot be read"),
        (STATS, msgpack.packb([1, ["a", "x" * 4097]]), 0, "cannot be read: 4097 exceeds max_str_len"),
        (HELLO, b"\x96\x01\xa0\x01\x01\xdd\xff\xff\xff\xff", 0, "an array of 4294967295 items; allowed"),
        (HELLO, b"\x96\x01\xa0\x01\x01\xdc\x20\x00" + b"\x90" * 8192, 0, f"more than the {MAX_VALUES} values"),
    ],
)
def test_headers_that_are_no_message_are_refused(type_, header, body, error):
    with pytest.raises(FrameError, match=error):
        decode_message(Frame(type_, header, np.zeros(body, np.uint8)))


@pytest.mark.parametrize(
    "sites",
    [
        b"\xdc\x20\x00" + b"\x90" * 8192,  # mappings without anything
        (b"\xdc\x00\x20" + (b"\xdc\x00\x80" + b"".join(b"\xa2%c%c\xa2xy" % (i, i) for i in range(64))) * 32),
    ],
)
def test_headers_do_not_grow_in_memory(sites):
    header = b"\x96\x01\xa0\x01\x01" + sites + b"\x90"
    tracemalloc.start()
    try:
        decode_message(Frame(HELLO, header, EMPTY))
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
