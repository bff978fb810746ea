"""Decoder layers that stay in the machine's memory and come to the device one at a time (``teacher.cpu_offload``).

For forward passes of a teacher larger than a card. Nothing is divided, so any number of processes may do it, each for
itself. A layer travels once for every pass; with thousands of tokens at once its arithmetic takes longer than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student


def with_layers_on_cpu(model: SpeechLM, device: torch.device) -> SpeechLM:
    """A model of the same tensors whose decoder layers stay on the CPU; embeddings, last norm and head are on
    ``device``. ``model`` itself is not changed."""
    same = make_student(model, model.layout, state_sharing=model.config.state_sharing, share_weights=True)
    layers = same.body.layers
    same.body.layers = nn.ModuleList()  # so that they are not moved
    same.to(device)
    same.body.layers = layers
    bring_when_needed(layers, device)
    return same


def bring_when_needed(layers: Iterable[nn.Module], device: torch.device) -> None:
    """From now on each of ``layers`` has its tensors on ``device`` while it computes forward, and there alone.

    Args:
        layers: on the CPU; they may share tensors.
        device: of their inputs. On the CPU itself layers compute with copies.
    """
    page_locked: dict[int, Tensor] = {}

    def kept(tensor: Tensor) -> Tensor:
        # Only from page-locked memory does a copy run while the layer before computes.
        if device.type != "cuda" or tensor.is_pinned():
            return tensor
        if tensor.data_ptr() not in page_locked:
            page_locked[tensor.data_ptr()] = tensor.pin_memory()
        return page_locked[tensor.data_ptr()]

    for layer in layers:
        tensors = [*layer.parameters(), *layer.buffers()]
        for tensor in tensors:
            tensor.data = kept(tensor.data)  # for whoever shares it later
        _hook(layer, tensors, [tensor.data for tensor in tensors], device)


def _hook(layer: nn.Module, tensors: list[Any], kept: list[Tensor], device: torch.device) -> None:
    def bring(_module: nn.Module, _args: Any) -> None:
        # What is made in inference mode cannot become a parameter's data.
        with torch.inference_mode(False):
            for tensor, of_cpu in zip(tensors, kept, strict=True):
                tensor.data = of_cpu.to(device, non_blocking=True, copy=True)

    def let_go(_module: nn.Module, _args: Any, _output: Any) -> None:
        for tensor, of_cpu in zip(tensors, kept, strict=True):
            tensor.data = of_cpu

    layer.register_forward_pre_hook(bring)
    # Also after an error, which a smaller batch may follow.
    layer.register_forward_hook(let_go, always_call=True)
