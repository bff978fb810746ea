"""What all layers of one forward pass share beside the hidden states: angles, masks, the past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.rope import Rope
from mamtra_ray.models.static_cache import StaticCache


@dataclass(frozen=True)
class PassInputs:
    """Made by :func:`pass_inputs`.

    Attributes:
        cos_BLP: of the angles of the new positions (B may be 1), in the type of the hidden states.
        sin_BLP: likewise.
        is_causal: no cached past and no padding: attention may use its fastest kernel.
        seen_B1LT: true where a new position sees a position, if that is neither all nor ``is_causal``.
        real_BL: true for new positions that are no padding; None if all are.
        cache: the past of every layer, updated in place.
    """

    cos_BLP: Tensor
    sin_BLP: Tensor
    is_causal: bool
    seen_B1LT: Tensor | None = None
    real_BL: Tensor | None = None
    cache: DecoderCache | StaticCache | None = None


def pass_inputs(
    rope: Rope, embeds_BLD: Tensor, mask_BT: Tensor | None = None, cache: DecoderCache | StaticCache | None = None
) -> PassInputs:
    """Positions and masks of one pass. Padded rows count their positions from their first real token.

    Args:
        rope: rotary embeddings of the model.
        embeds_BLD: embeddings of the new positions.
        mask_BT: true for real tokens, over past and new positions; None if nothing is padded, or the cache is static.
        cache: the past.

    Raises:
        ValueError: the mask does not cover past and new positions of this batch.
    """
    if isinstance(cache, StaticCache):
        if mask_BT is not None or embeds_BLD.shape[1] != 1:
            raise ValueError("a static cache takes one position at a time and has a mask of its own")
        return PassInputs(*cache.cos_sin(), is_causal=False, seen_B1LT=cache.seen(), cache=cache)
    batch, length, device = embeds_BLD.shape[0], embeds_BLD.shape[1], embeds_BLD.device
    past = 0 if cache is None else cache.length
    if mask_BT is not None:
        if tuple(mask_BT.shape) != (batch, past + length):
            raise ValueError(
                f"the attention mask covers {tuple(mask_BT.shape)} (rows, positions), but there are {batch} rows"
                f" with {past} past and {length} new ones"
            )
        mask_BT = mask_BT.bool()
        if bool(mask_BT.all()):
            mask_BT = None
    position_L = torch.arange(past, past + length, device=device)
    seen_B1LT = real_BL = None
    if mask_BT is None:
        position_BL = position_L[None]
        if past and length > 1:
            seen_B1LT = (torch.arange(past + length, device=device) <= position_L[:, None])[None, None]
    else:
        position_BL = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, past:]
        real_BL = mask_BT[:, past:]
        if bool(real_BL.all()):
            real_BL = None  # padding in the past only: decoding after prompts padded left
        key_T = torch.arange(past + length, device=device)
        seen_LT = key_T <= position_L[:, None]
        # A padded position sees itself: a softmax over nothing would be NaN.
        seen_B1LT = ((seen_LT & mask_BT[:, None]) | (key_T == position_L[:, None]))[:, None]
    cos_BLP, sin_BLP = rope.cos_sin(position_BL, embeds_BLD.dtype)
    is_causal = seen_B1LT is None and length > 1
    return PassInputs(cos_BLP, sin_BLP, is_causal, seen_B1LT, real_BL, cache)
