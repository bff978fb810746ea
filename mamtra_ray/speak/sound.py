"""Where the sound goes: a WAV file that grows while a model speaks, or standard output."""

from __future__ import annotations

import re
import struct
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.speech.demo_codec import pcm

PAUSE_SECONDS = 0.3
"""Between two sentences."""
_LONGEST_NAME = 40
_UNKNOWN = 0xFFFFFFFF
"""The size in the header of a WAV stream whose end is not known yet, as sox and ffmpeg write it."""


class SilentError(InputError):
    """A model that did not make a single sound."""


def with_pauses(sentences: Iterable[Iterable[np.ndarray]], sample_rate: int) -> Iterator[np.ndarray]:
    """The waveforms of all sentences, silence between two of them."""
    is_first = True
    for sentence in sentences:
        if not is_first:
            yield np.zeros(int(PAUSE_SECONDS * sample_rate), np.float32)
        is_first = False
        yield from sentence


def write_stream(file: BinaryIO, waveforms: Iterable[np.ndarray], sample_rate: int, *, header: bool) -> None:
    """Write 16-bit mono samples as they come: a WAV stream, or without ``header`` the samples alone."""
    if header:
        riff = struct.pack("<4sI4s", b"RIFF", _UNKNOWN, b"WAVE")
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
        file.write(riff + form + struct.pack("<4sI", b"data", _UNKNOWN))
        file.flush()
    for waveform in waveforms:
        file.write(pcm(waveform))
        file.flush()


def write_file(path: Path, waveforms: Iterable[np.ndarray], sample_rate: int) -> None:
    """Write a WAV file as the waveforms come."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, sample_rate, 0, "NONE", ""))
        for waveform in waveforms:
            file.writeframesraw(pcm(waveform))


def output_names(output: Path | None, names: list[str], first_sentence: str) -> tuple[Path, list[str]]:
    """Folder and file names of what models are going to say.

    Args:
        output: a ``.wav`` file of a single model, or a folder; None: the folder ``speech``.
        names: of the models.
        first_sentence: becomes part of the names, so that another text gets another file.

    Raises:
        InputError: one file for several models, or a folder that is a file.
    """
    if output is not None and output.suffix == ".wav":
        if len(names) > 1:
            raise InputError(f"--output {output} is one file, and {len(names)} models speak: give a folder")
        return output.parent, [output.name]
    folder = output or Path("speech")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: give a folder, or a name that ends in .wav")
    words = re.sub(r"\W+", "_", first_sentence).strip("_")[:_LONGEST_NAME].rstrip("_") or "speech"
    return folder, [f"{words}-{name.replace(' ', '_')}.wav" for name in names]
