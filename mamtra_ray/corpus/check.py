"""Is a corpus sound, what does it hold, and is it of a teacher's tokenizers? (``python -m mamtra_ray.corpus check``)"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mamtra_ray.assets import PACKAGED
from mamtra_ray.config import TeacherConfig
from mamtra_ray.corpus.selection import drawn, fitting
from mamtra_ray.corpus.table import (
    SPLITS,
    check_tokenizer,
    check_vocabulary,
    corpus_identity,
    read_corpus,
    token_counts,
)
from mamtra_ray.errors import InputError
from mamtra_ray.teachers.outline import TeacherOutline
from mamtra_ray.teachers.text import TextTokenizer, text_tokenizer

_TOKENIZER_OF_KIND = {**dict.fromkeys(PACKAGED, "demo"), "cosyvoice2": "cosyvoice2", "llasa": "llasa"}
"""The name in a corpus, by kind of teacher; other kinds have any."""
_COMPARED = 20


def corpus_summary(path: Path) -> str:
    """What a corpus holds, read whole and checked.

    Raises:
        InputError: the first thing that is wrong with it.
    """
    table = read_corpus(path)
    identity = corpus_identity(table)
    lines = [f"corpus {path}: tokenizer {identity.tokenizer}, content {identity.corpus_hash[:16]}"]
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split))
        if not len(rows):
            lines.append(f"{split}: nothing")
            continue
        text, speech = (token_counts(rows, name) for name in ("text_tokens", "speech_tokens"))
        speakers = ""
        if "speaker" in rows.column_names:
            speakers = f", {pc.count_distinct(rows['speaker']).as_py():,} speakers"
        without = f", {int((speech == 0).sum()):,} to be spoken only" if (speech == 0).any() else ""
        lines.append(
            f"{split}: {len(rows):,} utterances{speakers}{without}, {int(speech.sum()):,} speech tokens "
            f"(at most {int(speech.max()):,}), {int(text.sum()):,} text tokens (at most {int(text.max()):,})"
        )
    return "\n".join(lines)


def check_against_teacher(table: pa.Table, outline: TeacherOutline, teacher: TeacherConfig) -> None:
    """Refuse a corpus of other tokenizers than a teacher's.

    Raises:
        InputError: tokens that the teacher does not know, or texts that its tokenizer reads otherwise.
    """
    check_tokenizer(table, outline.tokenizer)
    check_vocabulary(table, outline.text_size, outline.speech_size)
    check_text_tokens(table, teacher)


def fitting_summary(table: pa.Table, outline: TeacherOutline) -> str:
    """How many utterances of the splits that are trained on fit into the teacher's longest sequence."""
    parts = []
    for split in ("train", "validation"):
        rows = table.filter(pc.equal(table["split"], split))
        if len(rows):
            fit = len(fitting(rows, split, outline.sequence_overhead, outline.max_length))
            parts.append(f"{fit:,} of {len(rows):,} utterances of {split}")
    return f"fits teacher {outline.name}: {', '.join(parts) or 'nothing to train on'}"


def check_text_tokens(table: pa.Table, teacher: TeacherConfig) -> None:
    """Refuse a corpus whose name says the teacher's tokenizer and whose text tokens are another's.

    A sample of the texts is tokenized again. A corpus that is called otherwise (its texts may have been normalized
    first) is taken at its word, but for one of another kind of teacher.

    Raises:
        InputError: names an utterance, or both tokenizers.
    """
    found = corpus_identity(table).tokenizer
    expected_name = _TOKENIZER_OF_KIND.get(teacher.kind, teacher.kind)
    if found != expected_name:
        if {found, expected_name} <= set(_TOKENIZER_OF_KIND.values()):
            raise InputError(f"the corpus was made with {found}'s tokenizers, but teacher.kind is {teacher.kind}")
        return
    tokenize = _tokenizer(teacher.kind, teacher.path)
    if tokenize is None:
        return
    for row in drawn(table, 0).slice(0, _COMPARED).select(["utterance_id", "text", "text_tokens"]).to_pylist():
        try:
            expected = tokenize(row["text"])
        except InputError as error:
            raise InputError(
                f"utterance {row['utterance_id']!r} of the corpus is no text for the teacher: {error}"
            ) from None
        if not np.array_equal(expected, row["text_tokens"]):
            raise InputError(
                f"utterance {row['utterance_id']!r} has other text tokens than the teacher's tokenizer makes of its"
                " text: the corpus was made with another one (if its texts were normalized first, write it with another"
                f" name than tokenizer={found!r})"
            )


@functools.lru_cache(maxsize=2)
def _tokenizer(kind: str, path: str | None) -> TextTokenizer | None:
    """None where the teacher's folder has none."""
    try:
        return text_tokenizer(kind, Path(path) if path else None)
    except InputError:
        return None
