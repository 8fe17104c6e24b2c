"""Small random models of other people's libraries (the extra `zoo`), as functions of parameters, tokens, positions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

HF, TUNIX = "transformers 4.57.6", "google-tunix 0.1.7"
VOCAB_SIZE, MAX_ROWS = 61, 96


@dataclass(frozen=True, kw_only=True)
class ThirdPartyModel:
    """A model of `layers` layers: fn(params, tokens [1, T] int32, positions [1, T] int32) -> logits [1, T, vocab]."""

    library: str
    fn: Callable[..., jax.Array]
    params: Any


def build(name: str, *, layers: int = 2) -> ThirdPartyModel:
    """The model of `MODELS` with that name, with noise on every weight.

    Raises:
      ImportError: its library is not installed.
    """
    library, make = MODELS[name]
    fn, params = make(layers)
    return ThirdPartyModel(library=library, fn=fn, params=_with_noise(params))


def _with_noise(params: Any) -> Any:
    """Norms, biases and kernels that begin at 0 or 1 would hide mistakes."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.2 * random.normal(size=leaf.shape).astype(leaf.dtype), params)


def _gpt2(layers: int) -> tuple[Callable[..., Any], Any]:
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=MAX_ROWS, n_embd=24, n_layer=layers, n_head=6, bos_token_id=0, eos_token_id=0
    )
    return _hf_function("gpt2", "FlaxGPT2LMHeadModule", config)


def _hf(name: str, title: str, **options: Any) -> Callable[[int], tuple[Callable[..., Any], Any]]:
    def make(layers: int) -> tuple[Callable[..., Any], Any]:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{title}Config")(
            vocab_size=VOCAB_SIZE,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=MAX_ROWS,
            **options,
        )
        return _hf_function(name, f"Flax{title}ForCausalLMModule", config)

    return make


def _hf_function(name: str, module_class: str, config: Any) -> tuple[Callable[..., Any], Any]:
    library = importlib.import_module(f"transformers.models.{name}.modeling_flax_{name}")
    module = getattr(library, module_class)(config)
    ids = jnp.zeros((1, 8), jnp.int32)
    params = module.init(jax.random.key(0), ids, jnp.ones_like(ids), ids)["params"]

    def fn(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return module.apply({"params": params}, tokens, jnp.ones_like(tokens), positions).logits

    return fn, params


def _tunix(name: str, title: str) -> Callable[[int], tuple[Callable[..., Any], Any]]:
    def make(layers: int) -> tuple[Callable[..., Any], Any]:
        library = importlib.import_module(f"tunix.models.{name}.model")
        config = library.ModelConfig(
            num_layers=layers,
            vocab_size=VOCAB_SIZE,
            embed_dim=24,
            hidden_dim=40,
            num_heads=6,
            head_dim=8,
            num_kv_heads=2,
            rope_theta=10_000,
            norm_eps=1e-5,
        )
        graph, params = nnx.split(getattr(library, title)(config, rngs=nnx.Rngs(0)))

        def fn(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
            rows = tokens.shape[1]
            causal = jnp.tril(jnp.ones((rows, rows), bool))[None]
            return nnx.merge(graph, params, copy=True)(tokens, positions, None, causal)[0]

        return fn, params

    return make


MODELS: dict[str, tuple[str, Callable[[int], tuple[Callable[..., Any], Any]]]] = {
    "GPT-2": (HF, _gpt2),
    "Llama": (HF, _hf("llama", "Llama")),
    "Mistral": (HF, _hf("mistral", "Mistral", sliding_window=7)),
    "Gemma": (HF, _hf("gemma", "Gemma", head_dim=8, hidden_activation="gelu_pytorch_tanh")),
    "Llama 3": (TUNIX, _tunix("llama3", "Llama3")),
    "Qwen2": (TUNIX, _tunix("qwen2", "Qwen2")),
    "Qwen3": (TUNIX, _tunix("qwen3", "Qwen3")),
}
