"""The Llama family in float64 NumPy, one token row and one head at a time: the reference that shares no code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def reference_logits(config, tensors: Mapping[str, np.ndarray], tokens, inv_freq, rope_factor=1.0) -> np.ndarray:
    """f64 [T, vocab] from tensors under Hugging Face's names; `inv_freq` [head_dim / 2] is given, not derived."""
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = weights["model.embed_tokens.weight"][list(tokens)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        window = config.sliding_window
        if config.layer_types is not None and config.layer_types[layer] == "full_attention":
            window = None
        h = _norm(x, part["input_layernorm.weight"], config.rms_norm_eps)
        x = x + _attention(config, part, h, inv_freq, rope_factor, window)
        h = _norm(x, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = h @ part["mlp.gate_proj.weight"].T, h @ part["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part["mlp.down_proj.weight"].T
    x = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _attention(config, part, h, inv_freq, rope_factor, window):
    heads = {}
    for name in "qkv":
        y = h @ part[f"self_attn.{name}_proj.weight"].T + part.get(f"self_attn.{name}_proj.bias", 0.0)
        y = y.reshape(len(h), -1, config.head_dim)
        if name != "v" and f"self_attn.{name}_norm.weight" in part:
            y = _norm(y, part[f"self_attn.{name}_norm.weight"], config.rms_norm_eps)
        heads[name] = y if name == "v" else _rotate(y, inv_freq, rope_factor)
    group = config.num_attention_heads // config.num_key_value_heads
    out = np.zeros_like(heads["q"])
    for head in range(config.num_attention_heads):
        for t in range(len(h)):
            first = 0 if window is None else max(0, t - window + 1)
            k, v = (heads[name][first : t + 1, head // group] for name in "kv")
            score = k @ heads["q"][t, head] / np.sqrt(config.head_dim)
            weight = np.exp(score - score.max())
            out[t, head] = weight / weight.sum() @ v
    return out.reshape(len(h), -1) @ part["self_attn.o_proj.weight"].T


def _rotate(x, inv_freq, factor):
    """Pairs (i, i + d/2) as complex numbers, turned by position * inv_freq."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (
        factor * np.exp(1j * np.arange(len(x))[:, None, None] * np.asarray(inv_freq, np.float64))
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)
