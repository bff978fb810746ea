"""Tiny text models with a tokenizer: Hugging Face folders and GGUF files of the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MERGES = [("a", "b"), ("ab", "c")]
BYTES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_LAYERS, WIDTH, HEADS, GROUPS, INNER = 4, 64, 4, 2, 96
"""Heads of 16 make a multiple of 32, the block that llama.cpp's quantizations have."""
START, END = len(BYTES) + 1, len(BYTES) + 2
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def text_tokenizer() -> Any:
    """Every byte is a token, so are ``ab``, ``abc`` and three special ones."""
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(BYTES)}, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[1], eos_token=SPECIAL[2])


def text_model(kind: str = "llama", tied: bool = True, **settings: Any) -> Any:
    """A random model of transformers; norms and biases are random too."""
    config, model_class = CLASSES[kind]
    shape = {
        "vocab_size": len(BYTES) + len(SPECIAL),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": None,
    }
    model = model_class(config(**shape | settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return model


def write_text_folder(folder: Path, model: Any) -> Path:
    """As ``save_pretrained`` writes it, with the tokenizer."""
    model.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, model: Any, quantization: str = "F32", **more: Any) -> Path:
    """As llama.cpp's convert_hf_to_gguf.py writes it: its keys, its names, and q and k of a Llama permuted.

    Args:
        path: the file.
        model: of :func:`text_model`.
        quantization: a type of the package gguf for matrices.
        more: further tensors by name (arrays), or fields by key (text and numbers).
    """
    import gguf
    import numpy as np

    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim and head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*BYTES, *SPECIAL])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(BYTES) + [gguf.TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(START)
    writer.add_eos_token_id(END)
    for key, value in more.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    quantized = gguf.GGMLQuantizationType[quantization]
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = array.swapaxes(1, 2).reshape(tensor.shape)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    tensors |= {name: value for name, value in more.items() if isinstance(value, np.ndarray)}
    for name, array in tensors.items():
        if array.ndim == 2 and quantization != "F32":
            writer.add_tensor(name, gguf.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
