"""What the training of a deeper teacher begins with: a trained one, longer or of twice the layers.

A layer becomes two, each with the same weights and half of what the layer adds to the residual stream. The pair nearly
computes what the layer did, and both are needed from the first step on. (Copies that add nothing at first, as in LLaMA
Pro, compute exactly what the trained model does. Tried here, they stayed nearly idle over hundreds of steps.)
"""

from __future__ import annotations

import torch
from transformers import Qwen2ForCausalLM

from mamtra_ray.demo_assets.language_model import TeacherSettings, new_teacher
from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.sequences import SequenceFormat


@torch.no_grad()
def grow(trained: Qwen2ForCausalLM, sequence: SequenceFormat, settings: TeacherSettings) -> Qwen2ForCausalLM:
    """A model of `settings` with the weights of `trained`.

    Args:
        trained: of the same widths; of as many layers (the models compute the same) or of half as many.
        sequence: ids and order of a training sequence, the same for both.
        settings: the new model's shape; its longest sequence may be longer.

    Raises:
        InputError: the new model has neither as many layers nor twice as many.
    """
    layers = trained.config.num_hidden_layers
    if settings.num_layers not in (layers, 2 * layers):
        raise InputError(f"a teacher of {layers} layers grows to {2 * layers}, not to {settings.num_layers}")
    copies = settings.num_layers // layers
    grown = new_teacher(sequence, settings)
    rest = {name: tensor for name, tensor in trained.state_dict().items() if ".layers." not in name}
    grown.load_state_dict(rest, strict=False)
    for number, layer in enumerate(grown.model.layers):
        layer.load_state_dict(trained.model.layers[number // copies].state_dict())
        layer.self_attn.o_proj.weight /= copies
        layer.mlp.down_proj.weight /= copies
    return grown
