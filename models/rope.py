"""Rotary position embeddings: frequencies of the scaling variants, and the rotation itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import ModelFormatError, UnsupportedModelError

RopeTables = tuple[jax.Array, jax.Array]  # cosines and sines, f32 [B, T, 1, rotary_dim / 2]
ROPE_TYPES = ("linear", "llama3", "yarn", "factors")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies differ from theta^(-2i/d). Field names are Hugging Face's.

    `factors` is the form in which GGUF files carry the llama3 rule: one divisor for each frequency.
    """

    rope_type: str
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(f"rope_scaling type {self.rope_type!r} is not supported; allowed: {ROPE_TYPES}")
        required = {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
        if self.rope_type in ("llama3", "yarn"):
            required.add("original_max_position_embeddings")
        for name in (*sorted(required), "attention_factor", "mscale", "mscale_all_dim"):
            self._check_number(name, may_be_none=name not in required)
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelFormatError(
                f"rope_scaling 'llama3' needs high_freq_factor > low_freq_factor, "
                f"not {self.high_freq_factor!r} and {self.low_freq_factor!r}"
            )
        if self.rope_type == "factors" and not all(f > 0 and math.isfinite(f) for f in self.freq_factors or (0.0,)):
            raise ModelFormatError("rope_scaling 'factors' needs positive freq_factors")

    def _check_number(self, name: str, *, may_be_none: bool) -> None:
        value = getattr(self, name)
        if value is None and may_be_none:
            return
        smallest = 0.0 if name.startswith("mscale") else 1e-9
        if not isinstance(value, int | float) or not math.isfinite(value) or not smallest <= value <= 1e12:
            raise ModelFormatError(f"rope_scaling {self.rope_type!r}: {name} must be a positive number, not {value!r}")


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Inverse frequencies f32 [head_dim / 2], and the factor that multiplies the cosine and sine tables."""
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    attention_factor = 1.0
    if scaling is None:
        inv_freq = base
    elif scaling.rope_type == "linear":
        inv_freq = base / scaling.factor
    elif scaling.rope_type == "llama3":
        inv_freq = _llama3(base, scaling)
    elif scaling.rope_type == "yarn":
        inv_freq, attention_factor = _yarn(base, theta, scaling), yarn_attention_factor(scaling)
    else:
        inv_freq = _divide_by_factors(base, scaling)
    return inv_freq.astype(np.float32), attention_factor


def _divide_by_factors(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    factors = np.asarray(scaling.freq_factors, np.float64)
    if factors.shape != base.shape:
        raise ModelFormatError(f"rope freq_factors have shape {factors.shape}, the head size needs {base.shape}")
    return base / factors


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated by their turns in the
    original context."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * base / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return base * (keep + (1.0 - keep) / scaling.factor)


def _yarn(base: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Dimensions that turn more than beta_fast times in the original context are kept, those that turn less than
    beta_slow times are stretched, with a linear ramp over the dimensions between."""
    head_dim, context = 2 * len(base), scaling.original_max_position_embeddings
    assert context is not None

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # as the reference: a step instead of a division by zero
    stretched = np.clip((np.arange(len(base)) - low) / width, 0.0, 1.0)
    return base * (1.0 - stretched + stretched / scaling.factor)


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """What multiplies cosines and sines under yarn: given, or by the formula of the paper."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(multiplier: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * multiplier * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rope_tables(positions: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None) -> RopeTables:
    """int32 [B, T] -> cosines and sines, f32 [B, T, 1, rotary_dim / 2]."""
    inv_freq, factor = rope_frequencies(rotary_dim, theta, scaling)
    angles = positions.astype(jnp.float32)[:, :, None, None] * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the two halves of the first rotary_dim features of each head against each other, in f32; the others stay.

    x: [B, T, heads, head_dim], cos and sin: f32 [B, T, 1, rotary_dim / 2]; gives the shape and dtype of x.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
