"""Mamba mixers from attention weights (paper, section 2.3) and the random starts of its Fig. 6.

Eqs. 2 to 4: without softmax, attention's K V^T update is the SSM's B x^T update and its query reads the state
as C does. So the projections carry over, C <- Q, B <- K, x <- V, out_proj <- o_proj, and what attention has
no counterpart for starts as in Mamba-2: the gate z, the time step dt, A, D and the gated norm. RoPE and the
1/sqrt(d) scale are dropped (the gated norm is scale-free), and so are Qwen3's norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.models.mamba import MambaMixer, MixerConfig

INITIALIZATIONS = ("transfer", "xavier", "kaiming", "aligned")


class Attention(Protocol):
    """The projections of an attention layer, as transformers names them."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


@torch.no_grad()
def mixer_from_attention(
    attention: Attention, config: MixerConfig, initialization: str = "transfer", seed: int = 0
) -> MambaMixer:
    """A new mixer of the attention's device and dtype; the attention is not changed.

    - ``transfer``: the paper's. The projections' biases (Qwen2 has them on q, k and v, Mamba's in_proj has
      none) go into ``conv1d.bias`` behind an identity convolution (last tap 1, the others 0), which equals a
      projection bias exactly and, unlike one, does not leak from left padding.
    - ``xavier`` / ``kaiming``: in_proj and out_proj drawn from ``xavier_uniform_`` / ``kaiming_uniform_``
      (``nonlinearity="linear"``), nothing taken from the attention; the baselines of Fig. 6. Every other part of
      the layer keeps the teacher's weights. The paper does not say whether its baselines redraw those too.

    Args:
        attention: module with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
        config: the mixer's shape, which must fit the attention's.
        initialization: ``transfer``, ``xavier`` or ``kaiming``.
        seed: of the random parts; equal seeds give equal mixers on every device.
    """
    if initialization not in ("transfer", "xavier", "kaiming"):
        raise InputError(f"unknown initialization {initialization!r}: {nearest_name(initialization, INITIALIZATIONS)}")
    weight = attention.q_proj.weight
    # Drawn in float32 on the CPU, so that a seed means the same weights everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = MambaMixer(config)
        if initialization == "xavier":
            nn.init.xavier_uniform_(mixer.in_proj.weight)
            nn.init.xavier_uniform_(mixer.out_proj.weight)
        elif initialization == "kaiming":
            nn.init.kaiming_uniform_(mixer.in_proj.weight, nonlinearity="linear")
            nn.init.kaiming_uniform_(mixer.out_proj.weight, nonlinearity="linear")
    if initialization == "transfer":
        _copy_projections(attention, mixer)
    return mixer.to(weight.device, weight.dtype)


def _copy_projections(attention: Attention, mixer: MambaMixer) -> None:
    rows, channels = mixer.config.in_proj_slices(), mixer.config.conv_slices()
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[..., -1] = 1
    conv_bias = torch.zeros(mixer.config.conv_channels)
    for name, projection in (("x", attention.v_proj), ("B", attention.k_proj), ("C", attention.q_proj)):
        mixer.in_proj.weight[rows[name]] = projection.weight.to("cpu", torch.float32)
        if projection.bias is not None:
            conv_bias[channels[name]] = projection.bias.to("cpu", torch.float32)
    assert mixer.conv1d.bias is not None
    mixer.conv1d.bias.copy_(conv_bias)
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    if mixer.out_proj.bias is not None and attention.o_proj.bias is not None:
        mixer.out_proj.bias.copy_(attention.o_proj.bias)


@torch.no_grad()
def mixer_from_library(
    library: Mapping[int, Mapping[str, Tensor]], layer: int, attention: Attention, config: MixerConfig
) -> MambaMixer:
    """The aligned mixer of ``layer``, on the attention's device and dtype.

    Raises:
        InputError: the library has no such layer, or its tensors are those of another shape of mixer.
    """
    if layer not in library:
        raise InputError(f"the mixer library has no layer {layer}: it holds {sorted(library)}")
    weight = attention.q_proj.weight
    with torch.device("meta"):
        mixer = MambaMixer(config)
    expected = {name: tensor.shape for name, tensor in mixer.state_dict().items()}
    found = {name: tensor.shape for name, tensor in library[layer].items()}
    if found != expected:
        name = next(name for name in [*expected, *found] if expected.get(name) != found.get(name))
        raise InputError(
            f"the mixer library's layer {layer} does not fit: {name} is"
            f" {tuple(found.get(name, ())) or 'missing'}, expected {tuple(expected.get(name, ())) or 'no such tensor'}"
        )
    copies = {name: tensor.to(weight.device, weight.dtype, copy=True) for name, tensor in library[layer].items()}
    mixer.load_state_dict(copies, assign=True)
    return mixer
