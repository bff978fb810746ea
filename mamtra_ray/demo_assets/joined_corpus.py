"""Stages of a build whose sentences are read clause by clause: speak clauses, time their words, join, cut tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamtra_ray.artifacts import content_hash, file_hash, read_json, write_json
from mamtra_ray.corpus.table import write_corpus
from mamtra_ray.demo_assets.build import Example, examples, token_rows
from mamtra_ray.demo_assets.clauses import (
    BANDS,
    Clause,
    JoinedSentence,
    draw_clauses,
    join_clauses,
    joined_sound,
    joined_word_ends,
)
from mamtra_ray.demo_assets.recordings import SpeechShards, speak_sentences
from mamtra_ray.demo_assets.voice import Voice, WordTimer
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.tokenizer import SAMPLE_RATE


@dataclass(frozen=True)
class JoinedCounts:
    """How many clauses the voice reads for a split, and how many sentences of each band are made of them."""

    clauses: int
    sentences: tuple[int, ...]
    """Of each of the `BANDS`, from the shortest; without the last ones the longest sentences are left out."""


@dataclass(frozen=True)
class JoinedSplit:
    """Clauses and sentences of one split."""

    clauses: list[Clause]
    sentences: list[JoinedSentence]

    @property
    def texts(self) -> list[str]:
        """The sentences alone."""
        return [sentence.text for sentence in self.sentences]


def draw_joined(counts: dict[str, JoinedCounts], seed: int) -> dict[str, JoinedSplit]:
    """Clauses and sentences of every split; no two splits share a clause.

    Args:
        counts: of every split.
        seed: seed of the drawing.
    """
    clauses = draw_clauses({split: count.clauses for split, count in counts.items()}, seed)
    return {
        split: JoinedSplit(
            clauses[split],
            join_clauses(clauses[split], dict(zip(BANDS, count.sentences, strict=False)), seed),
        )
        for split, count in counts.items()
    }


def speak_clauses(
    split: str, joined: JoinedSplit, work: Path, voice_name: str, make_voice: Callable[[], Voice], jobs: int
) -> SpeechShards:
    """Sound of a split's clauses, in `work/clauses-<split>`."""
    spoken = [clause.spoken for clause in joined.clauses]
    return speak_sentences(spoken, work / f"clauses-{split}", voice_name, make_voice, jobs)


def time_clauses(
    split: str, joined: JoinedSplit, work: Path, voice_name: str, make_timer: Callable[[], WordTimer]
) -> list[list[float]]:
    """When each word of every clause ends (seconds), in `work/clause-ends-<split>-<hash>.json`."""
    spoken = [clause.spoken for clause in joined.clauses]
    path = work / f"clause-ends-{split}-{content_hash([voice_name, spoken])}.json"
    if not path.exists():
        timer = make_timer()
        write_json(path, [[round(end, 4) for end in timer(text)] for text in spoken])
    ends: list[list[float]] = read_json(path)
    return ends


def build_split(split: str, joined: JoinedSplit, shards: SpeechShards, codec_path: Path, work: Path) -> Path:
    """Speech tokens of a split's sentences, in `work/sentences-<split>-<hash>.parquet`; see `token_rows`."""
    made_by = {
        "codec": file_hash(codec_path),
        "voice": content_hash([path.name for path in shards.paths]),
        "sentences": content_hash([dataclasses.asdict(sentence) for sentence in joined.sentences]),
    }
    path = work / f"sentences-{split}-{content_hash(made_by)}.parquet"
    if not path.exists():
        tokenizer = load_codec(codec_path).tokenizer
        rows = token_rows(split, joined.texts, sentence_sounds(joined, shards), tokenizer)
        write_corpus(path, [row for phase in rows.values() for row in phase], tokenizer="demo", made_by=made_by)
    return path


def sentence_sounds(joined: JoinedSplit, shards: SpeechShards) -> Iterator[np.ndarray]:
    """Sound of every sentence, joined when it is asked for."""
    sounds = shards.waveforms(0, len(joined.clauses))
    for sentence in joined.sentences:
        yield joined_sound([sounds[number] for number in sentence.clauses])


def timed_examples(
    split: str, joined: JoinedSplit, shards: SpeechShards, clause_ends: list[list[float]], corpus: Path
) -> list[Example]:
    """Sentences of a split for training."""
    seconds = [len(sound) / SAMPLE_RATE for sound in shards.waveforms(0, len(joined.clauses))]
    word_ends = {
        sentence.text: joined_word_ends(
            [clause_ends[number] for number in sentence.clauses], [seconds[number] for number in sentence.clauses]
        )
        for sentence in joined.sentences
    }
    return examples(corpus, split, word_ends)
