"""Writes tests/data/models: tiny random checkpoints of PyTorch transformers, and the logits that it computes.

The oracle shares no code with this project. Made with torch 2.13.0 and transformers 4.57.6; to make them again:

    python tests/support/write_oracle_models.py tests/data/models [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers as hf

_SIZES = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, **_SIZES}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **_SIZES,
}
_NEOX = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SIZES,
}
_GEMMA = {**_LLAMA_LIKE, "sliding_window": 4}
_EXPERTS = {**_LLAMA_LIKE, "num_experts_per_tok": 2, "tie_word_embeddings": False}

MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_NEOX, rotary_pct=0.5)),
    "gpt_neox_sequential": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_NEOX, rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu_fast")
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **_GEMMA,
            intermediate_size=48,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **{**_GEMMA, "num_hidden_layers": 6},  # the sixth is the first without a window
            intermediate_size=16,
            query_pre_attn_scalar=8,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        )
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **_EXPERTS, intermediate_size=80, moe_intermediate_size=24, num_experts=4, norm_topk_prob=True
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_EXPERTS, intermediate_size=24, num_local_experts=4, sliding_window=None)
    ),
}


def write(name: str, folder: Path) -> None:
    """The checkpoint in f32 with every parameter random, and oracle.npz: tokens [2, 20], logits f32 [2, 20, vocab]."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which begin as zeros and ones
            spread = 0.5 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.add_(torch.randn_like(parameter) * spread)
        tokens = torch.randint(0, 64, (2, 20))
        logits = model(tokens).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "oracle.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    for chosen in sys.argv[2:] or MODELS:
        write(chosen, Path(sys.argv[1]) / chosen)
