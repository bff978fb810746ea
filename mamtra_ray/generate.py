"""Free-running generation of speech tokens, batched over the hybrid cache.

Rows that have ended leave the batch (their cache rows are dropped), every row has its own length bounds and
seed, and a row comes out the same alone as in any batch, up to rounding.

Tensor letters: B rows still running, L prompt length, T positions so far, D model width, S speech vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.models.cache import drop_rows
from mamtra_ray.sampling import COSYVOICE2, GREEDY, Sampling, next_tokens, uniform_numbers
from mamtra_ray.teachers.base import SpeechLM

__all__ = ["COSYVOICE2", "GREEDY", "Generated", "Sampling", "generate"]


@dataclass(frozen=True)
class Generated:
    """One utterance: its speech ids, without the stop id, and whether it stopped by itself."""

    tokens: tuple[int, ...]
    stopped: bool


@torch.inference_mode()
def generate(
    model: SpeechLM,
    prompts: Sequence[Tensor],
    length_bounds: Sequence[tuple[int, int]],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> list[Generated]:
    """Continue each prompt until a stop id or its longest length.

    Args:
        model: teacher or student; runs on its device in its dtype.
        prompts: per row, either unified ids (L,) or embeddings (L, D), of any lengths; they are padded left.
            All rows are one batch: split longer lists to bound the memory.
        length_bounds: per row (fewest, most) speech tokens. All stop ids are barred below ``fewest``
            (CosyVoice bars its eos only; its other two stop ids are never trained).
        sampling: how tokens are drawn.
        seeds: per row; its index if None. Only for sampling with a temperature.

    Returns:
        One :class:`Generated` per prompt, in order.

    Raises:
        InputError: counts that do not match, an empty prompt or impossible bounds.
    """
    if len(length_bounds) != len(prompts) or (seeds is not None and len(seeds) != len(prompts)):
        raise InputError(f"{len(prompts)} prompts need as many length bounds and seeds")
    if not prompts:
        return []
    if any(len(prompt) == 0 for prompt in prompts) or any(not 0 <= low <= high for low, high in length_bounds):
        raise InputError("a prompt must not be empty, and its length bounds must be 0 <= fewest <= most")
    device = model.device
    fewest_B, most_B = torch.tensor(length_bounds, device=device).unbind(1)
    longest = int(most_B.max())
    seeds = range(len(prompts)) if seeds is None else seeds
    uniform_BT2 = torch.zeros(len(prompts), longest, 2, dtype=torch.float64)
    if sampling.temperature > 0:
        uniform_BT2 = torch.stack([uniform_numbers(seed, longest) for seed in seeds])
    uniform_BT2 = uniform_BT2.to(device)
    stop_ids = torch.tensor(model.vocabulary.stop_ids, device=device)

    embeds_BLD, mask_BT = _pad_left(model, prompts)
    cache = model.new_cache()
    drawn_BT = torch.full((len(prompts), longest), -1, device=device)
    length_B = most_B.clone()
    stopped_B = torch.zeros_like(most_B, dtype=torch.bool)
    row_B = torch.arange(len(prompts), device=device)
    for step in range(longest):
        running_B = most_B[row_B] > step
        if step > 0:
            running_B &= ~stopped_B[row_B]
        if not running_B.all():
            kept = running_B.nonzero()[:, 0]
            if len(kept) == 0:
                break
            row_B = row_B[kept]
            mask_BT = None if mask_BT is None else mask_BT[kept]
            if step > 0:
                drop_rows(cache, kept)
            else:
                embeds_BLD = embeds_BLD[kept]
        if step > 0:
            embeds_BLD = model.embed(drawn_BT[row_B, step - 1 : step] + model.vocabulary.speech_offset)
            if mask_BT is not None:
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(row_B), 1)], 1)
        hidden_BLD = model.hidden_states(inputs_embeds_BLD=embeds_BLD, attention_mask_BL=mask_BT, past_key_values=cache)
        logits_BS = model.logits(hidden_BLD[:, -1])
        too_short_B = fewest_B[row_B] > step
        logits_BS[:, stop_ids] = logits_BS[:, stop_ids].masked_fill(too_short_B[:, None], -math.inf)
        recent_BW = drawn_BT[row_B, max(0, step - sampling.repetition_window) : step]
        tokens_B = next_tokens(logits_BS, sampling, uniform_BT2[row_B, step], recent_BW)
        drawn_BT[row_B, step] = tokens_B
        stops_B = torch.isin(tokens_B, stop_ids)
        stopped_B[row_B] = stops_B
        length_B[row_B] = torch.where(stops_B, step, length_B[row_B])
    return [
        Generated(tuple(tokens[:length]), stopped)
        for tokens, length, stopped in zip(drawn_BT.tolist(), length_B.tolist(), stopped_B.tolist(), strict=True)
    ]


def _pad_left(model: SpeechLM, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, L, D) with zeros on the left, and their mask (None if all prompts are equally long)."""
    embeds = [(model.embed(p.to(model.device)) if p.dim() == 1 else p.to(model.device, model.dtype)) for p in prompts]
    longest = max(len(embed) for embed in embeds)
    embeds_BLD = torch.stack([torch.nn.functional.pad(embed, (0, 0, longest - len(embed), 0)) for embed in embeds])
    lengths_B = torch.tensor([len(embed) for embed in embeds], device=model.device)
    if int(lengths_B.min()) == longest:
        return embeds_BLD, None
    return embeds_BLD, torch.arange(longest, device=model.device) >= longest - lengths_B[:, None]
