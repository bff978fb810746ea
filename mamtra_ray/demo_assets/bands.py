"""Error rates by the length of the sentence: each band of lengths is heard, compared and printed on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.artifacts import content_hash
from mamtra_ray.demo_assets.build import Example
from mamtra_ray.demo_assets.clauses import BANDS
from mamtra_ray.demo_assets.measure import TEACHER_LIMIT, compare, describe
from mamtra_ray.demo_assets.stages import listen_to
from mamtra_ray.speech.recognizer import Recognizer
from mamtra_ray.teachers.demo_grammar import detokenize_text

Speak = Callable[[list[Example]], Iterator[list[np.ndarray]]]
"""Sentences -> their sound, some sentences at a time, made when it is asked for."""


@dataclass(frozen=True)
class Band:
    """Test sentences of about one length."""

    name: str
    """Such as `10-19 words`."""
    examples: list[Example]

    @property
    def texts(self) -> list[str]:
        """The sentences."""
        return [detokenize_text(example.text_tokens) for example in self.examples]


def bands_of(examples: list[Example], count: int) -> list[Band]:
    """The first `count` sentences of every band that has some, from the shortest."""
    bands = []
    for words in BANDS:
        found = [example for example in examples if len(example.text_tokens) in words]
        if found:
            bands.append(Band(f"{words.start}-{words.stop - 1} words", found[:count]))
    return bands


def measure_bands(
    bands: list[Band], systems: Mapping[str, tuple[Speak, Any]], recognizer: Recognizer, work: Path
) -> dict[str, dict[str, Any]]:
    """Error rates of every system in every band, and what each costs over the codec's round trip.

    Args:
        bands: what is said.
        systems: per name its sound and what identifies it; `codec` is the one that others are compared with.
        recognizer: who listens.
        work: keeps what was heard, so that a stopped build goes on.

    Returns:
        Per band `sentences`, `systems` and `gates`, as in `measured.json`.
    """
    measured = {}
    for band in bands:
        results = {}
        for system, (speak, identity) in systems.items():
            path = work / f"heard-{content_hash([system, band.texts, identity])}.json"
            chunks = speak(band.examples)
            results[system] = listen_to(band.texts, chunks, recognizer, path, f"{system}, {band.name}")
        measured[band.name] = {
            "sentences": len(band.examples),
            "systems": {system: describe(result, seconds) for system, (result, seconds) in results.items()},
            "gates": {
                f"{system} - codec": compare(result, results["codec"][0], TEACHER_LIMIT)
                for system, (result, _) in results.items()
                if system != "codec"
            },
        }
    return measured
