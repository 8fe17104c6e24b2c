"""Tier 2 in a worker's process: the golden tokens over a socket, and who is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetero_jax as hj
from experiments.certificate import loopback_certificate
from golden import first_difference, golden_rows
from hetero_jax.cli import main
from small_model import SmallModel, softmax_attention
from worker_process import worker_process
from worker_thread import ThreadWorker
from zoo_attention import SharedKeysModel

SECRET = "a secret of this job"


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "job.key"
    path.write_text(SECRET + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("memories", "authenticated", "order", "partition"),
    [
        ([24], False, "deepest", "sequence"),
        ([24], True, "oldest", "sequence"),
        ([8, 16], True, "deepest", "sequence"),
        ([8, 16], True, "deepest", "head"),
        ([8, 8, 8], False, "oldest", "head"),
    ],
)
def test_golden_tokens_of_workers_in_processes_of_their_own(
    smollm2_gguf, secret_file, memories, authenticated, order, partition
):
    secret = secret_file if authenticated else None
    flags = [f"--secret_file={secret}"] if authenticated else []
    with contextlib.ExitStack() as workers:
        addresses = [
            workers.enter_context(worker_process(f"--kv_cache_bytes={memory}M", *flags))[0] for memory in memories
        ]
        config = hj.EngineConfig(
            workers=tuple(addresses),
            kv_partition=partition,
            page_size=16,
            secret_file=secret,
            wire_dtype="float32",
            order=order,
            max_num_batched_tokens=64,
            max_model_len=128,
        )
        engine = hj.Engine(hj.load(str(smollm2_gguf)), config)
        short = [row for row in golden_rows() if len(row["prompt_ids"]) < 60][:12]
        rows = {row["id"]: {**row, "greedy_ids": row["greedy_ids"][:16]} for row in short}
        requests = [
            hj.Request(
                id=row_id,
                prompt_token_ids=tuple(row["prompt_ids"]),
                sampling_params=hj.SamplingParams(max_tokens=len(row["greedy_ids"]), temperature=0, ignore_eos=True),
            )
            for row_id, row in rows.items()
        ]
        tokens = {completion.id: completion.token_ids for completion in engine.generate(requests)}
    assert len(rows) == 12
    assert tokens.keys() == rows.keys()
    assert all(first_difference(rows[row_id], found) is None for row_id, found in tokens.items())
    page_bytes = 30 * 2 * 3 * 64 * 16 * 4  # sites, keys and values, KV heads, dimensions, tokens, f32
    if partition == "sequence":
        assert engine.stats.pages_total == sum((memory << 20) // page_bytes for memory in memories)
    else:  # over 30 sites, 3 heads divide evenly
        assert engine.stats.pages_total == (min(memories) << 20) // (page_bytes // len(memories))


def _alibi_with_sinks(q, k, v, positions, *, sinks):
    """Linear biases, a window, a soft cap and sinks: all that a description may say."""
    rows, heads, dim = q.shape[1:]
    k, v = (jnp.repeat(array, heads // array.shape[2], axis=2) for array in (k, v))
    scores = 5 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) * dim**-0.5 / 5)
    distance = jnp.arange(rows)[:, None] - jnp.arange(rows)[None, :]
    scores -= jnp.asarray([2.0**-n for n in range(heads)])[:, None, None] * distance
    scores = jnp.where((distance >= 0) & (distance < 9), scores, -jnp.inf)
    sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    top = jnp.maximum(scores.max(-1, keepdims=True), sink)
    weights = jnp.exp(scores - top)
    weights = weights / (weights.sum(-1, keepdims=True) + jnp.exp(sink - top))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


class _FewerHeadsLater(SmallModel):
    """The second layer has half the KV heads of the first."""

    def __call__(self, params, tokens, positions):
        kv_heads = iter((self.kv_heads, self.kv_heads // 2))

        def attention(q, k, v, positions):
            count = next(kv_heads)
            return softmax_attention(q, k[:, :, :count], v[:, :, :count], positions)

        return SmallModel.__call__(dataclasses.replace(self, attention=attention), params, tokens, positions)


@pytest.mark.parametrize("partition", ["sequence", "head"])
def test_biases_windows_caps_and_sinks_travel_and_a_worker_serves_one_engine_after_another(partition):
    prompts = [[n + 1, 2, 3, 5, 8, 13, 21] for n in range(3)]
    with contextlib.ExitStack() as workers:
        count = 1 if partition == "sequence" else 2
        processes = [workers.enter_context(worker_process("--kv_cache_bytes=1M")) for _ in range(count)]
        addresses = tuple(address for address, _ in processes)
        config = hj.EngineConfig(workers=addresses, kv_partition=partition, wire_dtype="float32", num_microbatches=0)
        sinks = SmallModel(attention=_alibi_with_sinks, extra={"sinks": (6,)})
        for small in (_FewerHeadsLater(kv_heads=6), sinks, SharedKeysModel(layers=3)):
            params = small.params()
            plan = hj.partition(small, params, max_rows=64)
            assert plan.sites[0].spec is not None, plan.sites[0].unrecognised
            engine = hj.Engine(plan, config)
            sampling = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
            found = {int(each.id): list(each.token_ids) for each in engine.generate(prompts, sampling)}
            assert found == {n: small.greedy(params, prompt, 12) for n, prompt in enumerate(prompts)}
            del engine  # which ends its session


@pytest.mark.parametrize("partition", ["sequence", "head"])
def test_queries_leave_ahead_and_the_tokens_stay(partition):
    small, random = SmallModel(), np.random.default_rng(0)
    params, prompts = small.params(), [random.integers(0, small.vocab, length).tolist() for length in (300, 40, 170)]
    with ThreadWorker(kv_cache_bytes=2 << 20) as one, ThreadWorker(kv_cache_bytes=2 << 20) as other:
        config = hj.EngineConfig(
            workers=(one.address, other.address),
            kv_partition=partition,
            wire_dtype="float32",
            max_num_batched_tokens=64,
            query_ahead_s=0,
        )
        engine = hj.Engine(hj.partition(small, params, max_rows=320), config)
        sampling = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        found = {int(each.id): list(each.token_ids) for each in engine.generate(prompts, sampling)}
        assert one.handler.queries == one.handler.served > 0 and other.handler.queries > 0
    assert found == {n: small.greedy(params, prompt, 12, max_rows=320) for n, prompt in enumerate(prompts)}


def _rounding_attention(q, k, v, positions):
    """What bfloat16 on the wire makes of attention, in the model itself."""
    rounded = (jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7) for array in (q, k, v))
    out = jax.nn.dot_product_attention(*rounded, is_causal=True)
    return jax.lax.reduce_precision(out, exponent_bits=8, mantissa_bits=7)


def test_rows_are_rounded_to_bfloat16_on_the_wire_and_nowhere_else():
    prompts = [[n + 1, 2, 3, 5, 8, 13, 21] for n in range(3)]
    small, params = SmallModel(), SmallModel().params()
    with worker_process("--kv_cache_bytes=1M") as (address, _):
        engine = hj.Engine(hj.partition(small, params, max_rows=64), hj.EngineConfig(workers=(address,)))
        sampling = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
        found = {int(each.id): each for each in engine.generate(prompts, sampling)}
    oracle, plain = SmallModel(attention=_rounding_attention), SmallModel()
    for n, prompt in enumerate(prompts):
        tokens = list(found[n].token_ids)
        assert tokens == oracle.greedy(params, prompt, 12)
        seen = [step[token] for step, token in zip(found[n].logprobs, tokens, strict=True)]
        rounded, exact = (_logprobs(model, params, prompt, tokens) for model in (oracle, plain))
        np.testing.assert_allclose(seen, rounded, atol=2e-5)
        assert np.abs(np.subtract(seen, exact)).max() > 1e-4


def _logprobs(model: SmallModel, params, prompt, tokens) -> np.ndarray:
    """Of each token after those before it."""
    ids = np.asarray([*prompt, *tokens])[None]
    rows = jax.nn.log_softmax(model(params, ids, np.arange(ids.shape[1])[None])[0], axis=-1)
    return np.asarray([rows[len(prompt) + i - 1, token] for i, token in enumerate(tokens)])


def test_jobs_run_over_tls_with_certificates_that_the_engine_trusts(tmp_path, capsys, secret_file):
    certificate, key = loopback_certificate(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 0, "prompt_token_ids": [1, 2]}) + "\n")
    (tmp_path / "other").mkdir()
    stranger, _ = loopback_certificate(tmp_path / "other")
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", f"--secret_file={secret_file}"]
    generate = ["hetero-jax", "generate", "--model=random:tiny", "--max_model_len=64", "--max_tokens=3", *files]
    tls = (f"--tls_cert={certificate}", f"--tls_key={key}")
    with worker_process("--kv_cache_bytes=1M", f"--secret_file={secret_file}", *tls) as (address, _):
        for flags in ([], [f"--tls_ca={stranger}"]):
            assert main([*generate, f"--workers={address}", *flags]) == 1
            assert f"worker {address}: " in capsys.readouterr().err
        trace = tmp_path / "run.json"
        assert main([*generate, f"--workers={address}", f"--tls_ca={certificate}", f"--trace={trace}"]) == 0
    assert "tier 1 busy" in capsys.readouterr().err
    assert any(event["name"] == "stage 0" for event in json.loads(trace.read_text())["traceEvents"])
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["token_ids"]) == 3


@pytest.mark.parametrize(
    ("secret", "message"),
    [("another secret of a job", "its secret is another one"), (None, "secret"), ("short", "allowed: at least 16")],
)
def test_a_wrong_secret_is_refused(tmp_path, capsys, secret_file, secret, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 0, "prompt_token_ids": [1, 2]}) + "\n")
    flags = []
    if secret is not None:
        (tmp_path / "wrong.key").write_text(secret)
        flags = [f"--secret_file={tmp_path / 'wrong.key'}"]
    with worker_process("--kv_cache_bytes=1M", f"--secret_file={secret_file}") as (address, _):
        files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
        generate = ["hetero-jax", "generate", "--model=random:tiny", "--max_model_len=64", *files]
        assert main([*generate, f"--workers={address}", *flags]) == 1
    error = capsys.readouterr().err
    assert f"worker {address}: " in error and message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listen=0.0.0.0:0"], "address 0.0.0.0 without a secret"),
        (["--listen=7000"], "address '7000'; allowed: HOST:PORT"),
        (["--listen=127.0.0.1:0", "--kv_cache_bytes=lots"], "kv_cache_bytes='lots'"),
        (["--listen=127.0.0.1:0", "--secret_file=no/such.key"], "No such file"),
        (
            ["--listen=127.0.0.1:0", "--allow_exported_sites"],
            "allow_exported_sites without a secret; allowed: with one, which proves who sends programs",
        ),
        (["--listen=127.0.0.1:0", "--tls_cert=a.pem"], "tls_cert='a.pem', tls_key=None; allowed: both or neither"),
        (["--listen=127.0.0.1:0", "--tls_cert=a.pem", "--tls_key=b.pem"], "No such file"),
    ],
)
def test_a_worker_that_cannot_begin_says_why(capsys, flags, message):
    assert main(["hetero-jax", "worker", *flags]) == 1
    assert message in capsys.readouterr().err
