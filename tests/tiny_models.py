"""Small Qwen2 and Llama folders of exactly the form real ones have, with random weights."""

from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.teachers.huggingface import write_format

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""What transformers' own models call the argument for their cache; the old name is deprecated."""
VOCABULARY = Vocabulary(text_size=30, speech_size=41, control_size=4, eos_id=38, stop_ids=(38, 39))
SEQUENCE = SequenceFormat(prefix=(71,), separator=(72, 73), vocabulary=VOCABULARY)
SPEECH = slice(VOCABULARY.speech_offset, VOCABULARY.control_offset)
NUM_LAYERS = 4

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that short test sequences reach the scaled frequencies.
    "original_max_position_embeddings": 16,
}


def transformers_model(kind: str = "qwen2", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A causal LM of transformers: ``qwen2`` (q/k/v biases, untied) or ``llama`` (no biases, llama3 RoPE, tied)."""
    shape = {
        "vocab_size": VOCABULARY.size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if kind == "llama":
        config = LlamaConfig(**{**shape, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, **changes})
        model = LlamaForCausalLM(config)
    else:
        config = Qwen2Config(**{**shape, "tie_word_embeddings": False, **changes})
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that every part of the model matters to its output; norms near 1.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    return model.eval()


def write_folder(folder: Path, model: PreTrainedModel, **save_options: object) -> Path:
    """Save ``model`` with its ``speech_lm.json``."""
    model.save_pretrained(folder, **save_options)
    write_format(folder, SEQUENCE, 25.0, (2.0, 20.0), made_by={"test": True})
    return folder
