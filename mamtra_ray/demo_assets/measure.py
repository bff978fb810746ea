"""Last stage of the demo build: word error rates of voice, codec and teacher on the test sentences.

All systems say the same sentences to the same recognizer, so differences are paired. The teacher runs
through transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from mamtra_ray.artifacts import content_hash, read_json, write_json
from mamtra_ray.speech.demo_codec import Codec
from mamtra_ray.speech.recognizer import Recognizer
from mamtra_ray.speech.wer import WerResult, bootstrap_interval, paired_difference
from mamtra_ray.speech_lm.sequences import SequenceFormat

CODEC_LIMIT = 0.02
"""The codec's round trip may cost at most this much WER over the voice itself; else no teacher is trained."""
TEACHER_LIMIT = 0.03
"""The teacher may cost at most this much WER over the codec's round trip."""

_CHUNK = 25


def hypotheses(
    texts: Sequence[str], chunks: Iterator[list[np.ndarray]], recognizer: Recognizer, path: Path, label: str
) -> tuple[list[str], float]:
    """What the recognizer hears, kept in `path` chunk by chunk so that a stopped build goes on.

    Args:
        texts: the sentences, only to name the file's content.
        chunks: waveforms, `_CHUNK` sentences at a time.
        recognizer: who listens.
        path: JSON file of the texts heard so far.
        label: what is printed.

    Returns:
        One hypothesis per sentence, and the total seconds of sound.
    """
    identity = content_hash([list(texts), recognizer.name])
    state: dict[str, Any] = {"identity": identity, "heard": [], "seconds": 0.0}
    if path.exists() and (found := read_json(path))["identity"] == identity:
        state = found
    if len(state["heard"]) == len(texts):
        return state["heard"], state["seconds"]
    for index, waveforms in enumerate(chunks):
        if (index + 1) * _CHUNK <= len(state["heard"]):
            continue
        state["heard"] += recognizer.transcribe(waveforms)
        state["seconds"] += sum(map(len, waveforms)) / 16_000
        write_json(path, state)
        print(f"measure {label}: {len(state['heard'])}/{len(texts)} sentences", flush=True)
    return state["heard"], state["seconds"]


def in_chunks(waveforms: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Sound that is there already."""
    for start in range(0, len(waveforms), _CHUNK):
        yield list(waveforms[start : start + _CHUNK])


def decoded_chunks(codec: Codec, tokens: Sequence[Sequence[int] | np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Sound of token sequences, decoded when it is asked for."""
    for start in range(0, len(tokens), _CHUNK):
        yield codec.decode_batch(tokens[start : start + _CHUNK])


@torch.inference_mode()
def speak_with_transformers(
    model: Qwen2ForCausalLM,
    sequence: SequenceFormat,
    text_tokens: Sequence[Sequence[int]],
    sampling: dict[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 50,
) -> list[np.ndarray]:
    """Speech tokens of every text by transformers' `generate`: greedy, or sampled with `sampling`.

    Returns:
        Int64 arrays of speech ids without the end; one that never ended has the model's maximal length.
    """
    vocabulary = sequence.vocabulary
    # transformers annotates its mixin in a way that no model satisfies.
    generate: Any = model.generate  # type: ignore[misc]
    order = sorted(range(len(text_tokens)), key=lambda index: len(text_tokens[index]))
    spoken: list[np.ndarray] = [np.zeros(0, np.int64)] * len(text_tokens)
    torch.manual_seed(seed)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = [sequence.prompt(text_tokens[row]) for row in rows]
        longest = max(map(len, prompts))
        input_ids_BL = torch.full((len(rows), longest), vocabulary.speech_offset + vocabulary.eos_id)
        mask_BL = torch.zeros_like(input_ids_BL)
        for row, prompt in enumerate(prompts):
            input_ids_BL[row, longest - len(prompt) :] = prompt
            mask_BL[row, longest - len(prompt) :] = 1
        settings: dict[str, Any] = {"do_sample": True, **sampling} if sampling else {"do_sample": False}
        output_BL = generate(input_ids=input_ids_BL, attention_mask=mask_BL, **settings)
        for row, ids in zip(rows, output_BL[:, longest:].numpy() - vocabulary.speech_offset, strict=True):
            ends = np.flatnonzero(ids == vocabulary.eos_id)
            spoken[row] = ids[: ends[0]] if len(ends) else ids
    return spoken


def describe(result: WerResult, seconds: float) -> dict[str, Any]:
    """A system's entry of `measured.json`; rates are fractions."""
    low, high = bootstrap_interval(result.errors, result.words)
    return {
        "wer": result.wer,
        "wer_interval_95": [low, high],
        "mean_utterance_wer": result.mean_utterance_wer,
        "cer": result.cer,
        "audio_seconds": round(seconds, 1),
        "errors": result.errors.tolist(),
        "words": result.words.tolist(),
    }


def compare(a: WerResult, b: WerResult, limit: float) -> dict[str, Any]:
    """A gate's entry of `measured.json`: WER of a minus WER of b, paired, and the limit it must keep."""
    difference = paired_difference(a, b).difference
    return {
        "difference": difference.value,
        "interval_95": [difference.low, difference.high],
        "limit": limit,
        "holds": difference.value <= limit,
    }


def table(measured: dict[str, Any]) -> str:
    """The measured rates as a Markdown table, in percent."""
    lines = ["| system | WER % | 95 % interval | CER % | mean of utterances % |", "|---|---|---|---|---|"]
    for name, system in measured["systems"].items():
        low, high = system["wer_interval_95"]
        lines.append(
            f"| {name} | {100 * system['wer']:.2f} | [{100 * low:.2f}, {100 * high:.2f}] "
            f"| {100 * system['cer']:.2f} | {100 * system['mean_utterance_wer']:.2f} |"
        )
    return "\n".join(lines)


def table_of_bands(bands: dict[str, dict[str, Any]]) -> str:
    """The measured rates as a Markdown table, in percent and points."""
    lines = [
        "| band | sentences | system | WER % | 95 % interval | over the codec | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, band in bands.items():
        for system, rates in band["systems"].items():
            low, high = rates["wer_interval_95"]
            line = f"| {name} | {band['sentences']} | {system} | {100 * rates['wer']:.2f} "
            line += f"| [{100 * low:.2f}, {100 * high:.2f}] "
            gate = band["gates"].get(f"{system} - codec")
            if gate:
                low, high = gate["interval_95"]
                line += f"| {100 * gate['difference']:+.2f} | [{100 * low:+.2f}, {100 * high:+.2f}] |"
            else:
                line += "| | |"
            lines.append(line)
    return "\n".join(lines)
