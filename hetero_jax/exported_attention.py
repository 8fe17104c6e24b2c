"""Attention that no kernel knows, as programs for another process: `traced_attention` by way of `jax.export`.

A program is serialised StableHLO for XLA CPU: it computes, and is no Python. Numbers of rows, sequences and pages are
symbols in it, but a symbol is never 0 to `jax.export`: calls without decode rows, or without prefill tiles, have
programs of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.export  # which `import jax` leaves out
import jax.numpy as jnp
import numpy as np

from hetero_jax import traced_attention
from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.errors import ConfigError
from partition import PlannedSite

MAX_PROGRAM_BYTES = 1 << 26

# Whether a call has decode rows and prefill tiles, in the order of the programs.
_CALLS = ((True, False), (False, True), (True, True))
NUM_PROGRAMS = len(_CALLS)
_LAYOUT = tuple(field.name for field in fields(AttentionLayout))


def export_attention(site: PlannedSite, *, page_size: int, dtype: Any) -> list[np.ndarray]:
    """NUM_PROGRAMS programs [bytes] uint8 of a site whose pool has elements of `dtype`.

    Raises:
      ConfigError: it cannot be exported.
    """
    try:
        with _no_locations():
            programs = [_export(site, page_size, dtype, *call).serialize() for call in _CALLS]
    except Exception as error:  # tracing, lowering and the export's own checks have no error in common
        raise ConfigError(f"jax.export refuses it: {error}") from error
    longest = max(map(len, programs))
    if longest > MAX_PROGRAM_BYTES:
        raise ConfigError(f"its program has {longest} bytes; allowed: at most {MAX_PROGRAM_BYTES}")
    return [np.frombuffer(program, np.uint8) for program in programs]


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """What is lowered names no files and lines: a program depends on the site alone, and so does its fingerprint."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _export(
    site: PlannedSite, page_size: int, dtype: Any, has_decode_rows: bool, has_tiles: bool
) -> jax.export.Exported:
    def attend(pool: Any, inputs: Any, layout: Sequence[Any], weights: Any) -> Any:
        named = AttentionLayout(**dict(zip(_LAYOUT, layout, strict=True)))
        return traced_attention.paged_attention(pool, inputs, named, weights, site=site, dtype=dtype)

    rows, sequences, pages, decode, tiles, pool_pages = jax.export.symbolic_shape("r, s, p, a, b, n")
    shapes = {"page_table": (sequences, pages), "row_slot": (rows,), "decode": (decode if has_decode_rows else 0,)}
    shapes |= dict.fromkeys(("tile_sequence", "tile_offset"), (tiles if has_tiles else 0,))
    pool = jax.eval_shape(
        lambda: traced_attention.make_pool(site, num_pages=1, page_size=page_size, dtype=dtype, device=None)
    )
    sent = [site.inputs[index] for index in site.sent]
    return jax.export.export(jax.jit(attend), platforms=["cpu"])(
        tuple(jax.ShapeDtypeStruct((pool_pages, *array.shape[1:]), array.dtype) for array in pool),
        tuple(jax.ShapeDtypeStruct((rows, *port.layout.inner), port.value.dtype) for port in sent),
        tuple(jax.ShapeDtypeStruct(shapes.get(name, (sequences,)), jnp.int32) for name in _LAYOUT),
        tuple(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in site.weights),
    )


class ExportedAttention:
    """What `export_attention` made, in the process that serves it.

    pool: of each array of the pool, the shape behind its pages, [page_size, *inner], and element type.
    inputs, outputs: of each, the shape of a row and element type.

    Raises:
      ConfigError: no such programs.
    """

    def __init__(self, programs: Sequence[np.ndarray]) -> None:
        try:
            found = [_read(program) for program in programs]
            self._programs = dict(zip(_CALLS, found, strict=True))
            (pool, inputs, _, _), _ = jax.tree.unflatten(found[0].in_tree, found[0].in_avals)
            _, outputs = jax.tree.unflatten(found[0].out_tree, found[0].out_avals)
        except ConfigError:
            raise
        except Exception as error:  # a parser's, of whatever bytes
            raise ConfigError(f"a site's program cannot be read: {type(error).__name__}: {error}") from error
        self.pool, self.inputs, self.outputs = ([_row(array) for array in each] for each in (pool, inputs, outputs))

    def attend(
        self, pool: Any, inputs: Sequence[jax.Array], layout: AttentionLayout, weights: Sequence[jax.Array]
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """As `traced_attention.paged_attention`, of inputs of any float type."""
        program = self._programs[layout.decode.shape[0] > 0, layout.tile_sequence.shape[0] > 0]
        rows = tuple(array.astype(dtype) for array, (_, dtype) in zip(inputs, self.inputs, strict=True))
        found: Any = program.call(pool, rows, tuple(getattr(layout, name) for name in _LAYOUT), tuple(weights))
        return found


def _read(program: np.ndarray) -> jax.export.Exported:
    if program.dtype != np.uint8 or program.ndim != 1 or program.nbytes > MAX_PROGRAM_BYTES:
        seen = f"{program.dtype}{list(program.shape)}"
        raise ConfigError(f"a site's program {seen}; allowed: uint8 of at most {MAX_PROGRAM_BYTES} bytes")
    return jax.export.deserialize(bytearray(program))


def _row(array: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return tuple(int(size) for size in array.shape[1:]), np.dtype(array.dtype)
