"""Where speech corpora keep their sentences: LibriTTS, Seed-TTS-eval and CosyVoice folders as lists of recordings.

Only lists are made here; sound is read later, by many workers. What cannot be used is returned as a reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mamtra_ray.corpus.table import SPLITS
from mamtra_ray.errors import InputError

MAX_STRESS_WORDS = 62
"""Longest utterance of the paper's length-stress test (LibriTTS test-clean, 1 to 62 words)."""
PROMPT_WORDS = 15
"""A length-stress prompt is the speaker's utterance nearest to this many words, about five seconds."""


_TRANSCRIPT = ".normalized.txt"


@dataclass(frozen=True)
class Recording:
    """One utterance to prepare.

    ``audio`` is a file, or None if the utterance is only to be spoken; ``shard`` and ``row`` say where it stands in a
    CosyVoice Parquet file instead.
    """

    utterance_id: str
    text: str
    split: str
    audio: str | None = None
    speaker: str | None = None
    prompt_text: str | None = None
    prompt_audio: str | None = None
    shard: str | None = None
    row: int = 0


@dataclass(frozen=True)
class Skipped:
    """An utterance that is left out, and why."""

    utterance_id: str
    reason: str


Listing = tuple[list[Recording], list[Skipped]]


def libritts(root: Path, subsets: Sequence[str] = ()) -> Listing:
    """LibriTTS or LibriTTS-R: ``<subset>/<speaker>/<chapter>/<id>.wav`` beside ``<id>.normalized.txt``.

    Splits follow the subsets' names: train-*, dev-* (validation) and test-*.

    Args:
        root: the folder of the subsets, or one subset's.
        subsets: names to take; all if empty.

    Raises:
        InputError: no such folder or subset, or no utterance in it.
    """
    _require_folder(root)
    folders = [root] if _split_of_subset(root.name) else sorted(f for f in root.iterdir() if _split_of_subset(f.name))
    if missing := sorted(set(subsets) - {folder.name for folder in folders}):
        raise InputError(f"{root} has no subset {missing[0]} (it has {', '.join(f.name for f in folders) or 'none'})")
    recordings, skipped = [], []
    for folder in folders:
        if subsets and folder.name not in subsets:
            continue
        audios = set(folder.glob("*/*/*.wav"))
        spoken = {
            path.with_name(path.name.removesuffix(_TRANSCRIPT) + ".wav") for path in folder.glob(f"*/*/*{_TRANSCRIPT}")
        }
        skipped += [Skipped(audio.stem, "recording is missing") for audio in sorted(spoken - audios)]
        for audio in sorted(audios):
            text = _read_line(audio.with_suffix(_TRANSCRIPT))
            if not text:
                missing_text = text is None
                skipped.append(Skipped(audio.stem, "transcript is missing" if missing_text else "text is empty"))
                continue
            speaker = audio.parent.parent.name
            recordings.append(Recording(audio.stem, text, _split_of_subset(folder.name), str(audio), speaker))
    if not recordings and not skipped:
        raise InputError(f"{root} holds no <subset>/<speaker>/<chapter>/<id>.wav with subsets train-*, dev-*, test-*")
    return recordings, skipped


def length_stress(root: Path, per_length: int = 5, seed: int = 0, max_words: int = MAX_STRESS_WORDS) -> Listing:
    """A test set of sentences from 1 to 62 words, each spoken after another utterance of the same speaker.

    The paper takes LibriTTS test-clean and gives no list; this one draws up to ``per_length`` utterances of every
    number of words (blank-separated, in the normalized text), and as prompt the same speaker's utterance nearest to
    15 words that is another one.

    Raises:
        InputError: as :func:`libritts`, or no speaker has two utterances.
    """
    if per_length < 1:
        raise InputError(f"length_stress takes one or more utterances per number of words, not {per_length}")
    subset = root if root.name == "test-clean" else root / "test-clean"
    everything, skipped = libritts(subset)
    by_speaker: dict[str | None, list[Recording]] = {}
    by_words: dict[int, list[Recording]] = {}
    for recording in everything:
        by_speaker.setdefault(recording.speaker, []).append(recording)
        by_words.setdefault(len(recording.text.split()), []).append(recording)
    draw = random.Random(seed)
    chosen = []
    for words in range(1, max_words + 1):
        candidates = by_words.get(words, [])
        if not candidates:
            skipped.append(Skipped(f"length {words}", "no utterance has this number of words"))
        for recording in draw.sample(candidates, min(per_length, len(candidates))):
            others = [other for other in by_speaker[recording.speaker] if other is not recording]
            if not others:
                skipped.append(Skipped(recording.utterance_id, "no other utterance of its speaker as prompt"))
                continue
            prompt = min(others, key=lambda other: (abs(len(other.text.split()) - PROMPT_WORDS), other.utterance_id))
            chosen.append(replace(recording, prompt_text=prompt.text, prompt_audio=prompt.audio))
    if not chosen:
        raise InputError(f"{subset} has no utterance of up to {max_words} words with another one of its speaker")
    return chosen, skipped


def seed_tts_eval(meta: Path) -> Listing:
    """Seed-TTS-eval's ``meta.lst``; paths in it are relative to its folder.

    Lines are ``id|prompt text|prompt wav|text``, the same with ``|recording`` at the end, ``id|text|prompt wav`` or
    ``id|text``. Without a named recording ``wavs/<id>.wav`` beside the list is taken, if it is there.

    Raises:
        InputError: the file is missing, or no line has one of these forms.
    """
    if meta.is_dir():
        meta = meta / "meta.lst"
    try:
        # Not splitlines(): it also breaks at characters that may stand in a text, such as U+2028.
        lines = meta.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{meta} cannot be read: {error}") from None
    recordings, skipped = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("|")]
        if not 2 <= len(fields) <= 5 or not fields[0]:
            skipped.append(Skipped(f"line {number}", f"{len(fields)} fields, expected 2 to 5 separated by |"))
            continue
        utterance_id, prompt_text, prompt_wav, text, wav = _seed_fields(fields)
        if not text.strip():
            skipped.append(Skipped(utterance_id, "text is empty"))
            continue
        own = meta.parent / (wav or f"wavs/{utterance_id}.wav")
        recordings.append(
            Recording(
                utterance_id,
                text.strip(),
                "test",
                audio=str(own) if wav or own.is_file() else None,
                prompt_text=prompt_text,
                prompt_audio=str(meta.parent / prompt_wav) if prompt_wav else None,
            )
        )
    if not recordings:
        raise InputError(f"{meta} has no line of Seed-TTS-eval's forms, such as id|prompt text|prompt wav|text")
    return recordings, skipped


def _seed_fields(fields: list[str]) -> tuple[str, str | None, str | None, str, str | None]:
    """(id, prompt text, prompt wav, text, recording) of a line."""
    if len(fields) == 5:
        return fields[0], fields[1], fields[2], fields[3], fields[4]
    if len(fields) == 4:
        return fields[0], fields[1], fields[2], fields[3], None
    if len(fields) == 3:
        return fields[0].removesuffix(".wav"), None, fields[2], fields[1], None
    return fields[0], None, None, fields[1], None


def cosyvoice_shards(path: Path, split: str = "train") -> Listing:
    """CosyVoice's own Parquet files (named ``parquet_*.tar``, though no tar): columns utt, text, spk, audio_data.

    Args:
        path: ``data.list`` (one file per line), a folder of such files, or one file.
        split: of all its utterances.

    Raises:
        InputError: no file, or one without the needed columns; an unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"a corpus has the splits {', '.join(SPLITS)}, not {split!r}")
    if path.suffix == ".list" and path.is_file():
        files = [Path(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        files = [(file if file.exists() else path.parent / file).absolute() for file in files]
    elif path.is_dir():
        files = sorted([*path.glob("parquet_*.tar"), *path.glob("*.parquet")])
    else:
        files = [path]
    if not files:
        raise InputError(f"{path} names no CosyVoice Parquet file (parquet_*.tar)")
    recordings, skipped = [], []
    for file in files:
        try:
            with pq.ParquetFile(file) as shard:
                names = shard.schema_arrow.names
                lacking = [name for name in ("utt", "text") if name not in names]
                if not {"audio_data", "speech_token"} & set(names):
                    lacking.append("audio_data (or speech_token)")
                if lacking:
                    raise InputError(f"{file} is no CosyVoice shard: it lacks the column {lacking[0]}")
                table = shard.read([name for name in ("utt", "text", "spk") if name in names])
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file} is missing, damaged or no Parquet file: {' '.join(str(error).split())}") from None
        for row, values in enumerate(table.to_pylist()):
            text = str(values["text"] or "").strip()
            if not text:
                skipped.append(Skipped(str(values["utt"]), "text is empty"))
                continue
            speaker = None if values.get("spk") is None else str(values["spk"])
            recordings.append(Recording(str(values["utt"]), text, split, speaker=speaker, shard=str(file), row=row))
    return recordings, skipped


SOURCES: dict[str, Callable[..., Listing]] = {
    "libritts": libritts,
    "length_stress": length_stress,
    "seed_tts_eval": seed_tts_eval,
    "cosyvoice": cosyvoice_shards,
}
"""What ``python -m mamtra_ray.corpus`` can read, by name (LibriTTS-R is laid out as LibriTTS)."""


def without_repeats(recordings: Iterable[Recording]) -> Listing:
    """Keep the first utterance of every id: a corpus names each once."""
    kept: dict[str, Recording] = {}
    skipped = []
    for recording in recordings:
        if recording.utterance_id in kept:
            skipped.append(Skipped(recording.utterance_id, "its id stands twice; the first one is kept"))
        else:
            kept[recording.utterance_id] = recording
    return list(kept.values()), skipped


def _split_of_subset(name: str) -> str:
    splits = {"train": "train", "dev": "validation", "test": "test"}
    return splits.get(name.partition("-")[0], "") if "-" in name else ""


def _read_line(path: Path) -> str | None:
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return None


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{path} is no folder")
