"""A deeper teacher from a trained one: every layer is followed by a copy of it that adds nothing at first.

A copy's two output projections start at zero (as in LLaMA Pro, Wu et al. 2024), so the grown model computes what the
trained one does, and every new layer has gradients from the first step on.
"""

from __future__ import annotations

import torch
from transformers import Qwen2ForCausalLM

from mamtra_ray.demo_assets.language_model import TeacherSettings, new_teacher
from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.sequences import SequenceFormat


@torch.no_grad()
def grow(trained: Qwen2ForCausalLM, sequence: SequenceFormat, settings: TeacherSettings) -> Qwen2ForCausalLM:
    """A model of `settings` that computes what `trained` does.

    Args:
        trained: of the same widths, and of half as many layers.
        sequence: ids and order of a training sequence, the same for both.
        settings: the grown model's shape.

    Raises:
        InputError: the grown model does not have twice the layers.
    """
    layers = trained.config.num_hidden_layers
    if settings.num_layers != 2 * layers:
        raise InputError(f"a teacher of {layers} layers grows to {2 * layers}, not to {settings.num_layers}")
    grown = new_teacher(sequence, settings)
    rest = {name: tensor for name, tensor in trained.state_dict().items() if ".layers." not in name}
    grown.load_state_dict(rest, strict=False)
    for number, layer in enumerate(grown.model.layers):
        layer.load_state_dict(trained.model.layers[number // 2].state_dict())
        if number % 2:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return grown
