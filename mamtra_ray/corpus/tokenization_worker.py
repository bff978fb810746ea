"""Recordings to corpus rows, in a Ray Data actor; one bad recording never ends the work.

In its own module because Ray workers import it by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mamtra_ray.corpus.sources import Recording, Skipped
from mamtra_ray.errors import InputError

MIN_SECONDS, MAX_SECONDS = 0.2, 30.0
"""Shorter sound holds no utterance; longer sound is outside what CosyVoice's tokenizer was made for."""
SOUNDS_PER_BATCH = 8
_ROWS_AT_ONCE, _BUFFER_BYTES = 16, 1 << 20


@dataclass(frozen=True)
class Tokenizers:
    """Which tokenizers to load: arguments of ``text_tokenizer`` and ``speech_tokenizer_of_teacher``."""

    teacher_kind: str
    teacher_path: Path | None
    speech_tokenizer: Path | None
    cpus: int = 1


class _Shard:
    """Values of a CosyVoice file, read a few rows at a time: one row group may hold more than a gigabyte of sound.

    A page of the file is the least that can be read; some writers make one of a thousand rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Read from the file as it is needed, not a whole column of a row group at once.
        self.file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        self.readers: dict[str, tuple[Iterator[pa.RecordBatch], int, pa.Array]] = {}

    def value(self, column: str, row: int) -> Any:
        """Of one row; rows are cheap in ascending order. None if there is no such column."""
        if column not in self.file.schema_arrow.names:
            return None
        reader = self.readers.get(column)
        if reader is None or row < reader[1]:
            reader = (self.file.iter_batches(_ROWS_AT_ONCE, columns=[column], use_threads=False), 0, pa.array([]))
        batches, first, values = reader
        while row >= first + len(values):
            first += len(values)
            batch = next(batches, None)
            if batch is None:
                raise InputError(f"{self.path} has no row {row} any more")
            values = batch.column(0)
        self.readers[column] = (batches, first, values)
        return values[row - first].as_py()


class TokenizationWorker:
    """Loads both tokenizers once; called by Ray Data with groups of recordings."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self.tokenizers = tokenizers
        self.speech: Any = None
        self.text: Any = None
        self.shard: _Shard | None = None
        self.prompt_tokens: dict[str, np.ndarray] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Groups of recordings -> rows and skipped of each; lists travel pickled, as Arrow would guess their types.

        Args:
            batch: ``group`` (numbers) and ``recordings`` (pickled lists of :class:`Recording`).

        Returns:
            ``group``, ``result`` (pickled pairs of rows and skipped) and ``error`` (of the tokenizers, else empty).
        """
        results: dict[str, list[Any]] = {"group": [], "result": [], "error": []}
        for group, recordings in zip(batch["group"], batch["recordings"], strict=True):
            result: tuple[list[dict[str, Any]], list[Skipped]] = ([], [])
            error = ""
            try:
                self._load()
                result = self.tokenized(pickle.loads(recordings))
            except InputError as reason:  # nothing can be tokenized
                error = str(reason)
            results["group"].append(int(group))
            results["result"].append(pickle.dumps(result))
            results["error"].append(error)
        return results

    def _load(self) -> None:
        if self.text is not None:
            return
        import torch

        from mamtra_ray.speech.speech_tokenizers import speech_tokenizer_of_teacher
        from mamtra_ray.teachers.text import text_tokenizer

        torch.set_num_threads(self.tokenizers.cpus)
        kind, path = self.tokenizers.teacher_kind, self.tokenizers.teacher_path
        self.speech = speech_tokenizer_of_teacher(kind, path, self.tokenizers.speech_tokenizer)
        self.text = text_tokenizer(kind, path)

    def tokenized(self, recordings: list[Recording]) -> tuple[list[dict[str, Any]], list[Skipped]]:
        """Corpus rows of the recordings that can be used, and the reasons for the others."""
        rows: list[dict[str, Any]] = []
        skipped: list[Skipped] = []
        waiting: list[tuple[dict[str, Any], np.ndarray]] = []
        for recording in recordings:
            try:
                row, sound = self._row(recording)
            except Exception as error:  # whatever is wrong with one recording must not end hours of work
                skipped.append(Skipped(recording.utterance_id, " ".join(str(error).split())))
                continue
            rows.append(row)
            if sound is not None:
                waiting.append((row, sound))
            if len(waiting) == SOUNDS_PER_BATCH:
                skipped += self._encode(waiting)
                waiting = []
        if waiting:
            skipped += self._encode(waiting)
        left_out = {one.utterance_id for one in skipped}
        return [row for row in rows if row["utterance_id"] not in left_out], skipped

    def _row(self, recording: Recording) -> tuple[dict[str, Any], np.ndarray | None]:
        """A row without its speech tokens and the sound they come from (None if there is none, or they are there)."""
        row = {
            "utterance_id": recording.utterance_id,
            "text": recording.text,
            "text_tokens": self.text(recording.text),
            "speech_tokens": [],
            "split": recording.split,
            "speaker": recording.speaker,
        }
        if not row["text_tokens"]:
            raise InputError("its text has no token")
        if recording.prompt_audio:
            row["prompt_audio"] = recording.prompt_audio
            prompt = self._prompt(recording.prompt_audio)
            # Without its words the prompt cannot stand before the model's text; codecs still take its voice.
            if recording.prompt_text:
                row["prompt_text"] = recording.prompt_text
                row["prompt_text_tokens"] = self.text(recording.prompt_text)
                row["prompt_speech_tokens"] = prompt
        if recording.shard:
            stored = self._from_shard(recording, "speech_token")
            if stored is not None and len(stored):
                row["speech_tokens"] = [int(token) for token in stored]
                if min(row["speech_tokens"]) < 0:
                    raise InputError(f"its speech_token has the negative token {min(row['speech_tokens'])}")
                return row, None
            return row, self._sound(self._from_shard(recording, "audio_data"))
        return row, None if recording.audio is None else self._sound(recording.audio)

    def _sound(self, source: str | bytes | None) -> np.ndarray:
        from mamtra_ray.speech.resampling import read_audio

        if source is None:
            raise InputError("its row has no audio")
        sound = read_audio(source, self.speech.sample_rate)
        seconds = len(sound) / self.speech.sample_rate
        if not MIN_SECONDS <= seconds <= MAX_SECONDS:
            raise InputError(f"{seconds:.1f} s of audio, expected {MIN_SECONDS:g} to {MAX_SECONDS:g} s")
        if not np.abs(sound).max() > 1e-4:
            raise InputError("its audio is silence")
        return sound

    def _prompt(self, path: str) -> np.ndarray:
        if path not in self.prompt_tokens:
            try:
                self.prompt_tokens[path] = self.speech.encode([self._sound(path)])[0]
            except InputError as error:
                raise InputError(f"its prompt cannot be used: {error}") from None
        return self.prompt_tokens[path]

    def _from_shard(self, recording: Recording, column: str) -> Any:
        """One value of a CosyVoice file."""
        assert recording.shard is not None
        if self.shard is None or self.shard.path != recording.shard:
            self.shard = _Shard(recording.shard)
        return self.shard.value(column, recording.row)

    def _encode(self, batch: list[tuple[dict[str, Any], np.ndarray]]) -> list[Skipped]:
        """Fill in the speech tokens; when a batch fails, one by one, to leave out only what fails by itself."""
        try:
            tokens = self.speech.encode([sound for _, sound in batch])
        except Exception as error:
            if len(batch) == 1:
                return [Skipped(batch[0][0]["utterance_id"], f"tokenizing failed: {' '.join(str(error).split())}")]
            return [one for entry in batch for one in self._encode([entry])]
        skipped = []
        for (row, _), codes in zip(batch, tokens, strict=True):
            row["speech_tokens"] = codes
            if not len(codes):
                skipped.append(Skipped(row["utterance_id"], "its audio gave no speech token"))
        return skipped
