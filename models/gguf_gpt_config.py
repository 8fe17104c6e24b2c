"""GptConfig from the metadata of a GGUF file."""

from __future__ import annotations

from models.gguf_file import GgufFile
from models.gguf_values import get, integer, need, refuse_options, vocab_size
from models.gpt_config import GptConfig

GPT_ARCHITECTURES = {"gpt2": "gpt2", "gptneox": "gpt_neox"}  # GGUF's name -> Hugging Face's


def gpt_config_from_gguf(file: GgufFile, arch: str) -> GptConfig:
    """Reads the metadata of a file whose architecture is one of GPT_ARCHITECTURES."""
    is_neox = arch == "gptneox"
    refuse_options(file, {f"{arch}.rope.scaling.type": ("none",), f"{arch}.rope.scale_linear": (1.0,)})
    return GptConfig(
        model_type=GPT_ARCHITECTURES[arch],
        vocab_size=vocab_size(file),
        hidden_size=integer(file, f"{arch}.embedding_length"),
        intermediate_size=integer(file, f"{arch}.feed_forward_length"),
        num_hidden_layers=integer(file, f"{arch}.block_count"),
        num_attention_heads=integer(file, f"{arch}.attention.head_count"),
        max_position_embeddings=integer(file, f"{arch}.context_length"),
        layer_norm_eps=need(file, f"{arch}.attention.layer_norm_epsilon"),
        # no key says it: GPT-2 was trained with the tanh form, Pythia with the exact one
        hidden_act="gelu" if is_neox else "gelu_pytorch_tanh",
        rotary_dim=integer(file, f"{arch}.rope.dimension_count") if is_neox else None,
        rope_theta=get(file, f"{arch}.rope.freq_base", 10000.0),
        parallel_residual=bool(get(file, f"{arch}.use_parallel_residual", True)) if is_neox else False,
        tie_word_embeddings="output.weight" not in file.tensors,
    )
