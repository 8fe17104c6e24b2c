"""From tensors under Hugging Face's names to the fused leaves of a Decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
Path = tuple[str | int, ...]


def resolve_dtype(name: str) -> np.dtype:
    """The dtype of weights by name; UnsupportedModelError for anything but those in DTYPES."""
    if name not in DTYPES:
        raise UnsupportedModelError(f"dtype {name!r} is not supported; allowed: {tuple(DTYPES)}")
    return np.dtype(DTYPES[name])


def abstract_decoder(config: DecoderConfig, dtype: np.dtype) -> tuple[nnx.GraphDef[Decoder], dict[Path, nnx.Variable]]:
    """The structure of the module, and its leaves by path as shapes without memory."""
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(module)
    return graphdef, dict(nnx.to_flat_state(state))


def merge_decoder(
    graphdef: nnx.GraphDef[Decoder], variables: Mapping[Path, nnx.Variable], arrays: Mapping[Path, jax.Array]
) -> Decoder:
    """A module whose leaves are `arrays`; each must have the shape and dtype of its variable."""
    filled = []
    for path, variable in variables.items():
        expected = variable.get_value()
        assert (arrays[path].shape, arrays[path].dtype) == (expected.shape, expected.dtype), path
        filled.append((path, variable.replace(arrays[path])))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def read_decoder(config: DecoderConfig, read: TensorReader, *, dtype: str) -> Decoder:
    """Reads every tensor once and builds the module on the default device, leaf by leaf."""
    resolved = resolve_dtype(dtype)
    graphdef, variables = abstract_decoder(config, resolved)
    arrays = {path: jnp.asarray(array) for path, array in _leaves(config, read, resolved)}
    return merge_decoder(graphdef, variables, arrays)


def tensor_names(config: DecoderConfig) -> frozenset[str]:
    """The Hugging Face names of all tensors that `read_decoder` reads."""
    seen: set[str] = set()

    def note(name: str, shape: tuple[int, ...]) -> np.ndarray:
        seen.add(name)
        return np.broadcast_to(np.float32(0), shape)  # no memory behind it

    for _ in _leaves(config, note, None):
        pass
    return frozenset(seen)


def _leaves(
    config: DecoderConfig, read: TensorReader, dtype: np.dtype | None
) -> Iterator[tuple[Path, np.ndarray]]:
    hidden, vocab = config.hidden_size, config.vocab_size

    def vector(name: str, size: int) -> np.ndarray:
        return _cast(read(name, (size,)), dtype)

    yield ("embedding",), _cast(read("model.embed_tokens.weight", (vocab, hidden)), dtype)
    for layer in range(config.num_hidden_layers):
        yield from _block_leaves(config, layer, read, dtype)
    yield ("norm", "scale"), vector("model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield ("head",), _fused(read, {"lm_head.weight": vocab}, hidden, dtype)


def _block_leaves(
    config: DecoderConfig, layer: int, read: TensorReader, dtype: np.dtype | None
) -> Iterator[tuple[Path, np.ndarray]]:
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    old, new = f"model.layers.{layer}.", ("blocks", layer)
    attn = old + "self_attn."
    projections = {"q": q_size, "k": kv_size, "v": kv_size}
    yield (*new, "attention", "qkv"), _fused(
        read, {f"{attn}{name}_proj.weight": size for name, size in projections.items()}, hidden, dtype
    )
    if config.qkv_bias:
        biases = [_cast(read(f"{attn}{name}_proj.bias", (size,)), dtype) for name, size in projections.items()]
        yield (*new, "attention", "qkv_bias"), _concatenate(biases)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield (*new, "attention", name, "scale"), _cast(read(f"{attn}{name}.weight", (head_dim,)), dtype)
    yield (*new, "attention", "out"), _fused(read, {attn + "o_proj.weight": hidden}, q_size, dtype)
    gate_up = {f"{old}mlp.{name}_proj.weight": ffn for name in ("gate", "up")}
    yield (*new, "mlp", "gate_up"), _fused(read, gate_up, hidden, dtype)
    yield (*new, "mlp", "down"), _fused(read, {old + "mlp.down_proj.weight": hidden}, ffn, dtype)
    for path, name in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        yield (*new, path, "scale"), _cast(read(f"{old}{name}.weight", (hidden,)), dtype)


def _fused(read: TensorReader, sizes: Mapping[str, int], fan_in: int, dtype: np.dtype | None) -> np.ndarray:
    """Several [out, in] matrices as one kernel [in, sum of outs]."""
    return _concatenate([_cast(read(name, (size, fan_in)), dtype).T for name, size in sizes.items()])


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    if parts[0].strides == (0,) * parts[0].ndim:  # the placeholders of tensor_names
        return parts[0]
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _cast(array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    return array if dtype is None else array.astype(dtype, copy=False)
