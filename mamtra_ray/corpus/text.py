"""Text files to a corpus for a teacher of text: documents, packed one after another or by paragraph.

    python -m mamtra_ray.corpus text FILE... --output corpora/text teacher.kind=causal_lm teacher.path=MODEL

A file is a document, and belongs to one split as a whole. ``documents`` joins the documents of a split, the id that
ends texts behind each, and cuts the stream into rows of equal length, so that every token is predicted once.
``paragraphs`` makes a row of every paragraph (what empty lines separate), and several of one that is longer than a row.
The token that follows a row is its ``next_token``.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mamtra_ray.artifacts import check_made_by, content_hash, read_manifest, write_manifest
from mamtra_ray.corpus.sources import Skipped
from mamtra_ray.corpus.table import REPORT, write_corpus
from mamtra_ray.errors import InputError

SCHEMA_VERSION = 1
FILE = "text.parquet"
CUTS = ("documents", "paragraphs")

Cut = Literal["documents", "paragraphs"]
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Document:
    """One file's text."""

    name: str
    text: str


@dataclass(frozen=True)
class TextSettings:
    """How files become rows.

    Attributes:
        cut: ``documents`` or ``paragraphs``.
        row_tokens: longest row.
        validation_share: of the files, at least one.
        seed: of the split and of the order of documents and rows.
    """

    cut: Cut = "documents"
    row_tokens: int = 512
    validation_share: float = 0.1
    seed: int = 0


def find_files(paths: Iterable[Path], pattern: str = "**/*") -> list[Path]:
    """The given files, and those of given folders that match ``pattern``, each once, sorted.

    Raises:
        InputError: a path that does not exist, or nothing found.
    """
    found: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found |= {file.resolve() for file in path.glob(pattern) if file.is_file()}
        elif path.is_file():
            found.add(path.resolve())
        else:
            raise InputError(f"{path} does not exist")
    if not found:
        raise InputError(f"no file of the given folders matches {pattern!r}")
    return sorted(found)


def read_documents(files: Sequence[Path]) -> tuple[list[Document], list[Skipped]]:
    """Texts of the files (UTF-8, also gzipped), and why others are left out; equal texts count once."""
    documents: dict[str, Document] = {}
    skipped = []
    for file in files:
        try:
            content = file.read_bytes()
            text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            reason = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            skipped.append(Skipped(str(file), reason))
            continue
        if not text.strip():
            skipped.append(Skipped(str(file), "it is empty"))
        elif text in documents:
            skipped.append(Skipped(str(file), "its text stands in another file too"))
        else:
            documents[text] = Document(str(file), text)
    return list(documents.values()), skipped


def split_documents(documents: Sequence[Document], settings: TextSettings) -> dict[str, list[Document]]:
    """Documents of each split in a random order; both follow from the documents and the seed.

    Raises:
        InputError: fewer than two documents.
    """
    if len(documents) < 2:
        raise InputError(f"{len(documents)} documents cannot be split: give at least two files, one to validate with")
    drawn = list(documents)
    random.Random(settings.seed).shuffle(drawn)
    held_out = min(max(1, round(settings.validation_share * len(drawn))), len(drawn) - 1)
    return {"validation": drawn[:held_out], "train": drawn[held_out:]}


def packed_rows(streams: Iterable[Sequence[int]], end: int, row_tokens: int) -> list[tuple[list[int], int]]:
    """Documents' tokens joined, ``end`` behind each, in rows of ``row_tokens``.

    Returns:
        (tokens, next token) of each row. Rows and the last row's next token are the whole stream; the last row may be
        shorter.
    """
    stream = [token for tokens in streams for token in (*tokens, end)]
    body = range(0, len(stream) - 1, row_tokens)
    return [
        (stream[first : min(first + row_tokens, len(stream) - 1)], _next(stream, first + row_tokens)) for first in body
    ]


def _next(stream: Sequence[int], position: int) -> int:
    return stream[min(position, len(stream) - 1)]


def paragraph_rows(text: str, tokenize: Tokenize, end: int, row_tokens: int) -> list[tuple[list[int], int]]:
    """Every paragraph of a text as one row, or as several of ``row_tokens``; the last one is followed by ``end``."""
    paragraphs = [part for part in _paragraphs(text) if part]
    rows: list[tuple[list[int], int]] = []
    for index, paragraph in enumerate(paragraphs):
        tokens = tokenize(paragraph)
        after = end if index == len(paragraphs) - 1 else tokenize("\n\n")[0]
        for first in range(0, len(tokens), row_tokens):
            following = first + row_tokens
            rows.append((tokens[first:following], tokens[following] if following < len(tokens) else after))
    return rows


def _paragraphs(text: str) -> list[str]:
    """Without the empty lines between them; what begins a line (code's indentation) stays."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1].append(line.rstrip())
        else:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs]


def make_text_corpus(
    files: Sequence[Path],
    output: Path,
    *,
    tokenizer: Any,
    tokenizer_name: str,
    end: int,
    settings: TextSettings,
) -> dict[str, Any]:
    """Write ``output``: one Parquet file in the format of :mod:`mamtra_ray.corpus.table`, and ``report.json``.

    Args:
        files: of :func:`find_files`.
        output: a folder; a corpus of the same files and settings in it is kept.
        tokenizer: transformers' tokenizer of the teacher.
        tokenizer_name: that the teacher's corpora must have.
        end: id that ends a text.
        settings: how files become rows.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: too few documents, or ``output`` holds something else.
    """
    documents, skipped = read_documents(files)
    made_by = {
        "source": "text",
        "tokenizer": tokenizer_name,
        **asdict(settings),
        "documents": content_hash([[document.name, document.text] for document in documents]),
    }
    if (output / REPORT).exists():
        report = read_manifest(output / REPORT, "text_corpus_report", SCHEMA_VERSION)
        check_made_by(output / REPORT, report["made_by"], made_by)
        return report
    if foreign := [path.name for path in output.glob("*.parquet") if path.name != FILE]:
        raise InputError(f"{output} holds {foreign[0]}, which is not of this corpus; give another --output")
    splits = split_documents(documents, settings)
    rows: list[dict[str, Any]] = []
    counts = {}

    def tokenize(text: str) -> list[int]:
        # A special token's name in a text is text: a file that says <|im_end|> does not end there. No warning that
        # a document is longer than the model's context, as its rows are not.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return list(ids)

    for split, own in splits.items():
        if settings.cut == "documents":
            cut = packed_rows((tokenize(document.text) for document in own), end, settings.row_tokens)
        else:
            cut = [row for one in own for row in paragraph_rows(one.text, tokenize, end, settings.row_tokens)]
        # A budget takes the first rows: these should be of all files.
        random.Random(settings.seed).shuffle(cut)
        counts[split] = {"documents": len(own), "rows": len(cut), "tokens": sum(len(tokens) for tokens, _ in cut)}
        rows += [
            {
                "utterance_id": f"{split}-{index:06}",
                "text": tokenizer.decode(tokens),
                "text_tokens": [],
                "speech_tokens": tokens,
                "next_token": following,
                "split": split,
            }
            for index, (tokens, following) in enumerate(cut)
        ]
    write_corpus(output / FILE, rows, tokenizer=tokenizer_name, made_by=made_by)
    write_manifest(
        output / REPORT,
        "text_corpus_report",
        SCHEMA_VERSION,
        made_by,
        splits=counts,
        skipped=[asdict(one) for one in skipped],
        validation_files=[document.name for document in splits["validation"]],
    )
    return read_manifest(output / REPORT, "text_corpus_report", SCHEMA_VERSION)
