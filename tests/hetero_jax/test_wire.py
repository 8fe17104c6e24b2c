"""Rows on the wire: what conversions keep, and attention in a worker's handler beside the definition in float64."""

from __future__ import annotations

import dataclasses
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hetero_jax import native_attention
from hetero_jax.errors import ConfigError
from hetero_jax.wire import from_wire, on_host, to_wire, wired_shape
from hetero_jax.worker import TierHandler
from paged_case import PagedCase, Sequence
from partition import AttentionSpec
from transport import Attend, Hello, Layout, Query
from transport.errors import RefusedError

SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=24, v_head_dim=16, scale=24**-0.5)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of rows after the wire, by NumPy."""
    if dtype != "int8":
        return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)
    scale = np.abs(array).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(array / np.where(scale == 0, 1, scale)) * scale


def rows() -> np.ndarray:
    draw = np.random.default_rng(0).normal(size=(5, 3, 8)) * 10.0 ** np.arange(-2, 3)[:, None, None]
    draw[3, 1] = 0
    return draw.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_rounded_once_and_have_the_size_that_is_said(dtype):
    (wired,) = on_host(to_wire([jnp.asarray(rows())], dtype))
    assert wired.dtype == dtype and wired.shape == wired_shape(rows().shape, dtype)
    back = np.asarray(from_wire(jnp.asarray(wired), dtype, "float32"))
    np.testing.assert_allclose(back, rounded(rows(), dtype), rtol=1e-6, atol=0)
    bound = {"float32": 0, "bfloat16": 2**-8 * np.abs(rows())}.get(dtype, np.abs(rows()).max(-1, keepdims=True) / 253.9)
    assert (np.abs(back - rows()) <= bound).all()
    (again,) = on_host(to_wire([jnp.asarray(back)], dtype))
    assert wired.tobytes() == again.tobytes()


def test_what_is_not_finite_stays_so():
    array = rows()
    array[0, 0, 3], array[1, 0, 3] = np.nan, np.inf
    (wired,) = to_wire([jnp.asarray(array)], "int8")
    back = from_wire(wired, "int8", "float32")
    assert not np.isfinite(back[:2, 0, 3]).any() and np.isfinite(back[2:]).all()


@pytest.mark.parametrize(("dtype", "rms"), [("float32", 1e-6), ("bfloat16", 0.005), ("int8", 0.02)])
def test_attention_of_rows_from_the_wire(dtype, rms):
    case = PagedCase([Sequence(0, 20), Sequence(37, 1), Sequence(5, 9), Sequence(70, 1)], SPEC)
    found = _by_handler(case, dtype)
    exact = case.expected()
    for name in ("q", "k", "v"):
        setattr(case, name, [rounded(array, dtype) for array in getattr(case, name)])
    # Within the answer's own rounding of the float64 oracle of rounded rows; `rms` from that of the exact ones.
    for out, near, far in zip(found, case.expected(), exact, strict=True):
        step = {"float32": 0, "bfloat16": 2**-8 * np.abs(near)}.get(dtype, np.abs(near).max(-1, keepdims=True) / 250)
        assert (np.abs(out - near) <= step + 1e-5).all()
        assert np.sqrt(np.mean((out - far) ** 2) / np.mean(far**2)) < rms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("native", [True, False])
def test_queries_that_come_ahead_change_no_bit(dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(native_attention, "refusal", lambda **_: "it is not to be used")
    case = PagedCase([Sequence(300, 1), Sequence(0, 20), Sequence(260, 9), Sequence(5, 1)], SPEC, padding=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if native else "ignore")  # jax.numpy says that it is slow
        together, ahead = (_by_handler(case, dtype, ahead=ahead) for ahead in (False, True))
    assert [rows.tobytes() for rows in ahead] == [rows.tobytes() for rows in together]


def _by_handler(case: PagedCase, dtype: str, *, ahead: bool = False) -> list[np.ndarray]:
    """Per sequence the new rows' output, as a worker answers, put back into float32."""
    handler = _handler(case)
    out = np.zeros(0)
    for slot, old in enumerate((True, False)):
        layout, *arrays = case.rows(old=old)
        handler.layout(Layout(slot=slot, arrays=_complete(layout)))
        q, k, v = on_host(to_wire([jnp.asarray(array) for array in arrays], dtype))
        if ahead:
            handler.query(Query(site=0, layout=slot, q=q))
        result = handler.attend(Attend(request_id=7, site=0, layout=slot, q=None if ahead else q, k=k, v=v))
        assert 0 < result.began_ns < result.ended_ns
        assert result.request_id == 7 and result.out.dtype == q.dtype
        out = from_wire(jnp.asarray(result.out), dtype, "float32")
    firsts = np.cumsum([0, *(sequence.new for sequence in case.sequences)])
    return [np.asarray(out[first : first + new]) for first, (_, new) in zip(firsts, case.sequences, strict=False)]


def _site(case: PagedCase) -> dict:
    return {
        **dataclasses.asdict(case.spec),
        "sink_scores": "",
        "group": 0,
        "pool": 0,
        "page_size": case.page_size,
        "kv_cache_dtype": "float32",
    }


def _handler(case: PagedCase, *others: dict) -> TierHandler:
    """Of a site, and of others that differ from it by so much."""
    handler = TierHandler(kv_cache_bytes=1 << 20)
    sites = tuple(_site(case) | changes for changes in ({}, *others))
    granted = handler.hello(Hello(fingerprint="", generation=1, page_budget=case.num_pages, sites=sites))
    assert granted.page_budget == case.num_pages
    return handler


def _complete(layout) -> dict[str, np.ndarray]:
    """The layout's arrays, with those that only the kernels' jax.numpy form reads."""
    last = len(layout.num_rows) - 1
    tiles = [(s, at) for s, n in enumerate(layout.num_rows) if n > 1 for at in range(0, n, 64)]
    return {
        **{name: getattr(layout, name) for name in ("first_row", "num_rows", "context")},
        "page_tables": layout.page_table[None],  # of one group
        "row_slots": layout.row_slot[None],
        "decode": np.asarray([*np.flatnonzero(layout.num_rows == 1), last], np.int32),
        "tile_sequence": np.asarray([s for s, _ in tiles], np.int32),
        "tile_offset": np.asarray([at for _, at in tiles], np.int32),
    }


@pytest.mark.parametrize(
    ("rows_", "layout", "message"),
    [
        (np.zeros((4, 6, 24), np.float16), 0, "rows of float16; allowed: bfloat16, float32, int8"),
        (np.zeros((4, 6, 4), np.int8), 0, r"int8 rows \(4, 6, 4\); allowed"),
        (np.zeros((4, 6, 24), np.float32), 1, "a call with layout 1; allowed: one that was sent before"),
    ],
)
def test_rows_and_layouts_that_a_worker_cannot_read_are_named(rows_, layout, message):
    case = PagedCase([Sequence(0, 4)], SPEC)
    handler = _handler(case)
    handler.layout(Layout(slot=0, arrays=_complete(case.rows(old=False)[0])))
    with pytest.raises(ConfigError, match=message):
        handler.attend(Attend(request_id=1, site=0, layout=layout, q=rows_, k=rows_, v=rows_))


@pytest.mark.parametrize(
    ("query", "attend", "message"),
    [
        (None, {"q": None}, "an attend without q"),
        ({}, {}, "or with one that came"),
        ({"layout": 1}, {"q": None}, r"allowed: the query of \(0, 0\) before"),
        ({"layout": 5}, {"q": None}, "a call with layout 5; allowed"),
        ({"site": 1}, {"q": None}, "site 1; allowed: below 1"),
        ({"q": np.zeros((4, 6, 24), np.float16)}, {"q": None}, "rows of float16; allowed"),
    ],
)
def test_calls_and_queries_that_do_not_belong_together_are_refused(query, attend, message):
    case = PagedCase([Sequence(0, 4)], SPEC, padding=0)
    handler = _handler(case)
    layout, q, k, v = case.rows(old=False)
    for slot in (0, 1):
        handler.layout(Layout(slot=slot, arrays=_complete(layout)))
    if query is not None:
        handler.query(Query(**{"site": 0, "layout": 0, "q": q, **query}))
    call = {"request_id": 1, "site": 0, "layout": 0, "k": k, "v": v}
    with pytest.raises(ConfigError, match=message):
        handler.attend(Attend(**{**call, "q": q, **attend}))
    assert handler.attend(Attend(**call, q=q)).out.shape == q.shape[:2] + v.shape[2:]  # as if nothing had been


def test_queries_of_sites_that_keep_no_keys_are_refused():
    case = PagedCase([Sequence(0, 4)], SPEC, padding=0)
    handler = _handler(case, {})
    layout, q, k, v = case.rows(old=False)
    handler.layout(Layout(slot=0, arrays=_complete(layout)))
    handler.attend(Attend(request_id=1, site=0, layout=0, q=q, k=k, v=v))
    handler.query(Query(site=1, layout=0, q=q))
    with pytest.raises(ConfigError, match="q of site 1 alone; allowed: of sites that keep k and v"):
        handler.attend(Attend(request_id=2, site=1, layout=0, q=None))


def test_sites_of_several_groups_share_a_pool_of_pages_of_one_shape():
    case = PagedCase([Sequence(0, 4)], SPEC, padding=0)
    with pytest.raises(RefusedError, match=r"pages \(2, 24, 16\) and \(2, 8, 16\) in one pool; allowed: of one shape"):
        _handler(case, {"group": 1, "head_dim": 8})
    handler = _handler(case, {"group": 1})
    layout, q, k, v = case.rows(old=False)
    with pytest.raises(
        ConfigError,
        match=r"page tables \[1, 2, 2\] and slots \[1, 4\]; allowed: \[2, sequences, pages\] and \[2, rows\]",
    ):
        handler.layout(Layout(slot=0, arrays=_complete(layout)))
    handler.layout(Layout(slot=0, arrays={**_complete(layout), **_two_groups(case, layout)}))
    (first, second) = (
        handler.attend(Attend(request_id=1, site=site, layout=0, q=q, k=k, v=values)).out
        for site, values in enumerate((v, 2 * v))
    )
    np.testing.assert_allclose(second, 2 * first, rtol=1e-5)
    again = handler.attend(Attend(request_id=1, site=0, layout=0, q=q, k=k, v=v)).out  # what the other did not touch
    assert again.tobytes() == first.tobytes()


def _two_groups(case: PagedCase, layout) -> dict[str, np.ndarray]:
    """Of which the second has the next page, round the end."""
    slots = (layout.row_slot + case.page_size) % (case.num_pages * case.page_size)
    return {
        "page_tables": np.stack([layout.page_table, (layout.page_table + 1) % case.num_pages]),
        "row_slots": np.stack([layout.row_slot, slots]),
    }
