"""A student: the teacher with Mamba mixers in place of the attention of some layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import Layout
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.models.transfer import INITIALIZATIONS, mixer_from_attention, mixer_from_library
from mamtra_ray.speech_lm.speech_lm import SpeechLM


@torch.no_grad()
def make_student(
    teacher: SpeechLM,
    layout: Layout | str,
    initialization: str = "transfer",
    mixer_library: Mapping[int, Mapping[str, Tensor]] | None = None,
    state_sharing: StateSharing = "per_query_head",
    seed: int = 0,
    share_weights: bool = False,
) -> SpeechLM:
    """A student of ``layout``: the teacher with Mamba mixers in place of some attentions.

    Everything a layer has besides its mixer (MLP, norms), attention where it stays, embeddings and head are
    the teacher's. The mixer of a layer depends on ``seed`` and the layer only, so students of different
    layouts start from the same mixers.

    Args:
        teacher: all attention, or a hybrid whose Mamba layers ``layout`` keeps (they are copied).
        layout: one letter per decoder layer.
        initialization: ``transfer``, ``xavier``, ``kaiming`` (see :func:`mixer_from_attention`) or ``aligned``.
        mixer_library: for ``aligned``: per layer, the tensors of a mixer.
        state_sharing: see :class:`~mamtra_ray.models.mamba.MixerConfig`.
        seed: of the random parts of the mixers.
        share_weights: use the teacher's own tensors instead of copies, for forward passes only (probing many
            layouts in milliseconds each); training such a student would change the teacher.

    Raises:
        InputError: a layout of another length, attention asked for where the teacher has none, an unknown
            initialization, or a library without a needed layer.
    """
    layout = Layout.from_string(layout) if isinstance(layout, str) else layout
    if layout.num_layers != teacher.config.num_layers:
        raise InputError(f"layout {layout} has {layout.num_layers} layers, the teacher {teacher.config.num_layers}")
    if initialization not in INITIALIZATIONS:
        raise InputError(f"unknown initialization {initialization!r}: {nearest_name(initialization, INITIALIZATIONS)}")
    if initialization == "aligned" and mixer_library is None:
        raise InputError("initialization 'aligned' needs a mixer library")
    own_mixers = teacher.body.mixers
    if lost := sorted(set(layout.attention_layers) & set(own_mixers)):
        raise InputError(f"layout {layout} wants attention in layer {lost[0]}, where {teacher.layout} has none left")
    if own_mixers and state_sharing != teacher.config.state_sharing:
        raise InputError(f"the Mamba layers of {teacher.layout} share states {teacher.config.state_sharing}")
    config = dataclasses.replace(teacher.config, layout=layout, state_sharing=state_sharing)
    new_layers = set(layout.mamba_layers) - set(own_mixers)
    replaced = tuple(f"body.layers.{layer}.self_attn." for layer in new_layers)
    tensors = {
        name: tensor if share_weights else tensor.clone()
        for name, tensor in teacher.state_dict().items()
        if not name.startswith(replaced)
    }
    for layer in sorted(new_layers):
        attention: Any = teacher.body.layers[layer].self_attn
        if initialization == "aligned":
            assert mixer_library is not None
            mixer = mixer_from_library(mixer_library, layer, attention, config.mixer)
        else:
            mixer = mixer_from_attention(attention, config.mixer, initialization, seed * config.num_layers + layer)
        tensors |= {f"body.layers.{layer}.mamba.{name}": tensor for name, tensor in mixer.state_dict().items()}
    return SpeechLM.from_tensors(config, teacher.vocabulary, tensors)
