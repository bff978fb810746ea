"""The hybrid decoder: a Qwen2, Qwen3 or Llama decoder in which any attention may be a Mamba mixer.

    hidden  = embed_tokens(ids)
    hidden += mixer(RMSNorm(hidden))      mixer: attention where the layout says A, Mamba-2 where it says M
    hidden += mlp(RMSNorm(hidden))        for every layer
    output  = RMSNorm(hidden)

Tensor names are those of Hugging Face's classes below ``model.``, so their checkpoints load as they are; a
Mamba layer has ``mamba.*`` (names of mamba-ssm) in place of ``self_attn.*``. With attention everywhere it computes what
transformers' classes compute, bit for bit on one CPU; the tests compare. Letters: see :mod:`mamtra_ray.models`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamtra_ray.models.attention import Attention
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.linear import Embedding, Linear
from mamtra_ray.models.mamba import MambaMixer
from mamtra_ray.models.norm import RMSNorm
from mamtra_ray.models.pass_inputs import PassInputs, pass_inputs
from mamtra_ray.models.static_cache import StaticCache


class MLP(nn.Module):
    """The SwiGLU network of a layer: down(silu(gate(x)) * up(x)), D -> I -> D."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BLD)) * self.up_proj(hidden_BLD))


class DecoderLayer(nn.Module):
    """Mixer (``self_attn`` or ``mamba``; the other one is None), then MLP, each beside a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        is_mamba = layer in config.layout.mamba_layers
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = None if is_mamba else Attention(config, layer)
        self.mamba = MambaMixer(config.mixer) if is_mamba else None
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BLD: Tensor, inputs: PassInputs) -> Tensor:
        """[B, L, D] -> [B, L, D]; what the layer must remember goes into ``inputs.cache``."""
        hidden_BLD = hidden_BLD + self._mix(self.input_layernorm(hidden_BLD), inputs)
        return hidden_BLD + self.mlp(self.post_attention_layernorm(hidden_BLD))

    def _mix(self, normed_BLD: Tensor, inputs: PassInputs) -> Tensor:
        if self.self_attn is not None:
            return self.self_attn(normed_BLD, inputs)
        assert self.mamba is not None
        if inputs.cache is None:
            return self.mamba(normed_BLD, inputs.real_BL)
        state = inputs.cache.state(self.layer)
        in_place = inputs.cache.in_place
        mixed_BLD, state = self.mamba(normed_BLD, inputs.real_BL, state, return_state=True, in_place=in_place)
        inputs.cache.set_state(self.layer, state)
        return mixed_BLD


class Decoder(nn.Module):
    """Embedding table, layers and last norm, without a head.

    Parameters are made on the ``meta`` device: load them with ``load_state_dict(assign=True)``. Nothing is allocated or
    drawn, so building costs milliseconds, and tensors may be shared between decoders.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = config.rope
        self.activation_checkpointing = False
        """Whether a pass with gradients keeps the input of every layer only and computes the layer again backward."""
        with torch.device("meta"):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def inputs(
        self, embeds_BLD: Tensor, mask_BT: Tensor | None = None, cache: DecoderCache | StaticCache | None = None
    ) -> PassInputs:
        """What the layers of one pass are given; see :func:`~mamtra_ray.models.pass_inputs.pass_inputs`."""
        return pass_inputs(self.rope, embeds_BLD, mask_BT, cache)

    def forward(
        self,
        embeds_BLD: Tensor,
        mask_BT: Tensor | None = None,
        cache: DecoderCache | StaticCache | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, L, D].

        Args:
            embeds_BLD: embeddings of the new positions.
            mask_BT: true for real tokens, over *all* positions so far (past and new), on either side of a row. None
                if nothing is padded. Rows padded right need no mask where only real positions are read and no cache is
                kept (training): every layer is causal, and attention then runs its faster unmasked kernel.
            cache: the past, updated in place.
            outputs: every layer's output [B, L, D] (before the last norm) is appended to it.

        Raises:
            ValueError: the mask's length is not that of past and new positions.
        """
        inputs = self.inputs(embeds_BLD, mask_BT, cache)
        hidden_BLD = embeds_BLD
        is_checkpointed = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for layer in self.layers:
            if is_checkpointed:
                # No layer draws random numbers, so their state need not be kept.
                hidden_BLD = checkpoint(layer, hidden_BLD, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_BLD = layer(hidden_BLD, inputs)
            if outputs is not None:
                outputs.append(hidden_BLD)
        if cache is not None:
            cache.advance(embeds_BLD.shape[1])
        return self.norm(hidden_BLD)

    @property
    def mixers(self) -> dict[int, MambaMixer]:
        """The Mamba mixers by 0-based layer."""
        mixers = {index: cast(DecoderLayer, layer).mamba for index, layer in enumerate(self.layers)}
        return {index: mixer for index, mixer in mixers.items() if mixer is not None}
