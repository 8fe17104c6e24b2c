"""Achieved KV bytes/s of paged attention on the CPU against the roof of this machine, measured in the same run.

    python -m experiments.bench_attention --batches=16,64 --contexts=2048,8192,conv

The roof of a decode point is the smaller of the read bandwidth, measured in turn with it, and the vector unit's
multiply-add peak divided by the point's multiply-adds per byte of keys and values (group / element size); `binds`
says which. `scattered` is the bandwidth of a plain read of the same pages in random order. Every
point rotates over several pools, as the sites of a model do, so that no cache holds what is read. A context of "code"
or "conv" draws ragged lengths from the traces in data/. Prefill is compared with XLA's matrix products, a mixed call
with its parts in calls of their own, and, where torch is installed, decode with its attention over contiguous keys.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.bench_point import num_cores
from experiments.markdown import print_header, print_row
from experiments.workloads import SAMPLES, load_workload
from hetero_jax import attention, native_attention
from hetero_jax.attention import AttentionSpec
from hetero_jax.attention_layout import AttentionLayout, slots_of
from hetero_jax.config import KV_CACHE_DTYPES
from hetero_jax.native_probe import multiply_add_peak, read_bandwidth, scattered_read_bandwidth

_DTYPES = flags.DEFINE_list("dtypes", list(KV_CACHE_DTYPES), "Element types of the pool.")
_GROUPS = flags.DEFINE_list("groups", ["1", "3", "4", "8"], "Query heads per KV head.")
_HEAD_SIZES = flags.DEFINE_list("head_sizes", ["64", "128"], "Sizes of a head.")
_CONTEXTS = flags.DEFINE_list("contexts", ["512", "2048", "8192", "conv"], f"Tokens, or one of {SAMPLES}.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "64"], "Sequences of a decode call.")
_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 4, "KV heads.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 128, "Token positions in a page.")
_PARTS = flags.DEFINE_list("parts", ["decode", "beside", "prefill", "mixed", "shared", "threads"], "What is measured.")

_ROTATE_BYTES = 256 << 20  # several times the caches
_RUNS, _RUN_SECONDS = 6, 0.05
_RAGGED_MOST = 8192

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`new` rows of a sequence at the end of a context of `context` positions, the first `shared` in common pages."""

    context: int
    new: int = 1
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """Multiply-adds per second of all cores, by element type of the pool."""

    cores: int
    multiply_add: dict[str, float]

    def of(self, dtype: str, spec: AttentionSpec, read: float) -> tuple[float, str]:
        """Bytes of keys and values per second that a decode may reach at most, and what binds it."""
        compute = self.multiply_add[dtype] / (_group(spec) / jnp.dtype(dtype).itemsize)
        return (read, "memory") if read <= compute else (compute, "compute")


def main(argv: list[str]) -> None:
    """Print one Markdown table a part."""
    del argv
    cores = num_cores()
    peaks = {name: multiply_add_peak(name, cores) for name in _DTYPES.value}
    roofs = Roofs(cores=cores, multiply_add=peaks)
    print(f"{cores} cores, instruction set {native_attention.usable_isas()[0]}, JAX {jax.__version__}")
    print(f"read {read_bandwidth(cores) / 1e9:.1f} GB/s; one core {read_bandwidth(1) / 1e9:.1f} GB/s")
    print("; ".join(f"{name} {peak / 1e9:.0f} G multiply-adds/s" for name, peak in peaks.items()) + "\n", flush=True)
    parts = {"decode": _decode, "beside": _beside, "prefill": _prefill, "mixed": _mixed}
    parts |= {"shared": _shared, "threads": _threads}
    for name in _PARTS.value:
        parts[name](roofs)
        print(flush=True)


def _decode(roofs: Roofs) -> None:
    print_header(
        ["dtype", "group", "head", "batch", "context", "GB/s", "roof GB/s", "binds", "of the roof", "scattered GB/s"]
    )
    for dtype in _DTYPES.value:
        for spec in _specs():
            for batch in map(int, _BATCHES.value):
                for context in _CONTEXTS.value:
                    rows = _sequences(batch, context)
                    seconds, read = _beside_reading(_native_call(spec, dtype, rows), roofs.cores)
                    rate = _kv_bytes(spec, dtype, rows) / seconds
                    roof, binds = roofs.of(dtype, spec, read)
                    page = [Rows(context=_PAGE_SIZE.value)]
                    scattered = scattered_read_bandwidth(_kv_bytes(spec, dtype, page), roofs.cores, attempts=2)
                    figures = (f"{rate / 1e9:.1f}", f"{roof / 1e9:.1f}", binds, f"{rate / roof:.2f}")
                    figures += (f"{scattered / 1e9:.1f}",)
                    print_row([*_where(dtype, spec), batch, context, *figures])


def _beside(roofs: Roofs) -> None:
    """The same decode by the jax.numpy form and, contiguous, by torch."""
    del roofs
    spec, rows = _spec(3, 64), _sequences(16, "2048")
    print_header(["dtype", "native ms", "jax.numpy ms", "ratio", "torch ms", "ratio"])
    for dtype in ("float32", "bfloat16"):
        native = _seconds(_native_call(spec, dtype, rows))
        plain = _seconds(_call(attention, spec, dtype, rows))
        cells = [dtype, f"{native * 1e3:.2f}", f"{plain * 1e3:.1f}", f"{plain / native:.1f}", "not installed", ""]
        if importlib.util.find_spec("torch"):
            other = _seconds(_torch_call(spec, dtype, rows))
            cells[4:] = [f"{other * 1e3:.2f}", f"{other / native:.1f}"]
        print_row(cells)


def _prefill(roofs: Roofs) -> None:
    """Chunks of 512 rows, at the start and far into a sequence, against a matrix product of 2048 x 2048 x 2048."""
    del roofs
    print_header(["dtype", "group", "head", "chunk at", "TFLOP/s", "matrix product TFLOP/s", "ratio"])
    for dtype in ("float32", "bfloat16"):
        peak = _matrix_peak(dtype)
        for spec in _specs():
            for start in (0, 1536):
                rows = [Rows(context=start + 512, new=512)] * 4
                seen = sum(r.new * r.context - r.new * (r.new - 1) // 2 for r in rows)
                flops = 4 * seen * spec.num_heads * spec.head_dim / _seconds(_native_call(spec, dtype, rows))
                figures = (f"{flops / 1e12:.3f}", f"{peak / 1e12:.3f}", f"{flops / peak:.2f}")
                print_row([*_where(dtype, spec), start, *figures])


def _mixed(roofs: Roofs) -> None:
    """One call with prefill chunks and decode rows against a call of each, both parts about equally long."""
    del roofs
    print_header(["dtype", "group", "head", "prefill ms", "decode ms", "mixed ms", "mixed / sum"])
    for dtype in ("float32", "bfloat16"):
        for spec in _specs():
            decode = [Rows(context=2048)] * 32
            decode_s = _seconds(_native_call(spec, dtype, decode))
            chunk_s = _seconds(_native_call(spec, dtype, [Rows(context=512, new=256)]))
            prefill = [Rows(context=512, new=256)] * max(1, round(decode_s / chunk_s))
            prefill_s = _seconds(_native_call(spec, dtype, prefill))
            mixed_s = _seconds(_native_call(spec, dtype, [*prefill, *decode]))
            times = (prefill_s, decode_s, mixed_s)
            figures = (*(f"{s * 1e3:.2f}" for s in times), f"{mixed_s / (prefill_s + decode_s):.2f}")
            print_row([*_where(dtype, spec), *figures])


def _shared(roofs: Roofs) -> None:
    """32 sequences with 2048 positions in common pages and 64 of their own, against 2112 of their own."""
    del roofs
    print_header(["dtype", "group", "head", "unshared ms", "shared ms", "times faster"])
    for dtype in _DTYPES.value:
        for spec in _specs():
            apart, together = (
                _seconds(_native_call(spec, dtype, [Rows(context=2112, shared=shared)] * 32)) for shared in (0, 2048)
            )
            figures = (f"{apart * 1e3:.2f}", f"{together * 1e3:.2f}", f"{apart / together:.1f}")
            print_row([*_where(dtype, spec), *figures])


def _threads(roofs: Roofs) -> None:
    """One thread against all, and one long sequence among short ones against as many bytes in even ones."""
    del roofs
    print_header(["dtype", "group", "head", "one thread ms", "all ms", "scaling", "32k + 63 short / even"])
    uneven = [Rows(context=32_768), *[Rows(context=256)] * 63]
    even = [Rows(context=sum(r.context for r in uneven) // 64)] * 64
    for dtype in _DTYPES.value:
        for spec in _specs():
            rows = _sequences(16, "2048")
            one, both = (_seconds(_native_call(spec, dtype, rows, threads=n)) for n in (1, 0))
            ratio = _seconds(_native_call(spec, dtype, uneven)) / _seconds(_native_call(spec, dtype, even))
            figures = (f"{one * 1e3:.2f}", f"{both * 1e3:.2f}", f"{one / both:.2f}", f"{ratio:.2f}")
            print_row([*_where(dtype, spec), *figures])


def _spec(group: int, head_dim: int) -> AttentionSpec:
    heads = _KV_HEADS.value
    return AttentionSpec(
        num_heads=group * heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        window=None,
        softcap=None,
    )


def _where(dtype: str, spec: AttentionSpec) -> tuple[str, int, int]:
    """The first columns of a row: dtype, group, head size."""
    return dtype, _group(spec), spec.head_dim


def _group(spec: AttentionSpec) -> int:
    return spec.num_heads // spec.num_kv_heads


def _specs() -> list[AttentionSpec]:
    return [_spec(int(group), int(size)) for group in _GROUPS.value for size in _HEAD_SIZES.value]


def _sequences(batch: int, context: str) -> list[Rows]:
    if context not in SAMPLES:
        return [Rows(context=int(context))] * batch
    lengths = [r.prompt_tokens + r.output_tokens for r in load_workload(context, limit=batch)]
    return [Rows(context=min(length, _RAGGED_MOST)) for length in lengths]


def _kv_bytes(spec: AttentionSpec, dtype: str, rows: Iterable[Rows]) -> int:
    """Bytes of keys, values and scales that a call has to read."""
    scales = 8 if dtype == "int8" else 0
    per_token = (spec.head_dim + spec.v_head_dim) * jnp.dtype(dtype).itemsize + scales
    return sum(r.context for r in rows) * spec.num_kv_heads * per_token


def _layout(rows: list[Rows]) -> tuple[AttentionLayout, int]:
    """Sequences in pages given out at random, and the number of pages; decode rows alone serve the jax.numpy form."""
    size = _PAGE_SIZE.value
    common = max(r.shared for r in rows) // size
    counts = [-(-r.context // size) - r.shared // size for r in rows]
    num_pages = common + sum(counts)
    free = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    table = np.zeros((len(rows) + 1, max(-(-r.context // size) for r in rows)), np.int32)
    slots = []
    for index, (r, own) in enumerate(zip(rows, np.split(free[common:], np.cumsum(counts)[:-1]), strict=True)):
        pages = np.concatenate([free[: r.shared // size], own])
        table[index, : len(pages)] = pages
        slots.append(slots_of(pages[None], np.arange(r.context - r.new, r.context), size))
    new = np.array([r.new for r in rows] + [0], np.int32)
    none = np.zeros(0, np.int32)
    layout = AttentionLayout(
        page_table=table,
        first_row=np.concatenate([[0], np.cumsum(new)[:-1]]).astype(np.int32),
        num_rows=new,
        context=np.array([r.context for r in rows] + [0], np.int32),
        row_slot=np.concatenate(slots).astype(np.int32),
        decode=np.arange(len(rows), dtype=np.int32),
        tile_sequence=none,
        tile_offset=none,
    )
    return layout, num_pages


def _native_call(spec: AttentionSpec, dtype: str, rows: list[Rows], threads: int = 0) -> Call:
    return _call(native_attention, spec, dtype, rows, threads=threads)


def _call(kernel: Any, spec: AttentionSpec, dtype: str, rows: list[Rows], **options: Any) -> Call:
    """A call of `kernel` that goes over several pools in turn."""
    device = jax.devices("cpu")[0]
    layout, num_pages = _layout(rows)
    if kernel is native_attention:
        layout = native_attention.needed_layout(layout)
    count = max(1, -(-_ROTATE_BYTES // _kv_bytes(spec, dtype, rows)))
    pools = [
        _filled(kernel.make_pool(spec, num_pages=num_pages, page_size=_PAGE_SIZE.value, dtype=dtype, device=device))
        for _ in range(count)
    ]
    draw = np.random.default_rng(1)
    kind = "bfloat16" if dtype == "bfloat16" else "float32"
    total = sum(r.new for r in rows)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    arrays = [jnp.asarray(draw.normal(size=(total, h, spec.head_dim)), kind) for h in heads]
    placed = jax.device_put(layout, device)
    run = jax.jit(functools.partial(kernel.paged_attention, site=spec, **options), donate_argnums=0)
    turn = 0

    def call() -> Any:
        nonlocal turn
        turn = (turn + 1) % count
        pools[turn], out = run(pools[turn], *arrays, placed)
        return out

    return call


def _filled(pool: Any) -> Any:
    """Numbers instead of zeros, for memory that was never written may be one page of the OS."""
    return jax.tree.map(jax.jit(lambda x: (x + 1).astype(x.dtype), donate_argnums=0), pool)


def _torch_call(spec: AttentionSpec, dtype: str, rows: list[Rows]) -> Call:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(num_cores())
    kind, context = getattr(torch, dtype), rows[0].context
    q = torch.randn(len(rows), spec.num_heads, 1, spec.head_dim).to(kind)
    k, v = (torch.randn(len(rows), spec.num_kv_heads, context, spec.head_dim).to(kind) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, enable_gqa=True)


def _matrix_peak(dtype: str) -> float:
    """FLOP/s of XLA CPU's best matrix product with an f32 result."""
    a = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    return 2 * 2048**3 / _seconds(lambda: product(a))


def _seconds(call: Call) -> float:
    """Best seconds of a call."""
    return min(_each(call))


def _beside_reading(call: Call, cores: int) -> tuple[float, float]:
    """Best seconds of a call and best read bandwidth in bytes/s, measured in turn: neighbours come and go."""
    pairs = [(seconds, read_bandwidth(cores, attempts=2)) for seconds in _each(call)]
    return min(seconds for seconds, _ in pairs), max(read for _, read in pairs)


def _each(call: Call) -> Iterator[float]:
    """Mean seconds of a call in each of several runs of as many as fill a moment."""
    jax.block_until_ready(call())  # compiles
    start = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, round(_RUN_SECONDS / (time.perf_counter() - start)))
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(call())
        yield (time.perf_counter() - start) / count


if __name__ == "__main__":
    app.run(main)
