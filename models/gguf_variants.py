"""What Gemma and mixtures of experts add to a DecoderConfig read from GGUF."""

from __future__ import annotations

from typing import Any

from models.gguf_file import GgufFile
from models.gguf_values import get, integer
from models.hf_gemma_config import gemma_layer_types

_GEMMA_PATTERNS = {"gemma2": 2, "gemma3": 6}
# No key holds the scale of the scores. Of the published models all but these, by depth, scale by the head size.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_LOCAL_ROPE_BASE = 10000.0  # nor is this one stored


def gemma_fields(file: GgufFile, arch: str, *, head_dim: int) -> dict[str, Any]:
    """The fields of Gemma 2 or 3 that other families do not have."""
    layers, hidden = integer(file, f"{arch}.block_count"), integer(file, f"{arch}.embedding_length")
    heads, has_window = (
        integer(file, f"{arch}.attention.head_count"),
        f"{arch}.attention.sliding_window" in file.metadata,
    )
    pattern = _GEMMA_PATTERNS[arch]
    return {
        "model_type": "gemma2" if arch == "gemma2" else "gemma3_text",
        "layer_types": gemma_layer_types(layers, pattern) if has_window else None,
        "rope_local_base_freq": _LOCAL_ROPE_BASE if arch == "gemma3" else None,
        "hidden_act": "gelu_pytorch_tanh",
        "scale_embeddings": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "query_pre_attn_scalar": hidden // heads if layers == _SCALED_BY_WIDTH[arch] else head_dim,
        "attn_logit_softcapping": get(file, f"{arch}.attn_logit_softcapping", None),
        "final_logit_softcapping": get(file, f"{arch}.final_logit_softcapping", None),
    }


def expert_fields(file: GgufFile, arch: str) -> dict[str, Any]:
    """The fields of a mixture of experts: Mixtral (a llama file with experts) or Qwen3-MoE."""
    width = "expert_feed_forward_length" if arch == "qwen3moe" else "feed_forward_length"
    return {
        "model_type": "qwen3_moe" if arch == "qwen3moe" else "mixtral",
        "intermediate_size": integer(file, f"{arch}.{width}"),
        "num_experts": integer(file, f"{arch}.expert_count"),
        "num_experts_per_tok": integer(file, f"{arch}.expert_used_count"),
    }
