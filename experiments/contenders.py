"""The same generation work by hetero_jax, llama.cpp and transformers: prefill all sequences, then decode them together.

Prompts are the same random token ids for all; every sequence has the same context, decoding is greedy and never stops
early. Each function runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench_point import Figures, Point, num_cores, peak_bytes, prompts

_WARM_UP_SEQUENCES = 4  # nothing compiles here: threads and buffers are woken
_LLAMA_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who runs: the module that must be importable, the distribution whose version counts, and the measurement."""

    module: str
    distribution: str
    run: Callable[[Point], Figures]


def run_hetero_jax(point: Point) -> Figures:
    """Our engine."""
    from experiments.bench_engine import run_hetero_jax as run  # the other contenders' Python may have no JAX

    return run(point)


def _figures(point: Point, prefill_s: float, decode_s: float) -> Figures:
    return Figures(
        prefill_per_s=point.sequences * point.context / prefill_s,
        decode_per_s=point.sequences * point.new_tokens / decode_s,
        decode_context=point.context + 1,  # one decode step settles untimed
        peak_bytes=peak_bytes(),
    )


def run_transformers(point: Point) -> Figures:
    """Hugging Face transformers on torch CPU: one static batch with a DynamicCache."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(num_cores())
    path = Path(point.model)
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=getattr(torch, point.dtype)
    ).eval()
    ids = torch.from_numpy(prompts(point))

    def generate(ids: torch.Tensor, steps: int) -> tuple[float, float]:
        start_s = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - start_s
        for step in range(steps + 1):
            start_s = time.perf_counter() if step == 1 else start_s
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return prefill_s, time.perf_counter() - start_s

    with torch.inference_mode():
        generate(ids[:_WARM_UP_SEQUENCES], 1)
        return _figures(point, *generate(ids, point.new_tokens))


def run_llama_cpp(point: Point) -> Figures:
    """llama.cpp: batched decode of all sequences through the C API.

    `point.model` is what `dequantised_gguf` wrote. Its KV cache stays f16, its default, whatever
    the weights: 64 sequences of 32 decode f32 weights at 668 tokens/s with it, at 372 with an f32 cache.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(point.model.encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, _llama_params(llama_cpp, point)) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp does not load {point.model} for {point.sequences} sequences")

    def generate(ids: np.ndarray, steps: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start_s = time.perf_counter()
        tokens = _llama_prefill(llama_cpp, context, ids)
        prefill_s = time.perf_counter() - start_s
        for step in range(steps + 1):
            start_s = time.perf_counter() if step == 1 else start_s
            rows = [(seq, point.context + step, token) for seq, token in enumerate(tokens)]
            tokens = _llama_decode(llama_cpp, context, rows, last=set(range(len(rows))))
        return prefill_s, time.perf_counter() - start_s

    generate(prompts(point)[:_WARM_UP_SEQUENCES], 1)
    return _figures(point, *generate(prompts(point), point.new_tokens))


def _llama_params(llama_cpp: Any, point: Point) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = point.sequences * (point.context + point.new_tokens + 8)
    params.n_batch = params.n_ubatch = _LLAMA_BATCH
    params.n_seq_max = point.sequences
    params.n_threads = params.n_threads_batch = num_cores()
    return params


def _llama_prefill(llama_cpp: Any, context: Any, ids: np.ndarray) -> list[int]:
    """Prompts packed into batches of at most _LLAMA_BATCH tokens; the greedy next token of each."""
    found: list[int] = []
    batch: list[tuple[int, int, int]] = []
    last: set[int] = set()
    for sequence, row in enumerate(ids):
        for position, token in enumerate(row):
            if position == len(row) - 1:
                last.add(len(batch))
            batch.append((sequence, position, int(token)))
            if len(batch) == _LLAMA_BATCH or (sequence == len(ids) - 1 and position == len(row) - 1):
                found += _llama_decode(llama_cpp, context, batch, last)
                batch, last = [], set()
    return found


def _llama_decode(llama_cpp: Any, context: Any, rows: list[tuple[int, int, int]], last: set[int]) -> list[int]:
    """One llama_decode of rows (sequence, position, token); the argmax of the rows in `last`."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    for index, (sequence, position, token) in enumerate(rows):
        batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
        batch.seq_id[index][0], batch.logits[index] = sequence, index in last
    batch.n_tokens = len(rows)
    status = llama_cpp.llama_decode(context, batch)
    if status != 0:
        raise RuntimeError(f"llama_decode returned {status} for {len(rows)} rows")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    found = []
    for index in sorted(last):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, index), shape=(vocab,))
        found.append(int(logits.argmax()))
    llama_cpp.llama_batch_free(batch)
    return found


def dequantised_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write `source` with its matrices as F32 or BF16 and the same metadata."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    kind = gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        if len(shape) > 1 and kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(tensor.name, data, raw_shape=data.shape, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONTENDERS = {
    "hetero_jax": Contender(module="hetero_jax", distribution="jax", run=run_hetero_jax),
    "llama.cpp": Contender(module="llama_cpp", distribution="llama-cpp-python", run=run_llama_cpp),
    "transformers": Contender(module="transformers", distribution="transformers", run=run_transformers),
}
