"""Speech LMs of a given shape with random weights, for speed and memory, which do not depend on their values."""

from __future__ import annotations

import torch

from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.layouts import Layout
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.speech_lm.sequences import Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM


def random_teacher(
    shape: Architecture, num_layers: int | None = None, text_size: int = 64, dtype: torch.dtype = torch.float32
) -> SpeechLM:
    """An all-attention model. The text vocabulary is kept small: its embeddings cost memory and no time."""
    speech_size = shape.head_outputs
    vocabulary = Vocabulary(text_size, speech_size, 2, eos_id=speech_size - 1, stop_ids=(speech_size - 1,))
    config = DecoderConfig(
        layout=Layout("A" * (num_layers or shape.num_layers)),
        vocab_size=vocabulary.size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=32768,
        qkv_bias=shape.qkv_bias,
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in SpeechLM(config, vocabulary, head_bias=False).state_dict().items()}
    tensors = {
        name: torch.ones(size) if "norm" in name else torch.empty(size).normal_(0, 0.02, generator=generator)
        for name, size in shapes.items()
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return SpeechLM.from_tensors(config, vocabulary, tensors).eval()
