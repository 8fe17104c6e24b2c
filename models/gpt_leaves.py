"""The leaves of a GptDecoder. Names and layouts are GGUF's, the one form that GPT-2 and GPT-NeoX files share."""

from __future__ import annotations

from collections.abc import Iterator

from models.gpt_config import GptConfig
from models.leaf import Leaf, Path


def gpt_leaves(config: GptConfig) -> Iterator[Leaf]:
    """Every leaf of the module that this config builds."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    yield Leaf(path=("embedding",), sources={"token_embd.weight": (vocab, hidden)})
    if config.rotary_dim is None:
        places = (config.max_position_embeddings, hidden)
        yield Leaf(path=("position_embedding",), sources={"position_embd.weight": places})
    for layer in range(config.num_hidden_layers):
        old, new = f"blk.{layer}.", ("blocks", layer)
        yield from _norm_leaves(old + "attn_norm", (*new, "attention_norm"), hidden)
        yield from _linear_leaves(old + "attn_qkv", (*new, "attention", "qkv"), hidden, 3 * hidden)
        yield from _linear_leaves(old + "attn_output", (*new, "attention", "out"), hidden, hidden)
        yield from _norm_leaves(old + "ffn_norm", (*new, "mlp_norm"), hidden)
        yield from _linear_leaves(old + "ffn_up", (*new, "mlp", "up"), hidden, ffn)
        yield from _linear_leaves(old + "ffn_down", (*new, "mlp", "down"), ffn, hidden)
    yield from _norm_leaves("output_norm", ("norm",), hidden)
    if not config.tie_word_embeddings:
        yield Leaf(path=("head",), sources={"output.weight": (vocab, hidden)}, is_kernel=True)


def _norm_leaves(old: str, new: Path, size: int) -> Iterator[Leaf]:
    yield Leaf(path=(*new, "scale"), sources={f"{old}.weight": (size,)})
    yield Leaf(path=(*new, "bias"), sources={f"{old}.bias": (size,)})


def _linear_leaves(old: str, new: Path, fan_in: int, fan_out: int) -> Iterator[Leaf]:
    yield Leaf(path=(*new, "kernel"), sources={f"{old}.weight": (fan_out, fan_in)}, is_kernel=True)
    yield Leaf(path=(*new, "bias"), sources={f"{old}.bias": (fan_out,)})
