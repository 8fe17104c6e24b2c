"""From tensors under Hugging Face's names to the fused leaves of a Decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import UnsupportedModelError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# read(name, shape) gives the named tensor, matrices as [out, in], and raises if its shape is another one
TensorReader = Callable[[str, tuple[int, ...]], np.ndarray]
Path = tuple[Any, ...]  # ("blocks", 3, "mlp", "down")


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A leaf of the module: its sources side by side along the last axis, as [in, out] where `is_kernel`."""

    path: Path
    sources: Mapping[str, tuple[int, ...]]  # tensor name -> shape in the file
    is_kernel: bool = False


def resolve_dtype(name: str) -> np.dtype:
    """The dtype of weights by name; UnsupportedModelError for anything but those in DTYPES."""
    if name not in DTYPES:
        raise UnsupportedModelError(f"dtype {name!r} is not supported; allowed: {tuple(DTYPES)}")
    return np.dtype(DTYPES[name])


def tensor_names(config: DecoderConfig) -> frozenset[str]:
    """The Hugging Face names of all tensors that `read_decoder` reads."""
    return frozenset(name for leaf in _leaves(config) for name in leaf.sources)


def read_decoder(config: DecoderConfig, read: TensorReader, *, dtype: str) -> Decoder:
    """Reads every tensor once and builds the module on the default device, leaf by leaf."""
    resolved = resolve_dtype(dtype)
    graphdef, variables = abstract_decoder(config, resolved)
    return merge_decoder(graphdef, variables, {leaf.path: _read_leaf(leaf, read, resolved) for leaf in _leaves(config)})


def abstract_decoder(config: DecoderConfig, dtype: np.dtype) -> tuple[nnx.GraphDef[Decoder], dict[Path, nnx.Variable]]:
    """The structure of the module, and its leaves by path as shapes without memory."""
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(module)
    return graphdef, dict(nnx.to_flat_state(state))


def merge_decoder(
    graphdef: nnx.GraphDef[Decoder], variables: Mapping[Path, nnx.Variable], arrays: Mapping[Path, jax.Array]
) -> Decoder:
    """A module whose leaves are `arrays`; each must have the shape and dtype of its variable."""
    assert variables.keys() == arrays.keys(), variables.keys() ^ arrays.keys()
    filled = []
    for path, variable in variables.items():
        expected = variable.get_value()
        assert (arrays[path].shape, arrays[path].dtype) == (expected.shape, expected.dtype), path
        filled.append((path, variable.replace(arrays[path])))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _read_leaf(leaf: _Leaf, read: TensorReader, dtype: np.dtype) -> jax.Array:
    # cast before joining: the f32 form of a large leaf never exists as a whole
    parts = [read(name, shape).astype(dtype, copy=False) for name, shape in leaf.sources.items()]
    if leaf.is_kernel:
        parts = [part.T for part in parts]
    return jnp.asarray(np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=-1))


def _leaves(config: DecoderConfig) -> Iterator[_Leaf]:
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _Leaf(path=("embedding",), sources={"model.embed_tokens.weight": (vocab, hidden)})
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", ("blocks", layer)
        for path, name in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            yield _Leaf(path=(*new, path, "scale"), sources={f"{old}{name}.weight": (hidden,)})
        yield from _attention_leaves(config, old + "self_attn.", (*new, "attention"))
        yield from _mlp_leaves(config, old + "mlp.", (*new, "mlp"))
    yield _Leaf(path=("norm", "scale"), sources={"model.norm.weight": (hidden,)})
    if not config.tie_word_embeddings:
        yield _Leaf(path=("head",), sources={"lm_head.weight": (vocab, hidden)}, is_kernel=True)


def _attention_leaves(config: DecoderConfig, old: str, new: Path) -> Iterator[_Leaf]:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    kernels = {f"{old}{name}.weight": (size, hidden) for name, size in sizes.items()}
    yield _Leaf(path=(*new, "qkv"), sources=kernels, is_kernel=True)
    if config.qkv_bias:
        yield _Leaf(path=(*new, "qkv_bias"), sources={f"{old}{name}.bias": (size,) for name, size in sizes.items()})
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _Leaf(path=(*new, name, "scale"), sources={f"{old}{name}.weight": (head_dim,)})
    yield _Leaf(path=(*new, "out"), sources={f"{old}o_proj.weight": (hidden, q_size)}, is_kernel=True)


def _mlp_leaves(config: DecoderConfig, old: str, new: Path) -> Iterator[_Leaf]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    gate_up = {f"{old}{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
    yield _Leaf(path=(*new, "gate_up"), sources=gate_up, is_kernel=True)
    yield _Leaf(path=(*new, "down"), sources={f"{old}down_proj.weight": (hidden, ffn)}, is_kernel=True)
