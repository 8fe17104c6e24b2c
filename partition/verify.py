"""The plain model and the decoder that was cut from it, side by side on the same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.attention_spec import reference_attention
from partition.compile import prepare_site_weights, prepare_weights, stage_functions
from partition.errors import PartitionError
from partition.jaxpr import Value
from partition.labels import Axis
from partition.plan import Plan
from partition.planned_site import PlannedSite
from partition.trace import rows_unlike_dimensions, trace_at

# Few lengths of chunks, so that few shapes are compiled.
_CHUNKS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification:
    """Largest differences from the plain model, each as a part of the largest number there.

    stages: of what each stage keeps and sends. sites: of what each site gives. logits: of the result, for every token,
      or for the last one where the model gives no others.
    chunks: how the tokens were split.
    """

    stages: tuple[float, ...]
    sites: tuple[float, ...]
    logits: float
    chunks: tuple[int, ...]

    def __repr__(self) -> str:
        lines = [f"largest differences from the plain model over {sum(self.chunks)} tokens in chunks of {self.chunks}:"]
        for index, stage in enumerate(self.stages):
            site = f", site {index}: {self.sites[index]:.2g}" if index < len(self.sites) else ""
            lines.append(f"  stage {index}: {stage:.2g}{site}")
        return "\n".join([*lines, f"  logits: {self.logits:.2g}"])


def verify(plan: Plan, params: Any, tokens: Sequence[int], *, seed: int = 0) -> Verification:
    """Decode `tokens` with a cache, in random prefill chunks and single rows, and compare everything on the way.

    Recognised sites are computed by the definition of their `AttentionSpec`, the others by their own equations.

    Args:
      params: the pytree that the plan was made from, with arrays.
      tokens: [T] ids.

    Raises:
      PartitionError: no tokens, or more than `plan.max_rows`.
    """
    ids = np.asarray(tokens, np.int32)
    if ids.ndim != 1 or not 1 <= len(ids) <= plan.max_rows:
        raise PartitionError(f"tokens have shape {ids.shape}; allowed: 1 to {plan.max_rows} ids")
    plain = _Plain(plan, params, ids)
    expected = _plain_logits(plan, params, ids)
    first = len(ids) - len(expected)
    decoder = _Decoder(plan, params, len(ids))
    differences = _Differences()
    chunks = tuple(_split(len(ids), np.random.default_rng(seed)))
    for start, length in zip(np.cumsum([0, *chunks]), chunks, strict=False):
        rows = np.arange(start, start + length)
        for part, value, array in decoder.run(ids[rows], rows):
            differences.add(part, array, plain.rows_of(value, rows))
            if value is plan.analysis.traced.program.outputs[0]:
                given = rows >= first
                differences.add("logits", array.reshape(length, -1)[given], expected[rows[given] - first])
    return Verification(
        stages=tuple(differences.of(f"stage {stage.index}") for stage in plan.stages),
        sites=tuple(differences.of(f"site {index}") for index in range(len(plan.sites))),
        logits=differences.of("logits"),
        chunks=chunks,
    )


def _split(count: int, random: np.random.Generator) -> Iterator[int]:
    while count:
        length = int(random.choice([size for size in _CHUNKS if size <= count]))
        yield length
        count -= length


class _Plain:
    """Every value of the plain forward pass, traced at about the number of tokens itself."""

    def __init__(self, plan: Plan, params: Any, ids: np.ndarray) -> None:
        self.plan = plan
        traced, chunk = plan.analysis.traced.program, plan.analysis.traced.chunk
        # The model is causal, so tokens behind the others change nothing.
        count, program = next(
            (chunk * count, program)
            for count in rows_unlike_dimensions(params, itertools.count(max(-(-len(ids) // chunk), 7)))
            if len((program := trace_at(plan.forward, chunk * count, plan.analysis.traced.learned)).equations)
            == len(traced.equations)
        )
        padded = jnp.asarray(np.pad(ids, (0, count - len(ids))))[None]
        inputs = (*jax.tree.leaves(params), padded, jnp.arange(count, dtype=jnp.int32)[None])
        env = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
        for eqn in program.equations:
            env.update(zip(eqn.outputs, eqn.evaluate([env[value] for value in eqn.inputs]), strict=True))
        self.values = {}
        for eqn, twin in zip(traced.equations, program.equations, strict=True):
            self.values.update(zip(eqn.outputs, (env[value] for value in twin.outputs), strict=True))

    def rows_of(self, value: Value, rows: np.ndarray) -> np.ndarray:
        """Some rows of a value, in the layout that stages keep it in."""
        axis = self.plan.analysis.facts[value].labels.index(Axis.ROW)
        return np.asarray(jnp.take(self.values[value], rows, axis=axis))


class _Decoder:
    """Stages and sites over a cache as long as the sequence."""

    def __init__(self, plan: Plan, params: Any, count: int) -> None:
        self.plan = plan
        self.prepared = prepare_weights(plan, params) | prepare_site_weights(plan, params)
        self.stages = stage_functions(plan, jax.jit)
        self.attend = {site.key: _attention(site) for site in plan.sites}
        self.count = count
        self.caches: dict[tuple[Any, Value], np.ndarray] = {}

    def run(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[tuple[str, Value, np.ndarray]]:
        """One call: (stage or site, value, its rows in the model's layout) of everything on the way."""
        values: dict[Value, Any] = {}
        sent: dict[tuple[int, int], jax.Array] = {}
        for stage, run in zip(self.plan.stages, self.stages, strict=True):
            externals = [self.prepared[value] for value in stage.externals]
            writes, sends = run(externals, jnp.asarray(ids), jnp.asarray(rows), [values[v] for v in stage.reads])
            values.update(zip(stage.writes, writes, strict=True))
            yield from ((f"stage {stage.index}", v, np.asarray(a)) for v, a in zip(stage.writes, writes, strict=True))
            for send, array in zip(stage.sends, sends, strict=True):
                sent[(send.site, send.index)] = array
                yield f"stage {stage.index}", send.value, np.asarray(send.port.layout.from_canonical(array))
            if stage.index < len(self.plan.sites):
                outputs = self._site(stage.index, sent, rows)
                for port, array in zip(self.plan.sites[stage.index].outputs, outputs, strict=True):
                    values[port.value] = array
                    yield f"site {stage.index}", port.value, np.asarray(port.layout.from_canonical(array))

    def _site(self, index: int, sent: dict[tuple[int, int], jax.Array], rows: np.ndarray) -> tuple[jax.Array, ...]:
        site = self.plan.sites[index]
        operands = []
        for number, port in enumerate(site.inputs):
            kept = (site.cache_key, port.value)
            if port.is_cached and number in site.sent:
                array = sent.pop((index, number))
                empty = np.zeros((self.count, *array.shape[1:]), array.dtype)
                self.caches.setdefault(kept, empty)[rows] = array
            operands.append(self.caches[kept] if port.is_cached else sent.pop((index, number)))
        weights = site.kernel_weights([self.prepared[value] for value in site.weights])
        return self.attend[site.key](operands, rows, np.arange(self.count), weights)


def _attention(site: PlannedSite) -> Callable[..., tuple[jax.Array, ...]]:
    """(operands, query positions, key positions, weights) -> outputs. Keys not written yet are in the future."""
    spec = site.spec
    if spec is None:
        return jax.jit(site.attend)

    def attend(operands: Sequence[Any], queries: np.ndarray, keys: np.ndarray, weights: Any) -> tuple[jax.Array, ...]:
        q, k, v = (np.asarray(array, np.float64) for array in operands)
        sinks = np.asarray(weights[0], np.float64) if spec.has_sinks else None
        return (jnp.asarray(reference_attention(spec, q, k, v, queries, keys, sinks), operands[0].dtype),)

    return attend


def _plain_logits(plan: Plan, params: Any, ids: np.ndarray) -> np.ndarray:
    """[T, vocab], or [1, vocab] of a model that gives those of the last token alone."""
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    logits = jax.jit(plan.forward.fn)(params, jnp.asarray(ids)[None], positions)
    return np.asarray(jax.tree.leaves(logits)[0]).reshape(-1, plan.vocab_size)


class _Differences:
    """Per part of the model the largest difference so far, relative to the largest number of the same rows."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def add(self, part: str, found: np.ndarray, expected: np.ndarray) -> None:
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        scale = np.abs(expected).max(initial=0.0) or 1.0
        self.worst[part] = max(self.worst.get(part, 0.0), float(np.abs(found - expected).max(initial=0.0) / scale))

    def of(self, part: str) -> float:
        return self.worst.get(part, 0.0)
