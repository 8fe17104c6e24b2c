"""Paged attention by the native kernel: an XLA custom call on the CPU, at the speed of its memory.

The pool's layout lets both passes stream without a shuffle. It is [num_pages, num_kv_heads, elements]: a page is one
run of memory, read from its beginning to its end, and so are neighbouring pages. One head of a page is cut into blocks
of 16 tokens, first all of its keys, then all of its values; a block is made of words of up to 4 bytes: 1 element of
float32 or float16, 2 of bfloat16, 4 of int8.

    scales: [2, blocks * 16] float32, of an int8 pool alone: of the keys and of the values, one per token and head
    keys:   [blocks, head_dim / word, 16, word]     a word: one token, `word` dimensions
    values: [blocks, 16 / word, v_head_dim, word]   a word: one dimension, `word` tokens

So a vector register of keys holds the same dimensions of 16 tokens and a score needs no sum across lanes; one of
values holds the same tokens in 16 dimensions; words are what dot-product instructions take, and the others split by
shifts. Pages of 16 n tokens waste nothing; other sizes are rounded up to a block, as head_dim is to a word and
v_head_dim to 16. The longer a page, the fewer jumps to places that no hardware prefetcher foresees; one of 128 n
tokens is read in the order in which it lies.

`paged_attention` has the meaning of `hetero_jax.attention.paged_attention`, which is its oracle. A row's bits depend on
its own sequence alone: every 8 blocks give a max, a sum and weighted values, which are folded in order of position, so
neither the other rows nor the threads nor the page numbers matter, and a prefilled row equals a decoded one. Nor does
it matter whether q comes with k and v or ahead of them: `attend_behind` begins with the blocks that they do not touch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.resources
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax.attention_layout import AttentionLayout, appending_nothing
from partition import AttentionSpec

BLOCK = 16

_TARGET = "hetero_paged_attention"
# Elements of a word, by element type of the pool.
_WORD = {"float32": 1, "bfloat16": 2, "float16": 1, "int8": 4}
_ROW_DTYPES = ("float32", "bfloat16")
_PARTIAL_TAIL = 16  # a max, a sum, and room


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kv",),
    meta_fields=("page_size",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NativePool:
    """Keys and values of one site. kv: [num_pages, num_kv_heads, elements], see above."""

    kv: jax.Array
    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.kv.shape[0]


def refusal(*, dtype: Any, device: Any) -> str | None:
    """Why the kernel cannot serve such a pool; None if it can."""
    if device.platform != "cpu":
        return f"the native kernel runs on the CPU, not on {device.platform}"
    if jnp.dtype(dtype).name not in _WORD:
        return f"kv_cache_dtype={jnp.dtype(dtype).name}; the native kernel takes {', '.join(_WORD)}"
    library = _load()
    return library if isinstance(library, str) else None


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, its handler registered with XLA once; or what is missing."""
    built = importlib.resources.files("hetero_jax") / "libhetero_attention.so"
    path = os.environ.get("HETERO_JAX_NATIVE_LIBRARY", built)  # another build of it: with sanitizers, say
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library was not built when the package was installed ({error})"
    library.hetero_usable_isas.restype = ctypes.c_char_p
    library.hetero_ask_for_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.hetero_paged_attention), platform="cpu")
    return library


def load_library() -> ctypes.CDLL:
    """The native library. Raises RuntimeError where it is not there; `refusal` tells beforehand."""
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def usable_isas() -> tuple[str, ...]:
    """The kernels that this machine can run, best first. Raises RuntimeError where the library is not there."""
    return tuple(load_library().hetero_usable_isas().decode().split())


def make_pool(spec: AttentionSpec, *, num_pages: int, page_size: int, dtype: Any, device: Any) -> NativePool:
    """A zeroed pool on `device`, in this module's layout. Large ones ask the OS for huge pages."""
    with jax.default_device(device):
        kv = jnp.zeros(_pool_shape(spec, num_pages=num_pages, page_size=page_size, dtype=dtype), dtype)
    library = _load()
    if not isinstance(library, str):
        library.hetero_ask_for_huge_pages(jax.block_until_ready(kv).unsafe_buffer_pointer(), kv.nbytes)
    return NativePool(kv=kv, page_size=page_size)


def page_bytes(spec: AttentionSpec, *, page_size: int, dtype: Any) -> int:
    """Bytes of one page of a pool, what the layout pads and an int8 pool's scales included."""
    shape = _pool_shape(spec, num_pages=1, page_size=page_size, dtype=dtype)
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def _pool_shape(spec: AttentionSpec, *, num_pages: int, page_size: int, dtype: Any) -> tuple[int, int, int]:
    kind = jnp.dtype(dtype).name
    dims = _round_up(spec.head_dim, _WORD[kind]) + _round_up(spec.v_head_dim, BLOCK)
    scales = 2 * np.dtype(np.float32).itemsize if kind == "int8" else 0
    return num_pages, spec.num_kv_heads, _round_up(page_size, BLOCK) * (dims + scales)


def _round_up(size: int, to: int) -> int:
    return -(-size // to) * to


def needed_layout(layout: AttentionLayout) -> AttentionLayout:
    """The layout without what only the jax.numpy form reads, so that fewer shapes are compiled."""
    none = np.zeros(0, np.int32)
    return dataclasses.replace(layout, decode=none, tile_sequence=none, tile_offset=none)


def paged_attention(
    pool: NativePool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: AttentionLayout,
    site: AttentionSpec,
    *,
    sinks: Any = None,
    begun: jax.Array | None = None,
    isa: str = "",
    threads: int = 0,
) -> tuple[NativePool, jax.Array]:
    """Append this call's keys and values, then attend causally for every row; see the jax.numpy form.

    Args:
      pool: donate it, so that it is updated in place.
      q, k, v, layout, site: as in the jax.numpy form; q may differ in dtype from k and v, and both from the pool.
      begun: what `attend_behind` gave for the same q, layout and site; None: nothing was done ahead.
      sinks: [num_heads] a score of each head that takes part in the sum and brings no value. None: none does.
      isa: one of `usable_isas()`; "": $HETERO_JAX_ISA, and without that the best.
      threads: at most so many; 0: as many as XLA has.
    Raises:
      ValueError: shapes or dtypes that do not fit each other; page tables or lengths that do not fit the pool, where
        they are NumPy arrays (under jit, `check_layout` tells before, and the custom call as JaxRuntimeError).
      RuntimeError: the native library is not there; `refusal` tells beforehand.
    """
    new_pool, out, _ = paged_attention_with_lse(
        pool, q, k, v, layout, site, sinks=sinks, begun=begun, isa=isa, threads=threads, with_lse=False
    )
    return new_pool, out


def paged_attention_with_lse(
    pool: NativePool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: AttentionLayout,
    site: AttentionSpec,
    *,
    sinks: Any = None,
    begun: jax.Array | None = None,
    isa: str = "",
    threads: int = 0,
    with_lse: bool = True,
) -> tuple[NativePool, jax.Array, jax.Array]:
    """`paged_attention` and [R, num_heads] float32 log-sum-exp of each row's scores, -inf for rows of no sequence.

    Attention over parts of a context merges exactly: out = sum_i exp(lse_i - lse) out_i, lse = logsumexp_i lse_i.
    """
    results = (
        jax.ShapeDtypeStruct(pool.kv.shape, pool.kv.dtype),
        jax.ShapeDtypeStruct((q.shape[0], site.num_heads, site.v_head_dim), q.dtype),
        jax.ShapeDtypeStruct((q.shape[0], site.num_heads) if with_lse else (0,), jnp.float32),
        _NOTHING,
    )
    kv, out, lse, _ = _call(results, pool, (q, k, v), layout, site, sinks, begun, isa=isa, threads=threads)
    return dataclasses.replace(pool, kv=kv), out, lse


def attend_behind(
    pool: NativePool, q: jax.Array, layout: AttentionLayout, site: AttentionSpec, *, isa: str = "", threads: int = 0
) -> jax.Array:
    """Attend to the blocks that the rows of this call do not touch, before their keys and values are there.

    Args:
      pool: is read only; do not donate it.
    Returns:
      [R, num_heads, v_head_dim (padded) + 16] float32 values, max and sum: `begun` of `paged_attention`, which with
      it gives the bits that it gives without (the split of Lamina, arXiv 2405.01814, at blocks of fixed places).
    Raises:
      As `paged_attention`.
    """
    shape = (q.shape[0], site.num_heads, _round_up(site.v_head_dim, BLOCK) + _PARTIAL_TAIL)
    layout, *none = appending_nothing(layout, q, site)
    results = (_NOTHING, _NOTHING, _NOTHING, jax.ShapeDtypeStruct(shape, jnp.float32))
    return _call(results, pool, (q, *none), layout, site, None, None, isa=isa, threads=threads)[-1]


_NOTHING = jax.ShapeDtypeStruct((0,), jnp.float32)


def _call(
    results: Sequence[jax.ShapeDtypeStruct],
    pool: NativePool,
    rows: Sequence[jax.Array],
    layout: AttentionLayout,
    site: AttentionSpec,
    sinks: Any,
    begun: jax.Array | None,
    *,
    isa: str,
    threads: int,
) -> Sequence[jax.Array]:
    """The custom call of q, k, v. results: pool, output, log-sum-exp, and what `attend_behind` gives, or nothing."""
    load_library()
    q, k, v = rows
    _check_shapes(pool, q, k, v, layout, site)
    if all(isinstance(table, np.ndarray) for table in jax.tree.leaves(layout)):
        check_layout(layout, num_rows=q.shape[0], num_pages=pool.num_pages, page_size=pool.page_size)
    updates = {0: 0} if results[0] is not _NOTHING else {}
    tables = (layout.page_table, layout.first_row, layout.num_rows, layout.context, layout.row_slot)
    return jax.ffi.ffi_call(_TARGET, results, input_output_aliases=updates)(
        pool.kv,
        *(q, k, v),
        *tables,
        _per_head("alibi_slopes", site.alibi_slopes, site),
        _per_head("sinks", sinks, site),
        jnp.zeros(0, jnp.float32) if begun is None else begun,
        scale=np.float32(site.scale),
        softcap=np.float32(site.softcap or 0.0),
        window=np.int64(site.window or 0),
        page_size=np.int64(pool.page_size),
        threads=np.int64(threads),
        isa=isa,
    )


def _per_head(name: str, values: Any, site: AttentionSpec) -> jax.Array:
    if values is None:
        return jnp.zeros(0, jnp.float32)
    found = jnp.asarray(values, jnp.float32)
    if found.shape != (site.num_heads,):
        raise ValueError(f"{name} has shape {found.shape}; allowed: {(site.num_heads,)}")
    return found


def _check_shapes(
    pool: NativePool, q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, site: AttentionSpec
) -> None:
    rows, new, heads = q.shape[0], len(k), site.num_kv_heads
    sequences = layout.page_table.shape[0]
    pool_shape = _pool_shape(site, num_pages=pool.num_pages, page_size=pool.page_size, dtype=pool.kv.dtype)
    expected = {
        "q": (q.shape, (rows, site.num_heads, site.head_dim)),
        "k": (k.shape, (new and rows, heads, site.head_dim)),
        "v": (v.shape, (new and rows, heads, site.v_head_dim)),
        "pool.kv": (pool.kv.shape, pool_shape),
        "row_slot": (layout.row_slot.shape, (new and rows,)),
        **{name: (getattr(layout, name).shape, (sequences,)) for name in ("first_row", "num_rows", "context")},
    }
    for name, (seen, allowed) in expected.items():
        if tuple(seen) != allowed:
            raise ValueError(f"{name} has shape {tuple(seen)}; allowed: {allowed}")
    if q.dtype.name not in _ROW_DTYPES or k.dtype.name not in _ROW_DTYPES or k.dtype != v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; allowed: float32 or bfloat16, k and v the same")


def check_layout(layout: AttentionLayout, *, num_rows: int, num_pages: int, page_size: int) -> None:
    """Whether concrete tables fit a call of `num_rows` rows and the pool.

    Raises:
      ValueError: names the sequence, what it has and what is allowed.
    """
    table = np.asarray(layout.page_table)
    first, count, context = (np.asarray(getattr(layout, name)) for name in ("first_row", "num_rows", "context"))
    for index in np.flatnonzero((first < 0) | (count < 0) | (first.astype(np.int64) + count > num_rows)):
        seen = f"{first[index]} to {int(first[index]) + int(count[index])}"
        raise ValueError(f"sequence {index} has rows {seen}; allowed: 0 to {num_rows}")
    for index in np.flatnonzero(count):
        most = table.shape[1] * page_size
        if not count[index] <= context[index] <= most:
            raise ValueError(
                f"sequence {index} has a context of {context[index]}; "
                f"allowed: {count[index]} (its rows) to {most} (its page table)"
            )
        pages = table[index, : -(-int(context[index]) // page_size)]
        if ((pages < 0) | (pages >= num_pages)).any():
            wrong = pages[(pages < 0) | (pages >= num_pages)][0]
            raise ValueError(f"sequence {index} has page {wrong}; allowed: 0 to {num_pages - 1}")
    slots = np.asarray(layout.row_slot)
    if slots.size and slots.min() < 0:
        raise ValueError(f"row {slots.argmin()} has slot {slots.min()}; allowed: 0 and above")
