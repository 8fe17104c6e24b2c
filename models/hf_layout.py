"""How Hugging Face's safetensors hold each tensor: its name there, and whether it lies there in another way."""

from __future__ import annotations

import re

import numpy as np

from models.config import DecoderConfig
from models.families import ModelConfig
from models.weights import StoredTensor

_GPT2 = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
    "output_norm": "ln_f",
    "output": "lm_head",
}
_GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}

# what checkpoints carry beside the weights: tied heads, rotary frequencies, causal masks
_IGNORED = r"lm_head\.weight|.+\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)"


def hf_tensor(config: ModelConfig, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Where the tensor that the module calls `name` is in the file."""
    if isinstance(config, DecoderConfig):
        return StoredTensor(name=_mixtral_name(name) if config.model_type == "mixtral" else name, shape=shape)
    if config.model_type == "gpt2":
        # linear layers are stored [in, out], embeddings [entries, hidden]
        transposed = len(shape) == 2 and name.startswith("blk.")
        stored = _gpt_name(name, _GPT2, "h")
        return (
            StoredTensor(name=stored, shape=shape[::-1], restore=np.transpose)
            if transposed
            else StoredTensor(name=stored, shape=shape)
        )
    stored = _gpt_name(name, _GPT_NEOX, "gpt_neox.layers")
    if ".attn_qkv." not in name:
        return StoredTensor(name=stored, shape=shape)
    return StoredTensor(name=stored, shape=shape, restore=lambda array: _split_heads(array, config.num_attention_heads))


def hf_file_name(config: ModelConfig, name: str) -> str:
    """A tensor's name without the prefix that only some files of its family carry."""
    return name.removeprefix("transformer.") if config.model_type == "gpt2" else name


def is_ignored(name: str) -> bool:
    """Whether the tensor follows from the others and is not read."""
    return re.fullmatch(_IGNORED, name) is not None


def _mixtral_name(name: str) -> str:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return re.sub(r"\.(gate|down|up)_proj\.", lambda part: f".{_MIXTRAL[part[1]]}.", name)


def _gpt_name(name: str, names: dict[str, str], layers: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{names[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"{layers}.{layer}.{names[part]}.{suffix}"


def _split_heads(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows from q, k, v of the first head, of the second, ... to all of q, all of k, all of v."""
    return array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
