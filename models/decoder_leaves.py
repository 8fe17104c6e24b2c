"""The leaves of a Decoder, with the names that Hugging Face's Llama, Gemma and Qwen give their tensors."""

from __future__ import annotations

from collections.abc import Iterator

from models.config import DecoderConfig
from models.leaf import Leaf, Path

_PRE_NORMED = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_POST_NORMED = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def decoder_leaves(config: DecoderConfig) -> Iterator[Leaf]:
    """Every leaf of the module that this config builds."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Leaf(path=("embedding",), sources={"model.embed_tokens.weight": (vocab, hidden)})
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", ("blocks", layer)
        for path, name in (_POST_NORMED if config.post_norms else _PRE_NORMED).items():
            yield Leaf(path=(*new, path, "scale"), sources={f"{old}{name}.weight": (hidden,)})
        yield from _attention_leaves(config, old + "self_attn.", (*new, "attention"))
        mlp_leaves = _mlp_leaves if config.num_experts is None else _expert_leaves
        yield from mlp_leaves(config, old + "mlp.", (*new, "mlp"))
    yield Leaf(path=("norm", "scale"), sources={"model.norm.weight": (hidden,)})
    if not config.tie_word_embeddings:
        yield Leaf(path=("head",), sources={"lm_head.weight": (vocab, hidden)}, is_kernel=True)


def _attention_leaves(config: DecoderConfig, old: str, new: Path) -> Iterator[Leaf]:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    kernels = {f"{old}{name}.weight": (size, hidden) for name, size in sizes.items()}
    yield Leaf(path=(*new, "qkv"), sources=kernels, is_kernel=True)
    if config.qkv_bias:
        yield Leaf(path=(*new, "qkv_bias"), sources={f"{old}{name}.bias": (size,) for name, size in sizes.items()})
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Leaf(path=(*new, name, "scale"), sources={f"{old}{name}.weight": (head_dim,)})
    yield Leaf(path=(*new, "out"), sources={f"{old}o_proj.weight": (hidden, q_size)}, is_kernel=True)


def _mlp_leaves(config: DecoderConfig, old: str, new: Path) -> Iterator[Leaf]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    gate_up = {f"{old}{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
    yield Leaf(path=(*new, "gate_up"), sources=gate_up, is_kernel=True)
    yield Leaf(path=(*new, "down"), sources={f"{old}down_proj.weight": (hidden, ffn)}, is_kernel=True)


def _expert_leaves(config: DecoderConfig, old: str, new: Path) -> Iterator[Leaf]:
    hidden, ffn, experts = config.hidden_size, config.intermediate_size, config.num_experts
    assert experts is not None
    yield Leaf(path=(*new, "router"), sources={f"{old}gate.weight": (experts, hidden)}, is_kernel=True)
    each = [f"{old}experts.{expert}." for expert in range(experts)]
    gate_up = {f"{one}{name}_proj.weight": (ffn, hidden) for one in each for name in ("gate", "up")}
    yield Leaf(path=(*new, "gate_up"), sources=gate_up, is_kernel=True, experts=experts)
    down = {f"{one}down_proj.weight": (hidden, ffn) for one in each}
    yield Leaf(path=(*new, "down"), sources=down, is_kernel=True, experts=experts)
