"""VERSA (wavlab-speech/versa) as one more score; what it leaves out silently is an error here.

VERSA logs and goes on when a metric fails to import, an utterance is too short, or a metric raises: its summary then
averages what is left. Every metric asked for must load, and every utterance must come back with the same values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mamtra_ray.errors import InputError


@dataclass(frozen=True)
class VersaSuite:
    """Loaded metrics of VERSA."""

    scorer: Any
    suite: Any
    needs_prompt: bool
    """Some metric compares with a reference recording: the prompt."""
    known: set[str] = field(default_factory=set)
    """Names of all values that came so far; every further utterance must have them too."""

    def score(
        self,
        waveforms: Sequence[np.ndarray],
        sample_rate: int,
        texts: Sequence[str],
        prompts: Sequence[Path | None],
    ) -> list[dict[str, float]]:
        """All numbers VERSA gives for each utterance, under its names: scores, counts, and yes or no as 1 or 0.

        Raises:
            InputError: an utterance or one of its values did not come back, or a needed prompt is missing.
        """
        if not waveforms:
            return []
        if self.needs_prompt and not all(prompts):
            raise InputError("VERSA: a metric of speakers needs a prompt's recording for every utterance")
        from mamtra_ray.speech.demo_codec import write_wav

        names = [f"utterance{index:05d}" for index in range(len(waveforms))]
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder) / f"{name}.wav") for name in names}
            for name, waveform in zip(names, waveforms, strict=True):
                write_wav(files[name], waveform, sample_rate)
            results = self.scorer.score_utterances(
                files,
                self.suite,
                gt_files={name: str(prompt) for name, prompt in zip(names, prompts, strict=True)}
                if self.needs_prompt
                else None,
                text_info=dict(zip(names, texts, strict=True)),
                io="soundfile",
            )
        by_name = {result["key"]: result for result in results}
        if lost := [name for name in names if name not in by_name]:
            raise InputError(f"VERSA left out {len(lost)} of {len(names)} utterances (too short, or all one value)")
        scores = [_numbers(by_name[name]) for name in names]
        self.known.update(*scores)
        if not self.known:
            raise InputError("VERSA gave no number for any utterance; its log says why")
        for index, score in enumerate(scores):
            if gone := sorted(self.known - set(score)):
                raise InputError(f"VERSA gave no {gone[0]} for the sentence {texts[index]!r}; its log says why")
        return scores


def load_versa_suite(path: Path) -> VersaSuite:
    """Load every metric of a VERSA configuration (YAML, a list of mappings with ``name``).

    Raises:
        InputError: VERSA is not installed, the file is no such list, or a metric did not load.
    """
    try:
        wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(wanted, list) or not all(isinstance(entry, dict) and "name" in entry for entry in wanted):
        raise InputError(f"{path} must be a list of VERSA metrics, each with a name")
    try:
        from versa.scorer_shared import VersaScorer
    except ImportError as error:
        raise InputError(
            f"VERSA is not installed ({error}); it is not on PyPI (versa there is something else): "
            "pip install git+https://github.com/wavlab-speech/versa"
        ) from None

    scorer = VersaScorer()
    metadata = {entry["name"]: scorer.registry.get_metadata(entry["name"]) for entry in wanted}
    if unknown := sorted(name for name, found in metadata.items() if found is None):
        raise InputError(f"{path}: VERSA has no metric {unknown[0]!r}")
    needs_prompt = any(found.requires_reference for found in metadata.values())
    from mamtra_ray.runtime.device import device_of_this_process

    suite = scorer.load_metrics(
        wanted, use_gt=needs_prompt, use_gt_text=True, use_gpu=device_of_this_process().type == "cuda"
    )
    if missing := sorted(set(metadata) - set(suite.metrics)):
        raise InputError(
            f"{path}: VERSA did not load {', '.join(missing)}; its log says which package or file it lacks"
        )
    return VersaSuite(scorer, suite, needs_prompt)


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    found = {name: _number(value) for name, value in result.items()}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """Counts are numbers, and so is yes or no: 1 or 0, whose mean is a share. Texts, labels and lists have no mean."""
    if isinstance(value, int | float):  # bool is an int
        return float(value)
    if not hasattr(value, "item"):
        return None
    try:
        single = value.item()  # of an array or a tensor
    except (ValueError, RuntimeError):  # more than one element
        return None
    return float(single) if isinstance(single, int | float) else None
