"""Sampling against float64 references written from vLLM's definitions, and bit-for-bit independence of rows."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hetero_jax import sampler_math
from hetero_jax.sampler import RowSampling, SamplerVariant, build_inputs, sample
from hetero_jax.sampling_params import SamplingParams

VOCAB = 1003  # not a multiple of any block


def _logits(num_rows: int, vocab_size: int = VOCAB, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num_rows, vocab_size)) * scale).astype(np.float32)


def _row(
    index: int = 0, *, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2), **params: Any
) -> RowSampling:
    return RowSampling(
        params=SamplingParams(**params),
        prompt_token_ids=prompt,
        output_token_ids=output,
        request_id=f"request-{index}",
        sample_index=0,
        seed=7,
        stop_token_ids=(5, 6),
    )


def _run(logits: np.ndarray, rows: list[RowSampling], num_slots: int | None = None) -> Any:
    num_slots = num_slots or len(rows)
    inputs, variant = build_inputs(rows, vocab_size=logits.shape[1], num_slots=num_slots)
    padded = np.concatenate([logits, np.repeat(logits[:1], num_slots - len(rows), 0)])
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(rows)], sample(jnp.asarray(padded), inputs, variant))


# --- the reference: one row, float64, with sorts


def _reference_logits(logits: np.ndarray, row: RowSampling) -> np.ndarray:
    params, out = row.params, logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    if len(row.output_token_ids) < params.min_tokens:
        out[list(row.stop_token_ids)] = -np.inf
    for token in {*row.prompt_token_ids, *row.output_token_ids}:
        out[token] = (
            out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        )
    for token in set(row.output_token_ids):
        out[token] -= params.frequency_penalty * list(row.output_token_ids).count(token) + params.presence_penalty
    return out


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _reference_probabilities(logits: np.ndarray, row: RowSampling) -> np.ndarray:
    params = row.params
    x = _reference_logits(logits, row) / max(params.temperature, 0.01)
    p = _softmax(x)
    x = np.where(p < params.min_p * p.max(), -np.inf, x)
    if 0 < params.top_k < len(x):
        x = np.where(x < np.sort(x)[-params.top_k], -np.inf, x)
    p = _softmax(x)
    order = np.argsort(p, kind="stable")
    dropped = order[np.cumsum(p[order]) <= 1 - params.top_p]
    x[np.setdiff1d(dropped, order[-1:])] = -np.inf
    return _softmax(x)


def _uniforms(rows: list[RowSampling], vocab_size: int) -> np.ndarray:
    """The random number that each row draws with, in [0, 1)."""
    inputs, _ = build_inputs(rows, vocab_size=vocab_size, num_slots=len(rows))

    def bits(key: jax.Array, position: jax.Array) -> jax.Array:
        stream = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(stream, position), dtype=jnp.uint32)

    drawn = jax.vmap(bits)(inputs.per_row["key"], inputs.per_row["position"])
    return np.asarray(drawn).astype(np.float64) / 2**32


FEATURES: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 2": {"temperature": 2.0},
    "temperature 0.001": {"temperature": 0.001},  # which vLLM takes for 0.01
    "min_p": {"min_p": 0.02},
    "top_k 1": {"top_k": 1},
    "top_k 40": {"top_k": 40},
    "top_k beyond the vocabulary": {"top_k": 5000},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.05": {"top_p": 0.05},
    "top_p 0.9999": {"top_p": 0.9999},
    "top_k and top_p": {"top_k": 30, "top_p": 0.7, "temperature": 1.5},
    "all filters": {"top_k": 200, "top_p": 0.95, "min_p": 0.001, "temperature": 1.2},
    "logit_bias": {"logit_bias": {3: 9.0, 900: 8.0, 17: -50.0}},
    "min_tokens": {"min_tokens": 4, "logit_bias": {5: 15.0, 6: 15.0}},
    "min_tokens reached": {"min_tokens": 3, "logit_bias": {5: 15.0, 6: 15.0}},
    "repetition": {"repetition_penalty": 1.8},
    "repetition under 1": {"repetition_penalty": 0.4},
    "presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": -1.5},
    "all penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -1.0, "top_p": 0.8},
}


@cache
def _drawn() -> dict[str, list[tuple[np.ndarray, RowSampling, float, int]]]:
    """64 draws with each feature, all in one call: logits, row, random number and token of each."""
    rows = {
        name: [
            _row(i, output=(11, 12, 11, 950)[: 3 if "min_tokens" in params else 4], prompt=(1, 2, 3, 11), **params)
            for i in range(64)
        ]
        for name, params in FEATURES.items()
    }
    flat = [row for some in rows.values() for row in some]
    logits = _logits(len(flat))
    draws = list(zip(logits, flat, _uniforms(flat, VOCAB), _run(logits, flat).tokens, strict=True))
    return {name: draws[i * 64 : (i + 1) * 64] for i, name in enumerate(rows)}


@pytest.mark.parametrize("name", FEATURES)
def test_draws_are_the_inverse_cdf_of_vllms_distribution(name: str) -> None:
    """Every row's token is where its random number falls in the reference's CDF: support and probabilities at once."""
    for x, row, uniform, token in _drawn()[name]:
        p = _reference_probabilities(x, row)
        assert p[token] > 0, f"token {token} is filtered out"
        end = np.cumsum(p)[token]
        assert end - p[token] - 2e-6 <= uniform <= end + 2e-6


@pytest.mark.parametrize("name", ["logit_bias", "min_tokens", "repetition", "frequency", "all penalties"])
def test_greedy_rows_take_the_argmax_of_the_adjusted_logits(name: str) -> None:
    logits = _logits(64)
    params: dict[str, Any] = FEATURES[name] | {"temperature": 0.0, "top_p": 1.0}
    rows = [_row(i, output=(11, 12, 11), **params) for i in range(64)]
    expected = [int(np.argmax(_reference_logits(x, row))) for x, row in zip(logits, rows, strict=True)]
    assert _run(logits, rows).tokens.tolist() == expected


def test_plain_greedy_is_argmax_and_nothing_else() -> None:
    logits = _logits(5)
    logits[0, [40, 30, 700]] = 50.0  # the first among equals, as argmax has it
    logits[1] = -np.inf
    logits[2, :1002] = -np.inf
    rows = [_row(i, temperature=0.0) for i in range(5)]
    inputs, variant = build_inputs(rows, vocab_size=VOCAB, num_slots=8)
    assert variant == SamplerVariant()
    assert jax.tree.leaves(inputs) == []
    assert _run(logits, rows, 8).tokens.tolist() == np.argmax(logits, -1).tolist()


def test_distribution_by_chi_square() -> None:
    """Many positions of one stream: counts fit the probabilities, and neighbours are independent."""
    num_rows, vocab_size = 20_000, 40
    logits = np.repeat(_logits(1, vocab_size, scale=1.5), num_rows, 0)
    row = _row(top_k=30, temperature=1.3)
    rows = [_row(0, prompt=(1,) * (i + 1), top_k=30, temperature=1.3) for i in range(num_rows)]
    tokens = _run(logits, rows).tokens
    p = _reference_probabilities(logits[0], row)
    kept = np.flatnonzero(p)
    assert set(tokens) <= set(kept)
    counts = np.bincount(tokens, minlength=vocab_size)
    assert stats.chisquare(counts[kept], p[kept] * num_rows).pvalue > 0.01
    is_even = tokens % 2 == 0
    pairs = np.bincount(is_even[:-1] * 2 + is_even[1:], minlength=4)
    even = p[::2].sum()
    expected = np.array([(1 - even) ** 2, even * (1 - even), even * (1 - even), even**2]) * (num_rows - 1)
    assert stats.chisquare(pairs, expected).pvalue > 0.01


def test_random_numbers_come_from_seed_request_sample_and_position() -> None:
    def token(**changes: Any) -> int:
        values = {"prompt_token_ids": (1,), "output_token_ids": (), "request_id": "a", "sample_index": 0, "seed": 0}
        row = RowSampling(params=SamplingParams(), stop_token_ids=(), **(values | changes))
        return int(_run(np.zeros((1, 1 << 16), np.float32), [row]).tokens[0])

    assert token() == token(prompt_token_ids=(9,)) == 10634  # for all time: a restart goes on with the same numbers
    assert token(prompt_token_ids=(4, 5, 6)) == token(prompt_token_ids=(4,), output_token_ids=[1, 2])  # position 3
    others = [
        token(seed=1),
        token(seed=-1),
        token(seed=2**63),
        token(request_id="b"),
        token(sample_index=1),
        token(output_token_ids=(3,)),
    ]
    assert len({token(), *others}) == 7


def _mixed_rows() -> list[RowSampling]:
    kinds = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "logprobs": 3},
        *FEATURES.values(),
        {"temperature": 0.0, "logprobs": 0, "repetition_penalty": 1.2},
        {"temperature": 0.0, "frequency_penalty": 0.3, "logprobs": 5},
    ]
    return [_row(i, output=tuple(range(i)), prompt=(4, i + 20), **kind) for i, kind in enumerate(kinds)]


def _observed(outputs: Any, index: int, row: RowSampling) -> tuple[Any, ...]:
    """All that a row asked for, as bits."""
    wanted = row.params.logprobs
    if wanted is None:
        return (int(outputs.tokens[index]),)
    logprobs = outputs.logprobs[index].tobytes()
    if wanted == 0:
        return int(outputs.tokens[index]), logprobs
    top = outputs.top_ids[index, :wanted].tolist(), outputs.top_logprobs[index, :wanted].tobytes()
    return int(outputs.tokens[index]), logprobs, *top


def test_a_row_does_not_see_the_others() -> None:
    """Alone with its own variant, among all, permuted, in other numbers of slots: the same bits."""
    rows = _mixed_rows()
    logits = _logits(len(rows))
    together = _run(logits, rows)
    expected = [_observed(together, i, row) for i, row in enumerate(rows)]
    order = np.random.default_rng(1).permutation(len(rows))
    for num_slots in (len(rows), 32, 64):
        shuffled = _run(logits[order], [rows[i] for i in order], num_slots)
        assert [_observed(shuffled, place, rows[i]) for place, i in enumerate(order)] == [expected[i] for i in order]
    for i, row in enumerate(rows):
        assert _observed(_run(logits[i : i + 1], [row]), 0, row) == expected[i], f"row {i}: {row.params}"


def test_a_row_does_not_see_the_others_in_a_real_vocabulary() -> None:
    vocab_size = 49_152
    rows = [_row(i, logprobs=2, temperature=0.8 + i / 10, top_p=0.95) for i in range(64)]
    logits = _logits(64, vocab_size, scale=2.0)
    expected = _run(logits, rows)
    for some in ([3], [60, 4], list(range(20, 44))):
        found = _run(logits[some], [rows[i] for i in some])
        for place, i in enumerate(some):
            assert _observed(found, place, rows[i]) == _observed(expected, i, rows[i])


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = _logits(6)
    rows = [
        _row(i, logprobs=4, temperature=t, logit_bias={9: 30.0}) for i, t in enumerate([0.0, 0.0, 0.5, 1.0, 2.0, 1.0])
    ]
    found = _run(logits, rows)
    assert found.tokens.tolist()[:2] == [9, 9]
    for i, x in enumerate(logits.astype(np.float64)):
        reference = x - x.max() - np.log(np.exp(x - x.max()).sum())
        np.testing.assert_allclose(found.logprobs[i], reference[found.tokens[i]], atol=2e-6)
        best = np.argsort(-x, kind="stable")[:4]
        assert found.top_ids[i, :4].tolist() == best.tolist()
        np.testing.assert_allclose(found.top_logprobs[i, :4], reference[best], atol=2e-6)


def test_top_logprobs_of_equal_logits_are_in_order_of_ids() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [3, 300, 301, 999]] = 2.0
    found = _run(logits, [_row(temperature=0.0, logprobs=8)])
    assert found.top_ids.tolist() == [[3, 300, 301, 999, 0, 1, 2, 4]]
    everything = _run(logits, [_row(temperature=0.0, logprobs=20)])
    assert everything.top_ids.shape == (1, 32)
    assert everything.top_ids[0, :8].tolist() == found.top_ids[0].tolist()


def test_equals_at_a_border_are_all_kept() -> None:
    logits = np.full((512, 64), -5.0, np.float32)
    logits[:, [7, 20, 21, 50]] = [3.0, 1.0, 1.0, 1.0]
    filters: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.8}]
    for params in filters:
        drawn = _run(logits, [_row(i, **params) for i in range(512)]).tokens
        assert set(drawn.tolist()) == {7, 20, 21, 50}


def test_minus_infinity_is_never_drawn_and_never_a_nan() -> None:
    logits = np.full((4, VOCAB), -np.inf, np.float32)
    logits[0, 77] = -1e30
    logits[1, [0, 1002]] = 3e38
    logits[2, ::2] = 0.0
    params: dict[str, Any] = {
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "temperature": 5.0,
        "logprobs": 4,
        "repetition_penalty": 2.0,
    }
    rows = [_row(i, output=(77, 78), presence_penalty=1.0, logit_bias={78: 1.0}, **params) for i in range(4)]
    found = _run(logits, rows)
    assert found.tokens[0] == 77
    assert found.tokens[1] in (0, 1002)
    assert found.tokens[2] % 2 == 0
    assert 0 <= found.tokens[3] < VOCAB
    assert not np.isnan(found.logprobs).any()
    assert not np.isnan(found.top_logprobs).any()
    assert found.logprobs[0] == 0.0


@pytest.mark.parametrize("scale", [0.0, 0.01, 30.0])
def test_flat_and_peaked_rows(scale: float) -> None:
    """From all tokens equally likely to one that has everything."""
    logits = _logits(64, 5000, scale=scale)
    rows = [_row(i, top_p=0.5 if i % 2 else 1.0) for i in range(64)]
    tokens = _run(logits, rows).tokens
    for row, uniform, token, x in zip(rows, _uniforms(rows, 5000), tokens, logits, strict=True):
        p = _softmax(x.astype(np.float64)) if scale == 0 else _reference_probabilities(x, row)
        end = np.cumsum(p)[token]
        assert p[token] > 0 or scale == 0.01  # near-equals of the border may be kept with it
        assert end - p[token] - 1e-4 <= uniform <= end + 1e-4


# --- the exact arithmetic, against integers of Python


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 40, 400]), st.integers(1, 300), st.floats(0.001, 0.9999))
def test_thresholds_are_exact_with_many_equals(seed: int, num_values: int, k: int, p: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice(rng.normal(size=num_values) * 4, (2, 300)).astype(np.float32)
    x[rng.random((2, 300)) < 0.2] = -np.inf
    found = np.asarray(_TOP_K(x, np.full(2, k, np.int32)))
    assert found.tolist() == (np.sort(x, -1)[:, -k] if k < 300 else np.full(2, -np.inf)).tolist()

    w = np.asarray(sampler_math.weights(jnp.asarray(x), jnp.ones(2)))
    scale = np.asarray(sampler_math.scale_of(jnp.asarray(w)))
    q = np.rint(w * scale).astype(np.int64)
    assert (abs(q.sum(-1) - 1.5 * 2**29) <= 2**28 + 150).all()  # 2**29..2**30, but for rounding
    found = np.asarray(_TOP_P(w, scale, np.full(2, p, np.float32)))
    for row in range(2):
        target = math.ceil(np.float32(p) * np.float32(q[row].sum()))
        reaching = [value for value in np.unique(w[row]) if q[row][w[row] >= value].sum() >= target]
        assert found[row] == max(reaching)


_TOP_K = jax.jit(sampler_math.top_k_threshold)
_TOP_P = jax.jit(sampler_math.top_p_threshold)
_DRAW = jax.jit(sampler_math.draw)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.floats(0, 1), st.one_of(st.sampled_from([0, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
)
def test_draw_is_exact(seed: int, density: float, bits: int) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(1, 2**30 // 700, (3, 700)) * (rng.random((3, 700)) < density)
    q[0, rng.integers(700)] += 1
    found = np.asarray(_DRAW(q.astype(np.int32), np.full(3, bits, np.uint32)))
    for row in range(3):
        rank = bits * int(q[row].sum()) >> 32
        expected = int(np.searchsorted(np.cumsum(q[row]), rank, side="right"))
        assert found[row] == min(expected, 699)


def test_id_lists_come_in_few_lengths() -> None:
    lengths = set()
    for length in range(1, 200, 7):
        rows = [_row(0, output=tuple(range(length)), frequency_penalty=1.0)]
        inputs, _ = build_inputs(rows, vocab_size=VOCAB, num_slots=4)
        lengths.add(inputs.ids["output"].shape)
    assert lengths == {(4, 16), (4, 32), (4, 64), (4, 128), (4, 256)}
