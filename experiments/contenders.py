"""The same generation work by hetero_jax, llama.cpp and transformers: prefill all sequences, then decode them together.

Each function returns seconds of prefill and of `new_tokens` decode steps after a warm-up of the same shapes. Prompts
are the same random token ids for all; every sequence has the same context, decoding is greedy and never stops early.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_ROWS = 512  # tokens of a prefill batch, ours and llama.cpp's


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: `sequences` prompts of `context` tokens, `new_tokens` each, weights and KV cache in `dtype`."""

    model: str
    sequences: int
    context: int
    new_tokens: int
    dtype: str
    num_microbatches: int = 1


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of prefill (with the first token) and of the decode steps; `split` of the decode time, if known."""

    prefill_s: float
    decode_s: float
    split: dict[str, float] | None = None


def prompts(point: Point, more: int = 0) -> np.ndarray:
    """[sequences + more, context] int64 token ids."""
    return np.random.default_rng(0).integers(10, 250, (point.sequences + more, point.context))  # in every vocabulary


def run_hetero_jax(point: Point) -> Times:
    """Our engine: a warm-up, a run for the throughput, and a profiled run for the split of the decode time."""
    import hetero_jax as hj

    model = hj.load(point.model, dtype=point.dtype)
    # Early sequences decode beside the prefill of late ones; none may end before the timed steps do.
    slack = 2 * point.sequences * point.context // _ROWS + 32
    length = point.context + point.new_tokens + slack
    layout = model.config
    per_token = layout.num_hidden_layers * layout.num_key_value_heads * layout.head_dim * 2
    config = hj.EngineConfig(
        kv_cache_bytes=(point.sequences + 1) * (length + 32) * per_token * (4 if point.dtype == "float32" else 2),
        num_microbatches=point.num_microbatches,
        max_num_batched_tokens=_ROWS,
        max_num_seqs=point.sequences + 1,
        max_model_len=length,
    )
    engine = hj.Engine(model, config)
    _run_engine(engine, point, slack)
    timed = _run_engine(engine, point, slack)
    engine.profile = True
    split = _run_engine(engine, point, slack).split
    return Times(prefill_s=timed.prefill_s, decode_s=timed.decode_s, split=split)


def _run_engine(engine: Any, point: Point, slack: int) -> Times:
    """Seconds until the last prompt has its first token, and of the `new_tokens` steps of all sequences after that.

    One request more than there are sequences ends after its first token and so tells that all are prefilled; the one
    before it ends `new_tokens` steps later, while all others go on.
    """
    import hetero_jax as hj

    def request(index: int, count: int) -> hj.Request:
        params = hj.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        return hj.Request(id=str(index), prompt_token_ids=tuple(map(int, ids[index])), sampling_params=params)

    ids = prompts(point, more=1)
    last = point.sequences
    counts = {last: 1, last - 1: 1 + point.new_tokens}
    requests = [request(index, counts.get(index, point.new_tokens + slack)) for index in range(len(ids))]
    marks = [(time.perf_counter(), engine.stats)]
    stream = engine.generate(requests)
    for completion in stream:
        assert completion.id in (str(last), str(last - 1)), f"sequence {completion.id} ended before the timed steps"
        marks.append((time.perf_counter(), engine.stats))
        if len(marks) == 3:
            break
    stream.close()
    (start_s, _), (first_s, before), (end_s, after) = marks
    names = ("dense_s", "attention_s", "sample_s", "host_s")
    split = {name: getattr(after, name) - getattr(before, name) for name in names}
    return Times(prefill_s=first_s - start_s, decode_s=end_s - first_s, split=split)


def run_transformers(point: Point) -> Times:
    """Hugging Face transformers on torch CPU: one static batch with a DynamicCache."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = Path(point.model)
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=getattr(torch, point.dtype)
    ).eval()
    ids = torch.from_numpy(prompts(point))

    def generate(steps: int) -> tuple[float, float]:
        start_s = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - start_s
        for _ in range(steps):
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return prefill_s, time.perf_counter() - start_s - prefill_s

    with torch.inference_mode():
        generate(1)
        prefill_s, decode_s = generate(point.new_tokens)
    return Times(prefill_s=prefill_s, decode_s=decode_s)


def run_llama_cpp(point: Point) -> Times:
    """llama.cpp: batched decode through the C API, weights as F32 or BF16 GGUF, KV cache in its default type, f16."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        dequantised_gguf(Path(point.model), path, point.dtype)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, _llama_params(llama_cpp, point))
    ids = prompts(point)

    def generate(steps: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start_s = time.perf_counter()
        tokens = _llama_prefill(llama_cpp, context, ids)
        prefill_s = time.perf_counter() - start_s
        for step in range(steps):
            rows = [(seq, point.context + step, token) for seq, token in enumerate(tokens)]
            tokens = _llama_decode(llama_cpp, context, rows, last=set(range(len(rows))))
        return prefill_s, time.perf_counter() - start_s - prefill_s

    generate(1)
    prefill_s, decode_s = generate(point.new_tokens)
    return Times(prefill_s=prefill_s, decode_s=decode_s)


def _llama_params(llama_cpp: Any, point: Point) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = point.sequences * (point.context + point.new_tokens + 8)
    params.n_batch = params.n_ubatch = _ROWS
    params.n_seq_max = point.sequences
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    return params


def _llama_prefill(llama_cpp: Any, context: Any, ids: np.ndarray) -> list[int]:
    """Prompts packed into batches of at most _ROWS tokens; the greedy next token of each."""
    found: list[int] = []
    batch: list[tuple[int, int, int]] = []
    last: set[int] = set()
    for sequence, row in enumerate(ids):
        for position, token in enumerate(row):
            if position == len(row) - 1:
                last.add(len(batch))
            batch.append((sequence, position, int(token)))
            if len(batch) == _ROWS or (sequence == len(ids) - 1 and position == len(row) - 1):
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
    kind = _ggml_type(dtype)
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


def _ggml_type(dtype: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16


CONTENDERS: dict[str, tuple[str, Callable[[Point], Times]]] = {
    "hetero_jax": ("hetero_jax", run_hetero_jax),
    "llama.cpp": ("llama_cpp", run_llama_cpp),
    "transformers": ("transformers", run_transformers),
}
