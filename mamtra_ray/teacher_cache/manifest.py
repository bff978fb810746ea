"""The files of a teacher cache: Parquet shards with their own checksums, and the manifest that lists them.

A shard holds consecutive utterances of one split, one row each: ``utterance_id``, ``text_tokens`` and
``speech_tokens`` (int32 little-endian bytes), ``num_text``, ``num_speech``, and the teacher's rows for the
``num_speech + 1`` labeled positions in the columns of :mod:`mamtra_ray.teacher_cache.formats`. Rows of running text
have ``next_token`` too (int32 bytes), the label of their last position; empty, or without the column, it is the end.
Its Parquet metadata says what it was made from and the hash of its content, so a shard can be trusted before any
manifest lists it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mamtra_ray.artifacts import check_made_by, content_hash
from mamtra_ray.errors import InputError
from mamtra_ray.teacher_cache.storage import Storage

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
COMMAND = "python -m mamtra_ray.teacher_cache"
NEXT_TOKEN = "next_token"
_METADATA_KEY = b"mamtra_ray"
_SHARD_KIND = "teacher_cache_shard"
ROW_SCHEMA = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("text_tokens", pa.large_binary()),
        ("speech_tokens", pa.large_binary()),
        ("num_text", pa.int32()),
        ("num_speech", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PlannedShard:
    """Which utterances of a split a shard holds: ``first`` to ``first + utterances``, in corpus order."""

    split: str
    first: int
    utterances: int
    speech_tokens: int

    def name(self, utterances_per_shard: int) -> str:
        return f"{self.split}-{self.first // utterances_per_shard:05}.parquet"


@dataclass(frozen=True)
class Shard(PlannedShard):
    """A finished shard. ``num_bytes`` and ``sha256`` are of the file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class CacheManifest:
    """What a cache holds and what made it.

    Attributes:
        made_by: ``teacher`` (fingerprint), ``tokenizer``, ``corpus`` (hash), ``format`` (its settings).
        hidden_size: width D of the teacher.
        utterances_per_shard: of every shard but the last one of a split.
        complete: false while a job writes, or after it was stopped.
        shards: by file name.
        files: SHA-256 of the other files that reading needs, by name.
    """

    made_by: Mapping[str, Any]
    hidden_size: int
    utterances_per_shard: int
    complete: bool
    shards: Mapping[str, Shard]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shards_made_by(self) -> dict[str, Any]:
        """What a shard's bytes follow from: codes of one quantizer mean nothing to another."""
        return {**self.made_by, **self.files}

    def split_shards(self, split: str) -> list[tuple[str, Shard]]:
        """Names and shards of one split, in corpus order."""
        return sorted(((n, s) for n, s in self.shards.items() if s.split == split), key=lambda item: item[1].first)

    def speech_tokens(self, split: str) -> int:
        return sum(shard.speech_tokens for _, shard in self.split_shards(split))

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards.values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all shards, everything included, per labeled position."""
        return self.num_bytes / max(1, sum(s.speech_tokens + s.utterances for s in self.shards.values()))


def plan_shards(split: str, speech_token_counts: np.ndarray, utterances_per_shard: int) -> list[PlannedShard]:
    """Cut a split into shards; a longer split begins with the same full shards as a shorter one."""
    starts = range(0, len(speech_token_counts), utterances_per_shard)
    parts = [(first, speech_token_counts[first : first + utterances_per_shard]) for first in starts]
    return [PlannedShard(split, first, len(part), int(part.sum())) for first, part in parts]


class DamagedManifestError(InputError):
    """It was a teacher cache's, but cannot be read any more: what a repair may replace."""


def write_manifest(storage: Storage, manifest: CacheManifest) -> None:
    """Write it with a hash of itself."""
    content = {"kind": "teacher_cache", "schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest)}
    content["hash"] = content_hash(content)
    storage.write(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_cache_manifest(storage: Storage, expected: Mapping[str, Any] | None = None) -> CacheManifest | None:
    """Read and check the manifest; None if the folder has none.

    Args:
        storage: the cache.
        expected: entries that ``made_by`` must have.

    Raises:
        DamagedManifestError: it is no JSON, incomplete, or its hash differs.
        InputError: no teacher cache's, of another version, or made from something else (says from what).
    """
    where = storage.child(MANIFEST)
    try:
        content = json.loads(storage.read(MANIFEST).to_pybytes())
        kind, version = content["kind"], content["schema_version"]
        if kind != "teacher_cache":
            raise InputError(f"{where} is no manifest of a teacher cache: its kind is {kind!r}")
        if version != SCHEMA_VERSION:
            raise InputError(f"{where} has schema version {version!r}, this code reads version {SCHEMA_VERSION}")
        if content.pop("hash") != content_hash(content):
            raise ValueError("its hash differs")
        fields = {field.name: content[field.name] for field in dataclasses.fields(CacheManifest)}
        fields["shards"] = {name: Shard(**shard) for name, shard in fields["shards"].items()}
        manifest = CacheManifest(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedManifestError(
            f"{where} is damaged ({error}): with --repair {COMMAND} makes it again from the shards"
        ) from None
    check_made_by(str(storage), manifest.made_by, expected or {})
    return manifest


def complete_manifest(storage: Storage, expected: Mapping[str, Any] | None = None) -> CacheManifest:
    """The manifest of a finished cache.

    Raises:
        InputError: as :func:`read_cache_manifest`; or there is no cache, or it was stopped half-way.
    """
    manifest = read_cache_manifest(storage, expected)
    if manifest is None:
        raise InputError(f"{storage.child(MANIFEST)} does not exist: make the cache with {COMMAND}")
    if not manifest.complete:
        raise InputError(f"{storage} is not finished; the same {COMMAND} goes on where it stopped")
    return manifest


def shard_table(rows: Sequence[Mapping[str, Any]], format_columns: Iterable[str]) -> pa.Table:
    """Rows as a table with the columns of the module docstring."""
    schema = pa.schema([*ROW_SCHEMA, *[pa.field(name, pa.large_binary()) for name in format_columns]])
    return pa.Table.from_pylist(list(rows), schema=schema)


def encode_shard(table: pa.Table, made_by: Mapping[str, Any], planned: PlannedShard, compression: str) -> pa.Buffer:
    """The bytes of a shard's file; equal rows give equal bytes."""
    metadata = {
        "kind": _SHARD_KIND,
        "schema_version": SCHEMA_VERSION,
        "made_by": dict(made_by),
        "planned": dataclasses.asdict(planned),
        "content_sha256": _content_hash(table),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)}),
        sink,
        compression=compression,
        # Codes of one page share zstd's tables, so pages are large; dictionaries never pay for raw rows.
        use_dictionary=False,
        data_page_size=1 << 22,
        write_statistics=False,
        store_schema=True,
    )
    return sink.getvalue()


def finished_shard(planned: PlannedShard, content: pa.Buffer) -> Shard:
    """The manifest's entry for a shard's file."""
    digest = hashlib.sha256(content).hexdigest()
    return Shard(**dataclasses.asdict(planned), num_bytes=content.size, sha256=digest)


def unlisted_shard(storage: Storage, name: str, made_by: Mapping[str, Any], planned: PlannedShard) -> Shard | None:
    """A shard that a stopped job left, if it is whole and holds exactly ``planned``; else None.

    Used where no manifest lists the file: everything is read and its content hash computed again.
    """
    content = storage.read(name)
    try:
        table = pq.read_table(pa.BufferReader(content))
        metadata = json.loads(table.schema.metadata[_METADATA_KEY])
        fits = (
            metadata["schema_version"] == SCHEMA_VERSION
            and metadata["made_by"] == dict(made_by)
            and metadata["planned"] == dataclasses.asdict(planned)
            and metadata["content_sha256"] == _content_hash(table)
        )
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return finished_shard(planned, content) if fits else None


def is_foreign(storage: Storage, name: str) -> bool:
    """Whether a file is sound Parquet that no teacher cache wrote: somebody's data, whatever its name."""
    try:
        metadata = pq.read_schema(pa.BufferReader(storage.read(name))).metadata or {}
        return json.loads(metadata[_METADATA_KEY])["kind"] != _SHARD_KIND
    except (pa.ArrowException, OSError):
        return False
    except (ValueError, KeyError, TypeError):
        return True


def shard_problem(storage: Storage, name: str, shard: Shard) -> str | None:
    """What is wrong with a listed shard's file, as half a sentence; None if it is intact."""
    try:
        content = storage.read(name)
    except FileNotFoundError:
        return "is missing"
    return _content_problem(content, shard)


def read_shard(storage: Storage, name: str, shard: Shard) -> pa.Table:
    """Read a listed shard, checked.

    Raises:
        InputError: names the shard that is missing, truncated or damaged.
    """
    try:
        content = storage.read(name)
        problem = _content_problem(content, shard)
    except FileNotFoundError:
        problem = "is missing"
    if problem is not None:
        raise InputError(damage_report(storage, {name: problem}))
    return pq.read_table(pa.BufferReader(content), use_threads=False).replace_schema_metadata(None)


def damage_report(storage: Storage, problems: Mapping[str, str]) -> str:
    """One sentence for all that is wrong with a cache."""
    listed = "; ".join(f"shard {name} {problem}" for name, problem in sorted(problems.items())[:8])
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return f"teacher cache {storage}: {listed}{more} (run {COMMAND} with --repair to compute only these again)"


def _content_problem(content: pa.Buffer, shard: Shard) -> str | None:
    if content.size < shard.num_bytes:
        return f"is truncated ({content.size:,} of {shard.num_bytes:,} bytes)"
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        return "is damaged (its checksum differs)"
    return None


def _content_hash(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        digest.update(f"{name}\0{len(column)}\0".encode())
        if pa.types.is_integer(column.type):
            digest.update(column.to_numpy().tobytes())
            continue
        for value in column:
            buffer = value.as_buffer()
            digest.update(buffer.size.to_bytes(8, "little"))
            digest.update(buffer)
    return digest.hexdigest()
