"""What bench_attention counts: bytes, roofs, and layouts that the kernel takes."""

from __future__ import annotations

import pytest
from absl import flags

from experiments import bench_attention as bench


@pytest.fixture(autouse=True)
def _parsed_flags() -> None:
    flags.FLAGS(["bench_attention"])


def test_bytes_are_those_of_keys_values_and_scales():
    rows = [bench.Rows(context=100), bench.Rows(context=28, new=3)]
    assert bench._kv_bytes(bench._spec(3, 64), "bfloat16", rows) == 128 * 4 * 2 * 64 * 2
    assert bench._kv_bytes(bench._spec(3, 64), "int8", rows) == 128 * 4 * (2 * 64 + 2 * 4)


@pytest.mark.parametrize(
    ("dtype", "group", "expected"),
    [("float32", 1, (10e9, "memory")), ("int8", 8, (2.5e9, "compute")), ("int8", 1, (10e9, "memory"))],
)
def test_the_roof_is_the_smaller_of_memory_and_compute(dtype, group, expected):
    roofs = bench.Roofs(cores=2, multiply_add={"float32": 20e9, "int8": 20e9})
    assert roofs.of(dtype, bench._spec(group, 64), 10e9) == expected


def test_the_kernel_takes_the_layouts():
    rows = [bench.Rows(context=600), bench.Rows(context=300, new=20)]
    layout, num_pages = bench._layout(rows)
    assert num_pages == 5 + 3
    assert sorted(layout.page_table[0, :5].tolist() + layout.page_table[1, :3].tolist()) == list(range(8))
    bench.native_attention.check_layout(layout, num_rows=21, num_pages=8, page_size=128)
