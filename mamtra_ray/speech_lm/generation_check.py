"""Does a model say what it computes? Generation against plain forward passes, on the run's own model.

Generation takes other ways through a model than training and validation do: prompts padded on the left, a cache, one
position at a time, rows that leave the batch. Where one of them is broken (another library changed, a kernel, a bug of
ours), a student has its teacher's cross-entropy and speaks garbage, and nothing else notices. So every search,
evaluation and export compares, on short random sequences and in about a second, before anything long is computed.

Logits are compared, not tokens: tokens may flip where two scores nearly tie.

Tensor letters: B batch, L prompt length, K speech tokens that are fed one by one, S speech vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.runtime.environment import US, versions
from mamtra_ray.speech_lm.generate import generate, prefill
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.speech_lm.speech_lm import SpeechLM

STEPS = 3
"""Speech tokens fed one by one: with the prompt's last one, as many as the mixer's convolution sees at once."""
_TEXT_AND_PROMPT_SPEECH = ((24, 10), (6, 2), (3, 0))
"""Tokens of the three examples. The first is longer than a chunk of the state-space scan (32)."""


class GenerationCheckError(InputError):
    """This installation, or this model, does not generate what it computes."""


class NonFiniteLogitsError(InputError):
    """A model whose logits are not numbers: diverged, damaged, or too large for its dtype."""


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits of the same positions lie apart."""

    where: str
    relative: float
    """Root mean square of the difference over that of the logits around their mean (softmax ignores the mean)."""
    largest: float
    """Of any logit."""


@dataclass(frozen=True)
class _Example:
    """Unified ids of a prompt (L,) and speech ids (K,) that follow it, the first of which ``generate`` has drawn."""

    prompt: Tensor
    speech: Tensor
    num_drawn: int


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative difference that rounding explains.

    Measured on a CPU with the demo's teacher and hybrids, and with 24 random layers: 8e-6 at most in float32, 6e-3 in
    float16 and 8e-3 in bfloat16, while hybrids that lose their Mamba states while decoding are off by 0.3 to 1.2. The
    bounds lie between, with room for deeper models. On CUDA convolutions and Triton kernels may round float32 to
    TF32's ten bits of mantissa, which are float16's.
    """
    if dtype == torch.float32 and device.type == "cuda":
        dtype = torch.float16
    return {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}[dtype]


@torch.inference_mode()
def check_generation(model: SpeechLM, sequence: SequenceFormat, name: str) -> Difference:
    """Compare generation with one full forward pass of each sequence alone, on the model's device, in its dtype.

    Checked are: a prompt in one pass and then single steps from the cache; the same for a batch of two prompts padded
    on the left, of which one leaves halfway; and that greedy ``generate`` draws tokens of the highest score.

    Args:
        model: teacher or student.
        sequence: how its prompts look.
        name: of the model, for errors.

    Returns:
        The largest difference found, which is rounding.

    Raises:
        GenerationCheckError: generation computes something else.
        NonFiniteLogitsError: the model's logits are not finite.
    """
    try:
        examples = _examples(model, sequence)
        expected_1KS = [_full_pass(model, example) for example in examples]
    except NonFiniteLogitsError as error:
        raise NonFiniteLogitsError(f"{name} ({_described(model)}): {error}") from None
    differences = [
        compared(logits_BS, torch.stack([expected_1KS[row][step] for row in rows]), f"{what}, step {step}")
        for what, rows in {"decoding from the cache": (0,), "a batch padded on the left": (1, 2)}.items()
        for step, rows, logits_BS in _cached(model, examples, rows)
    ]
    differences += [
        _greedy_difference(model, example, logits_KS) for example, logits_KS in zip(examples, expected_1KS, strict=True)
    ]
    worst = max(differences, key=lambda difference: difference.relative)
    if worst.relative > tolerance(model.dtype, model.device):
        # The first one says more about the cause than the largest.
        bound = tolerance(model.dtype, model.device)
        first = next(difference for difference in differences if difference.relative > bound)
        raise GenerationCheckError(
            f"{name} ({_described(model)}) does not generate what it computes: {first.where}, logits differ from a "
            f"full forward pass by up to {first.largest:.3g}, {first.relative:.1%} of their spread (at the worst place "
            f"{worst.relative:.1%}; rounding explains {bound:.2%}), so its output would be wrong; found with "
            f"{versions_text()}; install the versions this project was tested with (README: make search), or report it"
        )
    return worst


@torch.no_grad()
def disturb(parameters: Iterable[Tensor]) -> None:
    """Add noise to convolutions, biases and what else is no matrix, in place."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        if parameter.dim() != 2:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def library_versions() -> dict[str, str]:
    """Versions of what a model's logits depend on; only of what is installed."""
    return versions((US, "torch", "transformers", "mamba-ssm"))


def versions_text() -> str:
    """:func:`library_versions` for a sentence."""
    return ", ".join(f"{name} {version}" for name, version in library_versions().items())


def random_example(sequence: SequenceFormat, num_text: int, num_prompt_speech: int, seed: int) -> Tensor:
    """Unified ids (L,) of a prompt with random text and prompt speech; of a model of text alone: of as many tokens."""
    vocabulary = sequence.vocabulary
    generator = torch.Generator().manual_seed(seed)
    if not vocabulary.text_size:
        num_text, num_prompt_speech = 0, num_text + num_prompt_speech
    text = torch.randint(max(vocabulary.text_size, 1), (num_text,), generator=generator).tolist()
    speech = torch.randint(vocabulary.speech_size, (num_prompt_speech,), generator=generator).tolist()
    return sequence.prompt(text, (), speech)


def compared(found_BS: Tensor, expected_BS: Tensor, where: str) -> Difference:
    """The difference of two sets of logits, each position against the spread of its own."""
    found_BS, expected_BS = _centered(found_BS), _centered(expected_BS)
    difference_BS = found_BS - expected_BS
    largest = float(difference_BS.abs().max())
    if not math.isfinite(largest):
        return Difference(where, math.inf, math.inf)
    ratios = [
        _ratio(difference, spread)
        for difference, spread in zip(
            _root_mean_square(difference_BS).tolist(), _root_mean_square(expected_BS).tolist(), strict=True
        )
    ]
    return Difference(where, max(ratios), largest)


def _examples(model: SpeechLM, sequence: SequenceFormat) -> list[_Example]:
    """The first one goes on with random speech, the others with what ``generate`` says, as one batch."""
    prompts, speeches = [], []
    for seed, (num_text, num_prompt_speech) in enumerate(_TEXT_AND_PROMPT_SPEECH):
        prompts.append(random_example(sequence, num_text, num_prompt_speech, seed).to(model.device))
        generator = torch.Generator().manual_seed(seed)
        random_K = torch.randint(sequence.vocabulary.speech_size, (STEPS,), generator=generator)
        speeches.append(random_K.to(model.device))
    # Of different lengths, so that a row leaves the batch.
    drawn = (0, STEPS, STEPS - 1)
    try:
        spoken = generate(model, prompts[1:], [(length, length) for length in drawn[1:]])
    except InputError as error:
        raise NonFiniteLogitsError(str(error)) from None
    for speech_K, said in zip(speeches[1:], spoken, strict=True):
        speech_K[: len(said.tokens)] = torch.tensor(said.tokens, device=model.device)
    return [_Example(*fields) for fields in zip(prompts, speeches, drawn, strict=True)]


def _full_pass(model: SpeechLM, example: _Example) -> Tensor:
    """Logits (K + 1, S) after the prompt and after each speech token: alone, unpadded, without a cache."""
    ids_L = torch.cat([example.prompt, example.speech + model.vocabulary.speech_offset])
    hidden_1LD = model.hidden_states(input_ids_BL=ids_L[None])
    logits_KS = model.logits(hidden_1LD[0, len(example.prompt) - 1 :])
    if not bool(logits_KS.isfinite().all()):
        raise NonFiniteLogitsError("the model's logits are not finite (NaN or infinity): is it damaged, or diverged?")
    return logits_KS


def _cached(
    model: SpeechLM, examples: Sequence[_Example], rows: Sequence[int]
) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
    """Step, its rows and their logits (B, S), by the calls that :func:`~mamtra_ray.speech_lm.generate.decode` makes."""
    rows = tuple(rows)
    start = prefill(model, [examples[row].prompt for row in rows])
    yield 0, rows, start.logits_BS
    for step in range(STEPS):
        if step == STEPS // 2 and len(rows) > 1:
            rows, kept = rows[1:], torch.arange(1, len(rows), device=model.device)
            start.cache.keep_rows(kept)
            start.mask_BT = None if start.mask_BT is None else start.mask_BT[kept]
        if start.mask_BT is not None:
            start.mask_BT = torch.cat([start.mask_BT, start.mask_BT.new_ones(len(rows), 1)], 1)
        tokens_B1 = torch.stack([examples[row].speech[step : step + 1] for row in rows])
        hidden_B1D = model.hidden_states(
            inputs_embeds_BLD=model.embed(tokens_B1 + model.vocabulary.speech_offset),
            attention_mask_BL=start.mask_BT,
            past_key_values=start.cache,
        )
        yield step + 1, rows, model.logits(hidden_B1D[:, 0])


def _greedy_difference(model: SpeechLM, example: _Example, logits_KS: Tensor) -> Difference:
    """By how much the tokens that ``generate`` drew miss the highest score of a full forward pass.

    Half the miss is one logit's error: a tie of two scores that are both off by it.
    """
    tokens_K = example.speech[: example.num_drawn]
    scores_KS = logits_KS[: example.num_drawn].double()
    spread_K = _root_mean_square(_centered(scores_KS))
    scores_KS[:, list(model.vocabulary.stop_ids)] = -math.inf
    miss_K = (scores_KS.amax(-1) - scores_KS.gather(-1, tokens_K[:, None])[:, 0]) / 2
    worst = Difference("greedy generation", 0.0, 0.0)
    for step, (miss, spread) in enumerate(zip(miss_K.tolist(), spread_K.tolist(), strict=True)):
        if _ratio(miss, spread) > worst.relative:
            worst = Difference(f"greedy generation, token {step}", _ratio(miss, spread), miss)
    return worst


def _centered(logits_BS: Tensor) -> Tensor:
    logits_BS = logits_BS.double()
    return logits_BS - logits_BS.mean(-1, keepdim=True)


def _root_mean_square(x_BS: Tensor) -> Tensor:
    return x_BS.square().mean(-1).sqrt()


def _ratio(difference: float, spread: float) -> float:
    return difference / spread if spread else math.inf if difference else 0.0


def _described(model: SpeechLM) -> str:
    return f"layout {model.layout}, {str(model.dtype).removeprefix('torch.')} on {model.device.type}"
