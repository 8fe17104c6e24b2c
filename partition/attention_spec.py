"""What a recognised attention site computes, and its definition in NumPy: the oracle of every kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal softmax attention: out_i = sum_j softmax_j(cap(scale * q_i . k_j) + bias) v_j over j <= i, i - j < window.

    Query head h reads key-value head h // (num_heads // num_kv_heads). window None: all earlier tokens.
    softcap c: cap(x) = c * tanh(x / c); None: cap(x) = x.
    alibi_slopes: of each query head; the bias is slope * (j - i). None: no bias.
    has_sinks: the softmax of each query head has one score more, its sink, which brings no value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    has_sinks: bool = False

    @property
    def kept_shape(self) -> tuple[int, int, int]:
        """KV heads and the dimensions of keys and of values: sites equal in it keep alike."""
        return self.num_kv_heads, self.head_dim, self.v_head_dim


def reference_attention(
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    query_positions: Array,
    key_positions: Array,
    sinks: Array | None = None,
) -> Array:
    """The definition of `AttentionSpec` in NumPy.

    q: [queries, heads, dim]. k, v: [keys, kv_heads, dim]. sinks: [heads], of a spec that has them.
    """
    group = spec.num_heads // spec.num_kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = spec.scale * np.einsum("qhd,khd->hqk", q, k)
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    distance = query_positions[:, None] - key_positions[None, :]
    if spec.alibi_slopes is not None:
        scores = scores - np.array(spec.alibi_slopes)[:, None, None] * distance
    visible = (distance >= 0) & (distance < (spec.window or np.inf))
    scores = np.where(visible, scores, -np.inf)
    sink = np.full((spec.num_heads, 1, 1), -np.inf) if sinks is None else sinks[:, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = np.exp(scores - top)
    return np.einsum("hqk,khd->qhd", weights / (weights.sum(axis=-1, keepdims=True) + np.exp(sink - top)), v)
