"""The command line: hetero-jax generate | worker | convert | plan."""

from __future__ import annotations

import importlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
from absl import flags

import models
from hetero_jax.config import KV_CACHE_DTYPES, KV_PARTITIONS, ORDERS, EngineConfig
from hetero_jax.endpoint import read_secret
from hetero_jax.engine import Engine
from hetero_jax.errors import ConfigError, HeteroJaxError
from hetero_jax.job import EXIT_CLEAN, EXIT_FAILED, JobConfig, run_job
from hetero_jax.local_worker import follow_supervisor
from hetero_jax.sampling_params import SamplingParams
from hetero_jax.tracing import Trace
from hetero_jax.wire import WIRE_DTYPES
from hetero_jax.worker import make_server
from partition import PartitionError, Plan, partition
from transport import TransportError

_OVERVIEW = """hetero-jax: offline LLM generation; KV cache and attention on the CPU, the rest on the accelerator.

  hetero-jax generate --model=MODEL --input=prompts.jsonl --output=completions.jsonl --max_tokens=64 --temperature=0
  hetero-jax worker   --listen=HOST:PORT --kv_cache_bytes=8G    serve KV cache and attention to `generate --workers`
  hetero-jax convert  --model=MODEL --output=FOLDER      write an Orbax checkpoint that loads without conversion
  hetero-jax plan     --model=MODEL                      print how the model is cut, and run nothing
  hetero-jax plan     --module=package.module:build      the same for a model of yours: build() returns it

MODEL is a GGUF file, a Hugging Face folder (config.json, *.safetensors, tokenizer.json), an Orbax checkpoint made by
`hetero-jax convert`, or random:NAME for random weights of a public shape (random:llama-3-8b).
An input row is {"id", "prompt" | "messages" | "prompt_token_ids", "sampling_params"?}.

`hetero-jax COMMAND --help` lists the flags of a command."""

_SIZE = re.compile(r"(\d{1,18}(?:\.\d+)?) ?(?:([KMGT])i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    if len(argv) < 2 or argv[1] in ("--help", "-h", "help"):
        print(_OVERVIEW)
        return EXIT_CLEAN
    commands = {
        "generate": (_generate_flags, _generate),
        "worker": (_worker_flags, _worker),
        "convert": (_convert_flags, _convert),
        "plan": (_plan_flags, _plan),
    }
    if argv[1] not in commands:
        print(f"hetero-jax: unknown command {argv[1]!r}; allowed: {', '.join(commands)}", file=sys.stderr)
        return EXIT_FAILED
    define, run = commands[argv[1]]
    return _run(argv[1], define, run, argv[2:])


def _run(
    name: str, define: Callable[[flags.FlagValues], None], run: Callable[[dict[str, Any]], int], args: Sequence[str]
) -> int:
    values = flags.FlagValues()
    define(values)
    if "--help" in args or "-h" in args:
        print(f"hetero-jax {name}: flags\n{values.get_help()}")
        return EXIT_CLEAN
    try:
        rest = values([f"hetero-jax {name}", *args])[1:]
        if rest:
            raise ConfigError(f"unexpected argument {rest[0]!r}; allowed: flags, as --name=value")
        return run(values.flag_values_dict())
    except (HeteroJaxError, models.ModelError, PartitionError, TransportError, flags.Error, OSError) as error:
        print(f"hetero-jax {name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
    return EXIT_FAILED


def _model_flags(values: flags.FlagValues, *, required: bool = True) -> None:
    flags.DEFINE_string(
        "model", None, "GGUF file, Hugging Face folder, Orbax checkpoint or random:NAME.", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Type of weights and activations.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Seed of rows that bring none, and of random weights.", flag_values=values)
    if required:
        flags.mark_flag_as_required("model", flag_values=values)


def _engine_flags(values: flags.FlagValues) -> None:
    def integer(name: str, default: int | None, text: str) -> None:
        flags.DEFINE_integer(name, default, text, flag_values=values)

    _kv_cache_flag(values)
    flags.DEFINE_enum("kv_cache_dtype", None, list(KV_CACHE_DTYPES), "Default: the model's.", flag_values=values)
    integer("page_size", 128, "Token positions in a KV page.")
    integer("max_num_batched_tokens", 512, "Rows of one microbatch, prefill and decode together.")
    integer("max_num_seqs", 256, "Running sequences.")
    text = "Take what prompts begin with from pages of others."
    flags.DEFINE_bool("enable_prefix_caching", True, text, flag_values=values)
    integer("num_microbatches", 2, "Microbatches in flight; 0: as many as hide the way to workers and their work.")
    text = "Which microbatch goes on first of those that can."
    flags.DEFINE_enum("order", "deepest", list(ORDERS), text, flag_values=values)
    integer("max_model_len", None, "Longest prompt + output; default: the model's.")
    flags.DEFINE_enum("tier1", None, ["cpu", "gpu"], "Where the dense stages run; default: JAX's.", flag_values=values)
    flags.DEFINE_enum(
        "attention", "tier2", ["tier1", "tier2"], "Where KV cache and attention live.", flag_values=values
    )
    flags.DEFINE_list(
        "workers",
        [],
        "HOST:PORT of each worker that serves tier 2, with commas; default: this process.",
        flag_values=values,
    )
    text = "File of HOST:PORT lines, watched: workers join and leave while the job runs."
    flags.DEFINE_string("workers_file", None, text, flag_values=values)
    text = "Workers to start here, each on its own cores with its part of kv_cache_bytes."
    flags.DEFINE_integer("local_workers", 0, text, flag_values=values)
    text = "What workers share out: whole sequences, or the KV heads of every sequence."
    flags.DEFINE_enum("kv_partition", "sequence", list(KV_PARTITIONS), text, flag_values=values)
    _secret_flag(values)
    text = "PEM file of the CAs of the workers' certificates; default: no TLS."
    flags.DEFINE_string("tls_ca", None, text, flag_values=values)
    text = "Type of rows on their way to workers and back."
    flags.DEFINE_enum("wire_dtype", "bfloat16", list(WIRE_DTYPES), text, flag_values=values)
    _seconds_flag(values, "query_ahead_s", "q goes before k and v where the wire takes these at least so long.")
    _seconds_flag(values, "step_timeout_s", "A worker that answers nothing for so long is lost.")
    _seconds_flag(values, "worker_wait_s", "How long to wait where every worker is lost.")
    flags.DEFINE_float("tier1_memory_gb", None, "Most memory to use on tier 1.", flag_values=values)


def _kv_cache_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_string("kv_cache_bytes", "1G", "Memory of the KV pools here: 2G, 512M ...", flag_values=values)


def _secret_flag(values: flags.FlagValues) -> None:
    text = "File of the secret that engine and worker share; needed off loopback."
    flags.DEFINE_string("secret_file", None, text, flag_values=values)


def _seconds_flag(values: flags.FlagValues, name: str, text: str) -> None:
    flags.DEFINE_float(name, getattr(EngineConfig(), name), text, flag_values=values)


def _worker_flags(values: flags.FlagValues) -> None:
    text = "HOST:PORT to listen on, the host in numbers; port 0: any free one."
    flags.DEFINE_string("listen", "127.0.0.1:7000", text, flag_values=values)
    _kv_cache_flag(values)
    _secret_flag(values)
    text = "Run programs of the engine for attention that has no kernel; needs a secret."
    flags.DEFINE_bool("allow_exported_sites", False, text, flag_values=values)
    flags.DEFINE_string("tls_cert", None, "PEM file of this worker's certificate: TLS.", flag_values=values)
    flags.DEFINE_string("tls_key", None, "PEM file of its key.", flag_values=values)
    text = "Started by an engine: the secret comes on standard input, whose end ends the worker."
    flags.DEFINE_bool("supervised", False, text, flag_values=values)


def _generate_flags(values: flags.FlagValues) -> None:
    _model_flags(values)
    _engine_flags(values)
    flags.DEFINE_string("input", None, "JSON lines of prompts.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON lines of completions; gone on with if it exists.", flag_values=values)
    flags.DEFINE_enum("on_error", "record", ["fail", "record"], "What a bad row does.", flag_values=values)
    flags.DEFINE_string("trace", None, "Record what runs when into this file, for Perfetto.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Start the output anew.", flag_values=values)
    flags.mark_flags_as_required(["input", "output"], flag_values=values)
    default = SamplingParams()
    for name in ("n", "top_k", "max_tokens", "min_tokens", "logprobs"):
        flags.DEFINE_integer(name, getattr(default, name), _OF_ROWS, flag_values=values)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        flags.DEFINE_float(name, getattr(default, name), _OF_ROWS, flag_values=values)
    flags.DEFINE_multi_string("stop", [], "Stop string; may be repeated. " + _OF_ROWS, flag_values=values)
    flags.DEFINE_bool("ignore_eos", False, _OF_ROWS, flag_values=values)


_OF_ROWS = "Sampling parameter of rows that do not set it."


def _plan_flags(values: flags.FlagValues) -> None:
    _model_flags(values, required=False)
    _engine_flags(values)
    flags.DEFINE_string(
        "module", None, "package.module:build; build() returns a module, or (function, params).", flag_values=values
    )
    flags.DEFINE_string("draw", None, "Draw the plan into this SVG file too.", flag_values=values)


def _convert_flags(values: flags.FlagValues) -> None:
    _model_flags(values)
    flags.DEFINE_string("output", None, "Folder to make.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def _generate(values: dict[str, Any]) -> int:
    names = set(SamplingParams.__dataclass_fields__) - {"seed", "stop_token_ids", "logit_bias"}
    defaults = SamplingParams(**{name: values[name] for name in names})
    config = _engine_config(values)
    job = JobConfig(
        input=Path(values["input"]),
        output=Path(values["output"]),
        defaults=defaults,
        context={
            "model": models.fingerprint(values["model"]),
            "dtype": values["dtype"],
            "kv_cache_dtype": config["kv_cache_dtype"],
            "seed": config["seed"],
            "max_model_len": config["max_model_len"],
            **_rounding_on_the_wire(config, values["dtype"]),
        },
        on_error=values["on_error"],
        overwrite=values["overwrite"],
    )
    if values["trace"] is None:
        return run_job(job, lambda: _engine(values))
    trace = Trace()
    try:
        return run_job(job, lambda: _engine(values, trace))
    finally:
        trace.write(values["trace"])
        print(trace.summary(), file=sys.stderr)


def _rounding_on_the_wire(config: dict[str, Any], dtype: str) -> dict[str, str]:
    """The wire's dtype where it changes outputs."""
    away = config["workers"] or config["workers_file"] or config["local_workers"]
    exact = not away or config["wire_dtype"] in ("float32", dtype)
    return {} if exact else {"wire_dtype": config["wire_dtype"]}


def _worker(values: dict[str, Any]) -> int:
    kv_cache_bytes = parse_bytes(values["kv_cache_bytes"])
    secret = follow_supervisor(sys.stdin.buffer) if values["supervised"] else read_secret(values["secret_file"])
    options = {name: values[name] for name in ("listen", "allow_exported_sites", "tls_cert", "tls_key")}
    server = make_server(kv_cache_bytes=kv_cache_bytes, secret=secret, **options)
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is not for tier 2
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # each call is waited for: no handoff between threads
    print("listening on {}:{}".format(*server.address), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: server.drain("SIGTERM"))
    server.serve_forever()
    server.stop()
    return EXIT_CLEAN


def _convert(values: dict[str, Any]) -> int:
    output = values["output"]
    models.save(_load(values), output)
    print(f"wrote {output}")
    return EXIT_CLEAN


def _plan(values: dict[str, Any]) -> int:
    if (values["model"] is None) == (values["module"] is None):
        raise ConfigError(f"model={values['model']}, module={values['module']}; allowed: exactly one of the two")
    if values["module"] is not None:
        plan = _plan_of_module(values["module"], values["max_model_len"])
        print(plan)
    else:
        engine = _engine(values)
        plan = engine.plan
        print(plan)
        print(engine)
    if values["draw"] is not None:
        plan.draw(values["draw"])
    return EXIT_CLEAN


def _plan_of_module(name: str, max_model_len: int | None) -> Plan:
    module, _, attribute = name.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")  # a console script does not look in the working directory by itself
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"module={name!r}: {error}; allowed: package.module:function") from error
    built = build()
    model, params = built if isinstance(built, tuple) else (built, None)
    return partition(model, params, **({} if max_model_len is None else {"max_rows": max_model_len}))


def _engine_config(values: dict[str, Any]) -> dict[str, Any]:
    config = {field.name: values[field.name] for field in fields(EngineConfig)}  # the flags have their names
    return config | {"kv_cache_bytes": parse_bytes(values["kv_cache_bytes"]), "workers": tuple(values["workers"])}


def _engine(values: dict[str, Any], trace: Trace | None = None) -> Engine:
    engine = Engine(_load(values), EngineConfig(**_engine_config(values)))
    engine.trace = trace
    return engine


def _load(values: dict[str, Any]) -> models.LoadedModel:
    return models.load(values["model"], dtype=values["dtype"], seed=values["seed"])


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 2G, 512M or 1048576.

    Raises:
      ConfigError: not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"kv_cache_bytes={text!r}; allowed: a number with K, M, G or T, such as 2G")
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()])
    if size < 1:
        raise ConfigError(f"kv_cache_bytes={text!r}; allowed: more than 0")
    return size
