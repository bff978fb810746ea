"""Export to a GGUF file that llama.cpp runs: its architecture ``granitehybrid``, with RoPE.

llama.cpp's own converter (``convert_hf_to_gguf.py``) must not be used on an exported checkpoint: it switches RoPE off
for every Granite model with Mamba layers (``rope.scaling.finetuned`` = false). The engine rotates where that key is
true, and pairs elements 2 i and 2 i + 1 of a head, so rows of q and k change places.

llama.cpp takes mixers of twice the model's width only, and ours are as wide as the model. So every channel of z and x
is written twice: a head's state then holds every row twice, a norm over a head sees the same mean square, and
out_proj reads the first copy and has zeros for the second. The function is the same; a mixer's state is twice as
large, and its matrices are 1.6 times those of the checkpoint for transformers.

The head has rows for speech ids alone and may have a bias; the file has no place for either. Both are in
``generation_config.json``, see :mod:`mamtra_ray.models.granite`, and are the caller's to apply to the logits. The
file holds no tokenizer (``tokenizer.ggml.model`` = none): token ids in, token ids out.

Tensor letters: D model width, H query heads, P head dim, K taps of the convolution, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.artifacts import written_atomically
from mamtra_ray.errors import InputError
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.granite import expanded_head
from mamtra_ray.models.granite_mixer import expanded_parameter

GGUF_FILE = "model.gguf"
ARCHITECTURE = "granitehybrid"

_ROPE_TYPES = ("default", "linear", "llama3")
"""Of which a file can say all frequencies: YaRN also scales the attention, dynamic depends on the length."""
_NAMES = {
    "embed_tokens.weight": "token_embd",
    "norm.weight": "output_norm",
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mamba.in_proj.weight": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.dt_bias": "ssm_dt",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm.weight": "ssm_norm",
    "mamba.out_proj.weight": "ssm_out",
}
"""Our parameters (without the layer, and ``weight`` or ``bias`` where a module has both) -> llama.cpp's.

Written out, because the package ``gguf`` knows ``ssm_norm`` only from 0.18 on.
"""
_FLOAT32 = ("ssm_conv1d", "ssm_norm", "ssm_a", "ssm_d")
"""Matrices that llama.cpp wants in float32."""


def gguf_obstacle(config: DecoderConfig) -> str | None:
    """Why llama.cpp cannot run hybrids of this shape, as a clause; None if it can."""
    if config.qk_norm:
        return "llama.cpp's granitehybrid has no norms of queries and keys, which this model's attention has"
    if (2 * config.hidden_size) % (config.num_heads * config.head_dim):
        return (
            f"llama.cpp's granitehybrid has mixers of twice the model width {config.hidden_size} only, which"
            f" {config.num_heads} heads of width {config.head_dim} do not divide"
        )
    if not (config.layout.attention_layers and config.layout.mamba_layers):
        return "llama.cpp aborts on a granitehybrid that has layers of one kind only"
    if config.o_bias:
        return "llama.cpp's granitehybrid has no bias in a mixer's output projection, which this model has"
    if (kind := config.rope_parameters["rope_type"]) not in _ROPE_TYPES:
        return f"RoPE of type {kind!r} cannot be written so that llama.cpp computes the same angles"
    return None


def check_gguf_possible(config: DecoderConfig) -> None:
    """Refuse what llama.cpp would not run, or run wrongly.

    Raises:
        InputError: says what.
    """
    if problem := gguf_obstacle(config):
        raise InputError(f"{problem}: no GGUF file can be written")


def write_granite_gguf(
    path: Path,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Mapping[str, Any],
    dtype: torch.dtype,
    name: str = "hybrid",
) -> None:
    """Write the file, atomically.

    Args:
        path: of the file.
        config: of the hybrid.
        tensors: the SpeechLM's state (``body.*``, ``head.*``).
        vocabulary: the fields of :class:`~mamtra_ray.speech_lm.speech_lm.Vocabulary`.
        dtype: of the matrices: float32, float16 or bfloat16. Norms, biases, convolutions and what else is small are
            float32, as llama.cpp wants them.
        name: ``general.name``.

    Raises:
        InputError: llama.cpp cannot run such a model; the package ``gguf`` is missing; a weight beyond float16.
    """
    try:
        import gguf
        from gguf.quants import quantize
    except ModuleNotFoundError as error:
        raise InputError(f"writing {path} needs the package {error.name}: pip install 'mamtra-ray[gguf]'") from None
    check_gguf_possible(config)
    types = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    matrix_type, file_type = types[dtype]
    with written_atomically(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            writer.add_name(name)
            writer.add_file_type(file_type)
            _add_hyperparameters(writer, config)
            for tensor_name, tensor in _gguf_tensors(config, tensors, vocabulary):
                small = tensor.dim() == 1 or tensor_name.removesuffix(".weight").rpartition(".")[2] in _FLOAT32
                values = tensor.detach().float().cpu().contiguous()
                kind = gguf.GGMLQuantizationType.F32 if small else matrix_type
                if kind == gguf.GGMLQuantizationType.F16 and not bool(values.half().isfinite().all()):
                    raise InputError(f"{tensor_name} has values beyond float16: write the file in bfloat16 (--dtype)")
                writer.add_tensor(tensor_name, quantize(values.numpy(), kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add_hyperparameters(writer: Any, config: DecoderConfig) -> None:
    """Scales of embeddings, residuals and logits are left out: Granite has them, we do not."""
    attention = set(config.layout.attention_layers)
    width = 2 * config.hidden_size
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    # A layer without key-value heads is a Mamba layer.
    writer.add_head_count_kv([config.num_kv_heads if i in attention else 0 for i in range(config.num_layers)])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_attention_scale(config.head_dim**-0.5)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    # The switch of RoPE for this architecture, whatever its name.
    writer.add_rope_scaling_finetuned(True)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(width)
    writer.add_ssm_state_size(config.head_dim)
    writer.add_ssm_time_step_rank(config.num_heads)
    # By its key, because the package gguf has a function for it only from 0.18 on.
    writer.add_uint32(f"{ARCHITECTURE}.ssm.group_count", config.num_heads)
    writer.add_tokenizer_model("none")


def _gguf_tensors(
    config: DecoderConfig, tensors: Mapping[str, Tensor], vocabulary: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    head_VD = expanded_head(config, tensors, vocabulary)
    if head_VD is not None:
        yield "output.weight", head_VD
    if config.rope_parameters["rope_type"] != "default":
        yield "rope_freqs.weight", _rope_factors(config)
    for name, tensor in tensors.items():
        if not name.startswith("body."):
            continue
        block, parameter = "", name.removeprefix("body.")
        if parameter.startswith("layers."):
            _, layer, parameter = parameter.split(".", 2)
            block = f"blk.{layer}."
        module, _, kind = parameter.rpartition(".")
        if module.startswith("self_attn.") and module.endswith(("q_proj", "k_proj")):
            tensor = _neighbors_paired(config, tensor)
        if parameter.startswith("mamba."):
            tensor = _wide(config, parameter.removeprefix("mamba."), tensor)
        suffix = {"A_log": "", "D": "", "dt_bias": ".bias"}.get(kind, f".{kind}")
        yield block + (_NAMES.get(parameter) or _NAMES[module]) + suffix, tensor


def _rope_factors(config: DecoderConfig) -> Tensor:
    """What llama.cpp divides every frequency by, (P / 2,)."""
    plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    default_F, _ = type(config.rope)(plain, config.head_dim, config.max_position_embeddings).frequencies()
    frequency_F, _ = config.rope.frequencies()
    return default_F / frequency_F


def _neighbors_paired(config: DecoderConfig, rows: Tensor) -> Tensor:
    """Rows of q or k for a RoPE that pairs neighbors, where ours pairs i with i + P / 2."""
    return rows.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _wide(config: DecoderConfig, parameter: str, tensor: Tensor) -> Tensor:
    """A mixer's parameter as llama.cpp has it: expanded to one group a head, and as wide as it wants mixers."""
    copies = 2 * config.hidden_size // (config.num_heads * config.head_dim)
    heads = (config.num_heads, config.head_dim)
    tensor = expanded_parameter(config.mixer, parameter, tensor.float())
    if parameter == "A_log":
        return -torch.exp(tensor)[:, None]
    if parameter == "D":
        return tensor[:, None]
    if parameter == "norm.weight":
        return torch.cat([tensor.unflatten(0, heads)] * copies, -1)
    if parameter == "out_proj.weight":
        first_DHP = tensor.unflatten(1, heads)
        return torch.cat([first_DHP] + [torch.zeros_like(first_DHP)] * (copies - 1), -1).flatten(1)
    if parameter == "in_proj.weight":
        inner = config.mixer.inner_size
        z, x, rest = tensor.split([inner, inner, len(tensor) - 2 * inner])
        return torch.cat([_repeated(z, heads, copies), _repeated(x, heads, copies), rest])
    if parameter.startswith("conv1d."):
        x, rest = tensor.split([config.mixer.inner_size, 2 * config.mixer.inner_size])
        wide = torch.cat([_repeated(x, heads, copies), rest])
        return wide[:, 0] if parameter == "conv1d.weight" else wide
    return tensor


def _repeated(rows: Tensor, heads: tuple[int, int], copies: int) -> Tensor:
    """Every head's rows ``copies`` times, one copy after the other."""
    return torch.cat([rows.unflatten(0, heads)] * copies, 1).flatten(0, 1)
