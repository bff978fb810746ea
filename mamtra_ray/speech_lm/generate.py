"""Free-running generation of speech tokens, batched over the hybrid cache.

Rows that have ended leave the batch (their cache rows are dropped; on a GPU, where a step is a captured graph, when
half of them have), every row has its own length bounds and seed, and a row comes out the same alone as in any batch, up
to rounding. How a step is done: :mod:`mamtra_ray.speech_lm.decoding_steps`.

Tensor letters: B rows still running, L prompt length, T positions so far, D model width, S speech vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.decoding_steps import Prefilled, Steps, decoding_steps
from mamtra_ray.speech_lm.sampling import COSYVOICE2, GREEDY, Sampling, next_tokens, uniform_numbers
from mamtra_ray.speech_lm.speech_lm import SpeechLM

__all__ = ["COSYVOICE2", "GREEDY", "Generated", "Prefilled", "Sampling", "decode", "drawn", "generate", "prefill"]


@dataclass(frozen=True)
class Generated:
    """One utterance: its speech ids, without the stop id, and whether it stopped by itself."""

    tokens: tuple[int, ...]
    stopped: bool


def generate(
    model: SpeechLM,
    prompts: Sequence[Tensor],
    length_bounds: Sequence[tuple[int, int]],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    static: bool | None = None,
) -> list[Generated]:
    """Continue each prompt until a stop id or its longest length.

    Args:
        model: teacher or student; runs on its device in its dtype.
        prompts: per row, either unified ids (L,) or embeddings (L, D), of any lengths; they are padded left.
            All rows are one batch: split longer lists to bound the memory.
        length_bounds: per row (fewest, most) speech tokens. All stop ids are barred below ``fewest``
            (CosyVoice bars its eos only; of its other two one is never trained, one only in streams of text).
        sampling: how tokens are drawn.
        seeds: per row; its index if None. Only for sampling with a temperature.
        static: see :func:`~mamtra_ray.speech_lm.decoding_steps.decoding_steps`; None: on a GPU.

    Returns:
        One :class:`Generated` per prompt, in order.

    Raises:
        InputError: counts that do not match, an empty prompt or impossible bounds, or logits that are not finite.
    """
    if len(length_bounds) != len(prompts) or (seeds is not None and len(seeds) != len(prompts)):
        raise InputError(f"{len(prompts)} prompts need as many length bounds and seeds")
    if any(len(prompt) == 0 for prompt in prompts) or any(not 0 <= low <= high for low, high in length_bounds):
        raise InputError("a prompt must not be empty, and its length bounds must be 0 <= fewest <= most")
    if not prompts:
        return []
    return decode(model, prefill(model, prompts), length_bounds, sampling, seeds, static)


@torch.inference_mode()
def prefill(model: SpeechLM, prompts: Sequence[Tensor]) -> Prefilled:
    """Read the prompts (see :func:`generate`) in one forward pass."""
    embeds_BLD, mask_BT = _pad_left(model, prompts)
    cache = model.new_cache()
    hidden_BLD = model.hidden_states(inputs_embeds_BLD=embeds_BLD, attention_mask_BL=mask_BT, past_key_values=cache)
    return Prefilled(cache, mask_BT, model.logits(hidden_BLD[:, -1]))


@torch.inference_mode()
def decode(
    model: SpeechLM,
    start: Prefilled,
    length_bounds: Sequence[tuple[int, int]],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    static: bool | None = None,
) -> list[Generated]:
    """Draw tokens from where :func:`prefill` ended; arguments and result as in :func:`generate`."""
    device = model.device
    most_B = torch.tensor([most for _, most in length_bounds], device=device)
    stop_ids = torch.tensor(model.vocabulary.stop_ids, device=device)
    # Per prompt: what was drawn (-1 where nothing is), how many tokens it is, whether a stop id ended it.
    drawn_BT = torch.full((len(length_bounds), int(most_B.max())), -1, device=device)
    length_B, stopped_B = most_B.clone(), torch.zeros(len(length_bounds), dtype=torch.bool, device=device)
    for step, (row_B, tokens_B) in enumerate(drawn(model, start, length_bounds, sampling, seeds, static)):
        drawn_BT[row_B, step] = tokens_B
        stops_B = torch.isin(tokens_B, stop_ids)
        stopped_B[row_B] = stops_B
        length_B[row_B] = torch.where(stops_B, step, length_B[row_B])
    return [
        Generated(tuple(tokens[:length]), stopped)
        for tokens, length, stopped in zip(drawn_BT.tolist(), length_B.tolist(), stopped_B.tolist(), strict=True)
    ]


@torch.inference_mode()
def drawn(
    model: SpeechLM,
    start: Prefilled,
    length_bounds: Sequence[tuple[int, int]],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    static: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every step of :func:`decode` as soon as it is drawn: which prompts still run, and their tokens, both (B,).

    A stop id is the last token of its prompt. ``start.cache`` grows with every step in its attention layers only.
    """
    device = model.device
    fewest_B, most_B = torch.tensor(length_bounds, device=device).unbind(1)
    count, longest = len(length_bounds), int(most_B.max())
    uniform_BT2 = torch.zeros(count, longest, 2, dtype=torch.float64)
    if sampling.temperature > 0:
        uniform_BT2 = torch.stack([uniform_numbers(seed, longest) for seed in seeds or range(count)])
    uniform_BT2 = uniform_BT2.to(device)
    stop_ids = torch.tensor(model.vocabulary.stop_ids, device=device)
    drawn_BT = torch.full((count, longest), -1, device=device)
    # From here on B counts the rows still running, and row_B says which prompts they are.
    steps = decoding_steps(model, start, longest, static)
    row_B = _keep_running(steps, torch.arange(count, device=device), most_B > 0)
    for step in range(longest if len(row_B) else 0):
        logits_BS = steps.logits()
        _check_finite(logits_BS, row_B, step)
        logits_BS[:, stop_ids] = logits_BS[:, stop_ids].masked_fill((fewest_B[row_B] > step)[:, None], -math.inf)
        recent_BW = drawn_BT[row_B, max(0, step - sampling.repetition_window) : step]
        tokens_B = next_tokens(logits_BS, sampling, uniform_BT2[row_B, step], recent_BW)
        drawn_BT[row_B, step] = tokens_B
        yield row_B, tokens_B
        row_B = _keep_running(steps, row_B, ~torch.isin(tokens_B, stop_ids) & (most_B[row_B] > step + 1))
        if len(row_B) == 0:
            break
        steps.step(drawn_BT[row_B, step] + model.vocabulary.speech_offset)


def _check_finite(logits_BS: Tensor, row_B: Tensor, step: int) -> None:
    """Comparisons with NaN are false, so that sampling would go on and draw nonsense, or an id that does not exist."""
    if not bool(logits_BS.isfinite().all()):
        rows = row_B[~logits_BS.isfinite().all(1)].tolist()
        raise InputError(
            f"the model's logits are not finite (NaN or infinity) at speech token {step} of prompt {rows[0]}:"
            " its weights are damaged, or its activations overflow in this precision"
        )


def _keep_running(steps: Steps, row_B: Tensor, running_B: Tensor) -> Tensor:
    """Drop the rows that have ended from the batch; returns which prompts are left."""
    kept = running_B.nonzero()[:, 0]
    if len(kept) == len(row_B):
        return row_B
    if len(kept):
        steps.keep(kept)
    return row_B[kept]


def _pad_left(model: SpeechLM, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, L, D) with zeros on the left, and their mask (None if all prompts are equally long)."""
    embeds = [(model.embed(p.to(model.device)) if p.dim() == 1 else p.to(model.device, model.dtype)) for p in prompts]
    longest = max(len(embed) for embed in embeds)
    embeds_BLD = torch.stack([torch.nn.functional.pad(embed, (0, 0, longest - len(embed), 0)) for embed in embeds])
    lengths_B = torch.tensor([len(embed) for embed in embeds], device=model.device)
    if int(lengths_B.min()) == longest:
        return embeds_BLD, None
    return embeds_BLD, torch.arange(longest, device=model.device) >= longest - lengths_B[:, None]
