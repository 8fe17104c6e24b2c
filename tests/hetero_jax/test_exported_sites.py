"""Attention that no kernel knows, in workers: its programs give the plain model's tokens, and who may send them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetero_jax as hj
import zoo_attention as zoo
from fault_job import wait_for_drain
from hetero_jax.described_site import describe, read_descriptions
from hetero_jax.errors import ConfigError, WorkerError
from hetero_jax.exported_attention import MAX_PROGRAM_BYTES
from hetero_jax.joined_rows import JoinedRows
from hetero_jax.page_groups import group_pages
from hetero_jax.worker import make_server
from small_model import SmallModel
from transport import WorkerServer

SECRET = b"a secret of this job"
PROMPTS = [[1, 2, 3], list(range(9))]
SIGMOID = SmallModel(attention=zoo.sigmoid)
MODELS = {
    "learned bias by distance": SmallModel(attention=zoo.relative_bias, extra={"table": (12, 6)}),
    "several outputs": SmallModel(attention=zoo.sink_keys_counted, extra={"sink_k": (5, 2, 4), "sink_v": (5, 2, 4)}),
    "flags of padding": zoo.PaddedModel(),
    "keys of another layer": zoo.SharedSigmoidModel(),
}

pytestmark = pytest.mark.filterwarnings("ignore:the attention opened at")


@contextlib.contextmanager
def _server(**options) -> Iterator[WorkerServer]:
    server = make_server(listen="127.0.0.1:0", kv_cache_bytes=1 << 18, **options)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def _address(server: WorkerServer) -> str:
    return "{}:{}".format(*server.address)


@contextlib.contextmanager
def _worker(**options) -> Iterator[str]:
    with _server(**options) as server:
        yield _address(server)


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "job.key"
    path.write_bytes(SECRET)
    return str(path)


def _config(**options) -> hj.EngineConfig:
    return hj.EngineConfig(page_size=4, max_num_batched_tokens=8, wire_dtype="float32", **options)


def _tokens(engine: hj.Engine) -> dict[int, list[int]]:
    sampling = hj.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    return {int(each.id): list(each.token_ids) for each in engine.generate(PROMPTS, sampling)}


def _expected(model: SmallModel) -> dict[int, list[int]]:
    return {n: model.greedy(model.params(), prompt, 4) for n, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("name", MODELS)
def test_a_worker_runs_programs_that_give_the_tokens_of_the_plain_model(name, secret_file):
    model = MODELS[name]
    plan = hj.partition(model, model.params(), max_rows=64)
    assert any(site.spec is None for site in plan.sites)
    with _worker(secret=SECRET, allow_exported_sites=True) as address:
        engine = hj.Engine(plan, _config(workers=(address,), secret_file=secret_file))
        assert _tokens(engine) == _expected(model)
        del engine  # which ends its session


def test_pools_of_programs_move_from_a_draining_worker(secret_file):
    model, counts = MODELS["several outputs"], [2, 14, 12]
    params = model.params()
    requests = [
        hj.Request(
            id=str(count),
            prompt_token_ids=(1, 2, count),
            sampling_params=hj.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
        )
        for count in counts
    ]
    options = {"secret": SECRET, "allow_exported_sites": True}
    with _server(**options) as leaving, _server(**options) as stays:
        workers = (_address(leaving), _address(stays))
        engine = hj.Engine(hj.partition(model, params, max_rows=64), _config(workers=workers, secret_file=secret_file))
        found = {}
        for each in engine.generate(requests):
            found[each.id] = list(each.token_ids)
            if len(found) == 1:
                leaving.drain("a test")
                wait_for_drain(engine)
        assert engine.stats.sequences_moved > 0
        assert engine.stats.rows_computed == sum(3 + count - 1 for count in counts)  # none twice
        assert found == {str(count): model.greedy(params, [1, 2, count], count) for count in counts}
        del engine


def test_local_workers_run_the_programs_of_the_engine_that_started_them():
    plan = hj.partition(SIGMOID, SIGMOID.params(), max_rows=64)
    with pytest.warns(UserWarning, match=r"zoo_attention\.py:\d+.*exported to workers, slower than a kernel") as said:
        engine = hj.Engine(plan, _config(local_workers=1, kv_cache_bytes=1 << 18))
    assert [each.filename for each in said] == [__file__]
    assert _tokens(engine) == _expected(SIGMOID)


@pytest.mark.parametrize("secret", [SECRET, None])
def test_a_worker_without_the_flag_refuses_programs_by_name(secret, secret_file):
    plan = hj.partition(SIGMOID, SIGMOID.params(), max_rows=64)
    with _worker(secret=secret) as address:
        config = _config(workers=(address,), secret_file=None if secret is None else secret_file)
        with pytest.raises(WorkerError) as refused:
            hj.Engine(plan, config)
    message = str(refused.value)
    assert message.startswith(f"worker {address}: ") and "zoo_attention.py" in message
    assert message.endswith(
        "has no kernel and comes as a program; allowed: with --allow_exported_sites and --secret_file of the worker"
    )


def test_the_flag_without_a_secret_is_refused():
    with pytest.raises(ConfigError) as refused, _worker(allow_exported_sites=True):
        pass
    assert str(refused.value) == (
        "allow_exported_sites without a secret; allowed: with one, which proves who sends programs"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_cache_dtype": "int8"},
            "kv_cache_dtype=int8 needs the native kernel; allowed: float32, bfloat16, float16",
        ),
        ({"wire_dtype": "int8"}, "wire_dtype=int8 needs the native kernel; allowed: bfloat16, float32"),
    ],
)
def test_what_programs_do_not_serve_is_refused_by_the_engine(options, message):
    plan = hj.partition(SIGMOID, SIGMOID.params(), max_rows=64)
    with pytest.raises(ConfigError, match=rf"zoo_attention\.py.*cannot go to workers: {message}"):
        hj.Engine(plan, hj.EngineConfig(workers=("127.0.0.1:1",), **options))


def _describe(plan: hj.Plan):
    pages = group_pages(plan.sites, max_model_len=64).sites
    return describe(plan.sites, pages, {}, page_size=4, dtype="float32", wire_dtype="float32")


@pytest.fixture(scope="module")
def described():
    plan = hj.partition(SIGMOID, SIGMOID.params(), max_rows=64)
    return _describe(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": 1}, "program=1 of a site; allowed: 0 to 0"),
        ({"program": None}, "program=None of a site"),
        ({"weights": "0 3"}, "weights='0 3' of a site; allowed: numbers below 3"),
        ({"weights": "-1"}, "weights='-1' of a site"),
        ({"wire_dtype": "int8"}, "wire_dtype='int8' of a site; allowed: bfloat16, float32"),
        ({"page_size": 8}, "page_size=8 of a site whose program has another"),
    ],
)
def test_a_worker_refuses_descriptions_that_do_not_fit_their_programs(described, changes, message):
    (first, *_), artifacts = described
    with pytest.raises(ConfigError, match=message):
        read_descriptions([{**first, **changes}], artifacts, allow_exported_sites=True)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (np.zeros(MAX_PROGRAM_BYTES + 1, np.uint8), f"allowed: uint8 of at most {MAX_PROGRAM_BYTES} bytes"),
        (np.zeros(64, np.float32), r"a site's program float32\[64\]; allowed: uint8"),
        (np.zeros(64, np.uint8), "a site's program cannot be read"),
        (np.zeros(0, np.uint8), "a site's program cannot be read"),
    ],
)
def test_what_is_no_program_is_refused(described, program, message):
    sites, artifacts = described
    with pytest.raises(ConfigError, match=message):
        read_descriptions(sites, [program, *artifacts[1:]], allow_exported_sites=True)


def test_programs_are_the_same_wherever_they_are_made_and_name_no_files(described):
    """Fingerprints must be, or an engine that was started again is refused by its worker."""
    _, artifacts = described
    jax.clear_caches()
    plan = hj.partition(SIGMOID, SIGMOID.params(), max_rows=64)
    _, again = _describe(plan)
    assert [array.tobytes() for array in again] == [array.tobytes() for array in artifacts]
    assert not any(b".py" in array.tobytes() for array in again)


def test_joined_rows_come_apart_bit_for_bit():
    draw = np.random.default_rng(0)
    arrays = [
        np.asarray(jnp.asarray(draw.normal(size=(5, 2, 3)), jnp.bfloat16)),
        draw.integers(-9, 9, 5).astype(np.int32),
        draw.normal(size=(5, 1)) > 0,
    ]
    rows = JoinedRows.of([((2, 3), jnp.float32), ((), jnp.int32), ((1,), jnp.bool_)], "bfloat16")
    joined = rows.join(arrays)
    assert joined.shape == (5, rows.num_bytes) == (5, 17)
    for array, back in zip(arrays, rows.split(joined), strict=True):
        assert array.dtype == back.dtype
        np.testing.assert_array_equal(array, back)
    with pytest.raises(ConfigError, match=r"rows uint8\[5, 16\]; allowed: uint8\[rows, 17\]"):
        rows.split(joined[:, :16])
