"""Random small shapes of Qwen2 and Llama models, of transformers and of ours, with the same weights."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from mamtra_ray.models.decoder import Decoder
from mamtra_ray.models.pretrained import decoder_config, head_weight, split_checkpoint

VOCABULARY, MAX_POSITIONS = 50, 24
"""Few positions, so that short sequences reach what RoPE's rescalings change."""
ROPES = {
    "default": {},
    "default, partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 6},
    "yarn, all keys": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "beta_fast": 16.0, "beta_slow": 2.0,
        "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A causal language model of transformers, and our decoder and head made of its tensors."""

    theirs: PreTrainedModel
    ours: Decoder
    head_VD: torch.Tensor


def random_pair(seed: int, dtype: torch.dtype = torch.float32) -> Pair:
    """Heads per group, head width (not always model width / heads), biases, tying, RoPE and sizes drawn by ``seed``."""
    draw = random.Random(seed)
    groups, per_group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4, 7])
    head_dim = draw.choice([4, 6, 8, 10, 16, 24])
    kind = draw.choice(["qwen2", "llama"])
    heads = groups * per_group
    # Qwen2Config has no head_dim of its own: its width is that of all heads.
    width = heads * head_dim if kind == "qwen2" else heads * draw.choice([head_dim, 3, 5, 12])
    name = draw.choice(list(ROPES))
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": draw.choice([13, 40, 65]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": {"rope_type": name.split(",")[0], "rope_theta": draw.choice([1e4, 5e5, 1e6]), **ROPES[name]},
    }
    if kind == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        biased = draw.random() < 0.5
        model = LlamaForCausalLM(LlamaConfig(**shape, head_dim=head_dim, attention_bias=biased))
    generator = torch.Generator().manual_seed(seed)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2, generator=generator)
    model = model.to(dtype).eval()
    # transformers keeps these in float32 when it loads half precision, not in .to(dtype).
    model.model.rotary_emb.inv_freq = frequencies
    model.model.rotary_emb.original_inv_freq = frequencies.clone()
    config = decoder_config(model.config)
    decoder, others = split_checkpoint(model.state_dict(), config, "model.", "model")
    head_VD = head_weight(others, decoder["embed_tokens.weight"], model.config.tie_word_embeddings, "model")
    assert not others
    ours = Decoder(config)
    ours.load_state_dict(decoder, assign=True)
    return Pair(model, ours.eval(), head_VD)
