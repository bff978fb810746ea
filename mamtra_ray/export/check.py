"""Does an exported checkpoint compute and say in plain transformers what our own model does?

Run on the files themselves, before they take the place of an older export. Both models are compared in float32, so
that the comparison sees the weights and not the rounding of a half-precision dtype.

Tensor letters: L prompt length, K speech tokens, S speech vocabulary, V unified vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.speech_lm.generation_check import compared, library_versions, random_example, tolerance, versions_text
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.speech_lm.speech_lm import SpeechLM

_TEXT_AND_PROMPT_SPEECH = (12, 4)
_NUM_TOKENS = 24
"""Spoken greedily; with the prompt longer than a chunk of the state-space scan (32)."""


class ExportCheckError(InputError):
    """Plain transformers does not compute what our own model does from the same weights."""


@dataclass(frozen=True)
class ExportCheck:
    """What a passed check found, for the checkpoint's card."""

    largest_difference: float
    """Of any speech logit, head bias included."""
    relative_difference: float
    """See :class:`~mamtra_ray.speech_lm.generation_check.Difference`."""
    versions: dict[str, str]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and advice of transformers on our screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@quiet_transformers()
@torch.inference_mode()
def check_export(folder: Path, student: SpeechLM, sequence: SequenceFormat) -> ExportCheck:
    """Load ``folder`` with ``AutoModelForCausalLM`` and compare logits and a greedy continuation.

    Args:
        folder: what :func:`~mamtra_ray.models.granite.write_granite` wrote.
        student: what it was written from, on the CPU; becomes float32.
        sequence: how prompts look.

    Raises:
        ExportCheckError: tensors without a place, logits further apart than rounding explains, another token where
            our scores leave no doubt, or other stop ids.
    """
    student = student.float().eval()
    model = _plain_model(folder)
    _check_generation_config(model, student)
    prompt_L, tokens_K = greedy_example(student, sequence)
    offset = student.vocabulary.speech_offset
    ids_L = torch.cat([prompt_L, tokens_K + offset])
    ours_KS = student.logits(student.hidden_states(input_ids_BL=ids_L[None])[0])
    theirs_KS = model(ids_L[None]).logits[0, :, offset : offset + student.vocabulary.speech_size]
    theirs_KS = theirs_KS + _token_bias(model, student.vocabulary.size)[offset : offset + theirs_KS.shape[-1]]
    difference = compared(theirs_KS, ours_KS, "logits")
    if not difference.relative <= tolerance(torch.float32, torch.device("cpu")):
        raise ExportCheckError(
            f"{folder} computes other logits in plain transformers, by up to {difference.largest:.3g}"
            f" ({difference.relative:.1%} of their spread), so it was not exported; found with {versions_text()}"
        )
    length = {"min_new_tokens": len(tokens_K), "max_new_tokens": len(tokens_K)}
    theirs_K = model.generate(prompt_L[None], do_sample=False, **length)[0, len(prompt_L) :] - offset
    bound = tolerance(torch.float32, torch.device("cpu"))
    scores_KS = ours_KS[len(prompt_L) - 1 : -1]
    check_tokens(f"{folder} in plain transformers", theirs_K, tokens_K, scores_KS, bound, versions_text())
    return ExportCheck(difference.largest, difference.relative, library_versions())


def _plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    wrong = {name: sorted(map(str, tensors)) for name, tensors in report.items() if tensors}
    if wrong:
        name, tensors = next(iter(wrong.items()))
        raise ExportCheckError(
            f"{folder} does not fit plain transformers ({name.replace('_', ' ')}: {', '.join(tensors[:3])}), so it was"
            f" not exported; found with {versions_text()}"
        )
    return model.eval()


def _check_generation_config(model: Any, student: SpeechLM) -> None:
    expected = {student.vocabulary.speech_offset + stop_id for stop_id in student.vocabulary.stop_ids}
    found = model.generation_config.eos_token_id
    if set(found if isinstance(found, list) else [found]) != expected:
        raise ExportCheckError(f"plain transformers stops at the ids {found}, our model at {sorted(expected)}")


def _token_bias(model: Any, vocabulary_size: int) -> Tensor:
    """What ``generate`` adds to the scores (V,): the head's bias, which the generation config keeps."""
    bias_V = torch.zeros(vocabulary_size)
    for (token,), bias in model.generation_config.sequence_bias or []:
        bias_V[token] = bias
    return bias_V


def greedy_example(student: SpeechLM, sequence: SequenceFormat) -> tuple[Tensor, Tensor]:
    """Unified ids (L,) of a random prompt, and the speech tokens (K,) with which the student goes on."""
    prompt_L = random_example(sequence, *_TEXT_AND_PROMPT_SPEECH, seed=0)
    (spoken,) = generate(student, [prompt_L], [(_NUM_TOKENS, _NUM_TOKENS)])
    return prompt_L, torch.tensor(spoken.tokens)


def check_tokens(where: str, theirs_K: Tensor, ours_K: Tensor, scores_KS: Tensor, bound: float, versions: str) -> None:
    """Compare up to the first token that differs; it may do so where our two scores nearly tie.

    Args:
        where: the file and what ran it, for the error.
        theirs_K: what it said, speech ids.
        ours_K: what our ``generate`` drew.
        scores_KS: our scores of each of them.
        bound: relative difference of logits that rounding explains.
        versions: of what was run, for the error.

    Raises:
        ExportCheckError: another token where our scores leave no doubt.
    """
    different = (theirs_K != ours_K).nonzero()
    if not len(different):
        return
    step = int(different[0])
    found, ours = int(theirs_K[step]), int(ours_K[step])
    margin = float("inf")
    if 0 <= found < scores_KS.shape[-1]:
        margin = abs(float(scores_KS[step, ours] - scores_KS[step, found]))
    if margin > 2 * bound * float(scores_KS[step].std()):
        raise ExportCheckError(
            f"{where} says token {found} where our model says {ours} (token {step} of a greedy continuation, margin"
            f" {margin:.3g}), so it was not exported; found with {versions}"
        )
