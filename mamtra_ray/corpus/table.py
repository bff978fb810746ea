"""The corpus: one row per utterance in Parquet, with text tokens and speech tokens of the teacher's tokenizers.

Columns: ``utterance_id`` string, ``text`` string, ``text_tokens`` list<int32>, ``speech_tokens`` list<int32>,
``split`` string (train, validation or test); optional ``speaker``, and for zero-shot evaluation ``prompt_text``,
``prompt_text_tokens``, ``prompt_speech_tokens``, ``prompt_audio`` (a path, which codecs and speaker similarity read). A
sentence of the test split may have no ``speech_tokens``: it is to be spoken, not learned.

A corpus of text alone (:mod:`mamtra_ray.corpus.text`) has its tokens in ``speech_tokens``, what a model predicts, and
no ``text_tokens`` in any row; ``next_token``, in all rows or none, is the token that follows a row in its document.

A corpus is one file or a folder of ``*.parquet`` files, whose key-value metadata ``mamtra_ray`` is JSON with kind,
schema version, tokenizer and what made it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mamtra_ray.artifacts import check_checksum, with_checksum, written_atomically
from mamtra_ray.assets import CORPUS, DEMO
from mamtra_ray.errors import InputError

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
REPORT, PART_REPORTS = "report.json", "part-*.json"
"""Beside the files of a corpus made from recordings: written when all is done, and with every part."""
DEMO_CORPUS = DEMO / CORPUS

_TOKENS = pa.list_(pa.int32())
REQUIRED_COLUMNS = {
    "utterance_id": pa.string(),
    "text": pa.string(),
    "text_tokens": _TOKENS,
    "speech_tokens": _TOKENS,
    "split": pa.string(),
}
OPTIONAL_COLUMNS = {
    "speaker": pa.string(),
    "prompt_text": pa.string(),
    "prompt_text_tokens": _TOKENS,
    "prompt_speech_tokens": _TOKENS,
    "prompt_audio": pa.string(),
    "next_token": pa.int32(),
}
_TOKEN_COLUMNS = ("text_tokens", "speech_tokens", "prompt_text_tokens", "prompt_speech_tokens")
_METADATA_KEY = b"mamtra_ray"
_METADATA = {"kind", "schema_version", "tokenizer", "made_by", "content_sha256"}
# Small enough that a reader of a few utterances touches little, large enough for Parquet's encodings to work.
_ROWS_PER_GROUP = 2_048


@dataclass(frozen=True)
class Utterance:
    """One row. Tokens are int32 arrays: text ids and speech ids, both counted from 0, without any offset."""

    utterance_id: str
    text: str
    text_tokens: np.ndarray
    speech_tokens: np.ndarray
    split: str
    speaker: str | None = None
    prompt_text: str | None = None
    prompt_text_tokens: np.ndarray | None = None
    prompt_speech_tokens: np.ndarray | None = None
    prompt_audio: str | None = None
    next_token: int | None = None
    """Of a row of running text: the token that follows it. None: the end does."""


@dataclass(frozen=True)
class CorpusIdentity:
    """What an artifact made from a corpus must remember of it."""

    corpus_hash: str
    """SHA-256 over the content of all splits, whatever the Parquet encoding or the number of files."""
    tokenizer: str
    """Names the tokenizers of both token columns, e.g. ``cosyvoice2``."""


def write_corpus(
    path: Path | str,
    rows: pa.Table | Iterable[Mapping[str, Any] | Utterance],
    *,
    tokenizer: str,
    made_by: Mapping[str, Any],
) -> CorpusIdentity:
    """Check ``rows`` and write them as one Parquet file, atomically.

    Args:
        path: the file; several such files in one folder, read in the order of their names, are one corpus.
        rows: a table, or rows as mappings or :class:`Utterance`; columns of the module docstring.
        tokenizer: name of the tokenizers that made the tokens.
        made_by: what made the corpus (source, versions, settings), for the metadata.

    Raises:
        InputError: a column is missing or unknown, or a row is no valid utterance.
    """
    table = rows if isinstance(rows, pa.Table) else _table_of_rows(rows)
    table = _checked(table, str(path))
    digest = _content_hash(table)
    metadata = {
        "kind": "corpus",
        "schema_version": SCHEMA_VERSION,
        "tokenizer": tokenizer,
        "made_by": dict(made_by),
        "content_sha256": digest,
    }
    metadata = with_checksum(metadata)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    with written_atomically(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=_ROWS_PER_GROUP, write_page_checksum=True)
    return CorpusIdentity(digest, tokenizer)


def read_corpus(path: Path | str | None = None, split: str | None = None) -> pa.Table:
    """Read and verify a corpus; keep one split.

    Args:
        path: Parquet file or folder of them; none for the packaged demo corpus.
        split: train, validation or test; none for all rows.

    Returns:
        The rows in stored order, with all columns of the module docstring that the corpus has.
        :func:`corpus_identity` of the table names the whole corpus it came from.

    Raises:
        InputError: missing or damaged file, another kind or version, an invalid row, or an empty selection.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"a corpus has the splits {', '.join(SPLITS)}, not {split!r}")
    files = _corpus_files(path)
    parts = [_read_part(file) for file in files]
    tokenizers = {metadata["tokenizer"] for _, metadata in parts}
    if len(tokenizers) > 1:
        raise InputError(f"{path} holds files of several tokenizers: {', '.join(sorted(tokenizers))}")
    if len(parts) == 1:
        table, digest = parts[0][0], parts[0][1]["content_sha256"]
    else:
        table = _checked(pa.concat_tables([part for part, _ in parts], promote_options="default"), str(path))
        digest = _content_hash(table)
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    if not len(table):
        raise InputError(f"corpus {path or DEMO_CORPUS} has no utterance in the split {split!r}")
    identity = {"corpus_hash": digest, "tokenizer": tokenizers.pop()}
    return table.replace_schema_metadata({_METADATA_KEY: json.dumps(identity)})


def split_of(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split of a corpus that :func:`read_corpus` has read whole.

    Raises:
        InputError: there are none.
    """
    rows = table.filter(pc.equal(table["split"], split))
    if not len(rows):
        raise InputError(f"the corpus has no utterance in the split {split!r}")
    return rows


def corpus_identity(table: pa.Table) -> CorpusIdentity:
    """Identity of the whole corpus that ``table``, made by :func:`read_corpus`, was selected from."""
    return CorpusIdentity(**json.loads(table.schema.metadata[_METADATA_KEY]))


def made_by_of(file: Path) -> dict[str, Any]:
    """What made one file of a corpus, from its metadata; its rows are read and checked, too.

    Raises:
        InputError: it is no corpus, or damaged.
    """
    made_by: dict[str, Any] = _read_part(file)[1]["made_by"]
    return made_by


def utterances(table: pa.Table) -> list[Utterance]:
    """The rows of a table as :class:`Utterance`."""
    rows = []
    for row in table.to_pylist():
        arrays: dict[str, Any] = {
            name: np.asarray(value, dtype=np.int32) if name.endswith("_tokens") and value is not None else value
            for name, value in row.items()
        }
        rows.append(Utterance(**arrays))
    return rows


def is_text_only(table: pa.Table) -> bool:
    """Whether this is the corpus of a model of text alone: no row has text before what is predicted."""
    return bool(len(table)) and pc.max(pc.list_value_length(table["text_tokens"])).as_py() == 0


def token_counts(table: pa.Table, column: str) -> np.ndarray:
    """Number of tokens of each row, int64 of shape (rows,)."""
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def first_rows_within(counts: np.ndarray, limit: int) -> int:
    """How many leading rows hold at most ``limit`` tokens together, at least one."""
    return max(1, int(np.searchsorted(np.cumsum(counts), limit, side="right")))


def check_vocabulary(table: pa.Table, text_size: int, speech_size: int) -> None:
    """Refuse a corpus whose tokens a teacher does not know.

    Raises:
        InputError: names the first utterance with a text id >= ``text_size`` or a speech id >= ``speech_size``, prompts
            included; or a corpus of text alone for a teacher of speech.
    """
    if text_size and is_text_only(table):
        raise InputError(
            "the corpus is text alone, for teacher.kind=causal_lm; a teacher of speech needs recordings and their text"
        )
    for column in _TOKEN_COLUMNS:
        size = text_size if column.endswith("text_tokens") else speech_size
        if column not in table.column_names:
            continue
        row_offset = 0
        for chunk in table[column].chunks:
            unknown = np.flatnonzero(chunk.flatten().to_numpy() >= size)
            if len(unknown):
                row = row_offset + pc.list_parent_indices(chunk)[int(unknown[0])].as_py()
                token = column[:-1].replace("_", " ") if text_size else "token"
                raise InputError(
                    f"utterance {table['utterance_id'][row].as_py()!r} has {token} "
                    f"{chunk.flatten()[int(unknown[0])].as_py()}, but the teacher's end at {size - 1}: "
                    "the corpus was made with another tokenizer"
                )
            row_offset += len(chunk)


def check_tokenizer(table: pa.Table, expected: str | None) -> None:
    """Refuse a corpus made with another tokenizer than a teacher's; ``expected`` is None where it is not known.

    Raises:
        InputError: names both.
    """
    found = corpus_identity(table).tokenizer
    if expected is not None and found != expected:
        raise InputError(
            f"the corpus was made with the tokenizer {found!r}, the teacher's is {expected!r}: make it again with "
            "python -m mamtra_ray.corpus text"
        )


def _corpus_files(path: Path | str | None) -> list[Path]:
    location = DEMO_CORPUS if path is None else Path(path)
    if location.is_dir():
        files = sorted(location.glob("*.parquet"))
        if not files:
            raise InputError(f"corpus folder {location} holds no *.parquet file")
        if list(location.glob(PART_REPORTS)) and not (location / REPORT).exists():
            raise InputError(
                f"corpus folder {location} is not finished: give its python -m mamtra_ray.corpus command again, "
                "which goes on where it stopped"
            )
        return files
    if not location.exists():
        raise InputError(f"corpus {location} does not exist (make one with python -m mamtra_ray.corpus)")
    return [location]


def _read_part(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        # Not read_table, which takes a third of a second to import what reads folders.
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read()
        metadata = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"corpus {file} is damaged or no Parquet file: {reason}") from None
    if not isinstance(metadata, dict) or metadata.get("kind") != "corpus":
        raise InputError(f"{file} is no corpus: its metadata lacks kind=corpus (make one with write_corpus)")
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"corpus {file} has schema version {metadata.get('schema_version')!r}, this code reads {SCHEMA_VERSION}"
        )
    if "checksum" in metadata or set(metadata) != _METADATA:  # files of earlier versions have none
        check_checksum(metadata, f"metadata of corpus {file}")
    table = _checked(table, str(file))
    if _content_hash(table) != metadata.get("content_sha256"):
        raise InputError(f"corpus {file} is damaged: its rows do not have the hash they were written with")
    return table, metadata


def _table_of_rows(rows: Iterable[Mapping[str, Any] | Utterance]) -> pa.Table:
    dictionaries = [vars(row) if isinstance(row, Utterance) else dict(row) for row in rows]
    columns = {**REQUIRED_COLUMNS, **OPTIONAL_COLUMNS}
    used = {name for row in dictionaries for name, value in row.items() if value is not None}
    arrays: dict[str, pa.Array] = {}
    for name in used | set(REQUIRED_COLUMNS):
        values = [row.get(name) for row in dictionaries]
        try:
            if name in _TOKEN_COLUMNS:
                values = [_whole_numbers(value) for value in values]
            arrays[name] = pa.array(values, type=columns.get(name))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"corpus column {name!r} cannot be stored as {columns.get(name)}: {reason}") from None
    return pa.table(arrays)


def _whole_numbers(tokens: Any) -> Any:
    """Tokens of one row; pyarrow itself would cut fractions off."""
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu":
        return tokens
    for token in () if tokens is None else tokens:
        if token is not None and (isinstance(token, bool) or int(token) != token):
            raise ValueError(f"a token is a whole number, not {token!r}")
    return tokens


def _checked(table: pa.Table, where: str) -> pa.Table:
    """The table with exactly our columns, in our order and types; invalid rows are refused by name."""
    columns = {**REQUIRED_COLUMNS, **OPTIONAL_COLUMNS}
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in columns]
    if missing or unknown:
        problem = f"lacks the column {missing[0]!r}" if missing else f"has the unknown column {unknown[0]!r}"
        raise InputError(f"corpus {where} {problem} (columns: {', '.join(columns)})")
    schema = pa.schema([(name, kind) for name, kind in columns.items() if name in table.column_names])
    try:
        table = table.select(schema.names).replace_schema_metadata(None).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"corpus {where} has a column of another type: {error}") from None
    for name in (*REQUIRED_COLUMNS, *(["next_token"] if "next_token" in table.column_names else [])):
        if table[name].null_count:
            row = pc.index(pc.is_null(table[name]), True).as_py()
            raise InputError(f"corpus {where}, row {row}: {name} is empty")
    counts = pc.value_counts(table["utterance_id"])
    repeated = [entry["values"] for entry in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()]
    if repeated:
        raise InputError(f"corpus {where} has the utterance_id {repeated[0]!r} more than once")
    wrong_split = pc.invert(functools.reduce(pc.or_, (pc.equal(table["split"], split) for split in SPLITS)))
    _refuse(table, wrong_split, where, f"its split is none of {', '.join(SPLITS)}")
    for name in ("text_tokens", "speech_tokens"):
        empty = pc.equal(pc.list_value_length(table[name]), 0)
        if name == "text_tokens" and is_text_only(table):
            continue
        if name == "speech_tokens":
            empty = pc.and_(empty, pc.not_equal(table["split"], "test"))
        _refuse(table, empty, where, f"it has no {name}")
    for name in _TOKEN_COLUMNS:
        if name in table.column_names:
            _refuse_tokens(table, name, lambda tokens: pc.or_kleene(pc.is_null(tokens), pc.less(tokens, 0)), where)
    if "next_token" in table.column_names:
        _refuse(table, pc.less(table["next_token"], 0), where, "its next_token is negative")
    return table


def _refuse_tokens(table: pa.Table, name: str, is_wrong: Callable[[pa.Array], pa.Array], where: str) -> None:
    """Refuse a table with a token that is missing or negative, naming its utterance."""
    rows_before = 0
    for chunk in table[name].chunks:
        wrong = pc.index(is_wrong(chunk.flatten()), True).as_py()
        if wrong >= 0:
            row = rows_before + pc.list_parent_indices(chunk)[wrong].as_py()
            utterance_id = table["utterance_id"][row].as_py()
            token = chunk.flatten()[wrong].as_py()
            what = "a missing token" if token is None else f"the negative token {token}"
            raise InputError(f"corpus {where}: utterance {utterance_id!r} is invalid: {what} in {name}")
        rows_before += len(chunk)


def _refuse(table: pa.Table, invalid: pa.ChunkedArray, where: str, problem: str) -> None:
    row = pc.index(invalid, True).as_py()
    if row >= 0:
        raise InputError(f"corpus {where}: utterance {table['utterance_id'][row].as_py()!r} is invalid: {problem}")


def _content_hash(table: pa.Table) -> str:
    """SHA-256 over names, values and lengths; the same for every chunking and encoding of the same rows."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table[name]
        digest.update(f"{name}\0{column.type}\0{len(column)}\0".encode())
        values, lengths = hashlib.sha256(), hashlib.sha256()
        for chunk in column.chunks:
            if pa.types.is_integer(chunk.type):
                values.update(chunk.to_numpy().astype("<i4").tobytes())
                continue
            nested = pa.types.is_list(chunk.type)
            sizes = pc.list_value_length(chunk) if nested else pc.binary_length(chunk)
            lengths.update(pc.fill_null(sizes, -1).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
            if nested:
                values.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("<i4").tobytes())
            else:
                values.update("".join(value for value in chunk.to_pylist() if value is not None).encode())
        digest.update(lengths.digest() + values.digest())
    return digest.hexdigest()
