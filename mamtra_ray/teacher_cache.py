"""Verb ``teacher_cache``: run the teacher over the corpus once and keep its outputs, for every later training.

Ray Data actors hold the teacher; each turns one shard's utterances at a time into one Parquet file. A shard is
a pure function of teacher, corpus and format, and appears whole or not at all, so a job that was killed
anywhere goes on with the shards that are missing and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError

from mamtra_ray.artifacts import check_made_by
from mamtra_ray.cache_formats import format_settings
from mamtra_ray.cache_inventory import check_unowned_folder, opened
from mamtra_ray.cache_manifest import (
    CacheManifest,
    DamagedManifestError,
    PlannedShard,
    Shard,
    plan_shards,
    read_cache_manifest,
    write_manifest,
)
from mamtra_ray.cache_storage import Storage
from mamtra_ray.cluster import connect
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments
from mamtra_ray.corpus import check_vocabulary, corpus_identity, first_rows_within, read_corpus, token_counts
from mamtra_ray.environment import note_session
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.hidden_quantizer import CALIBRATION_TOKENS, QUANTIZER_FILE
from mamtra_ray.teacher_pass import CacheJob, ShardWriter, learn_quantizer, sha256
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.base import Teacher


def build_cache(
    config: Config,
    folder: Path | str,
    *,
    repair: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> CacheManifest:
    """Make the teacher cache of the train and validation splits in ``folder``, or complete or reuse it.

    Everything that is already there is verified. A cache of more utterances than asked for is reused as it
    is; one of fewer is extended. Ray must be initialised.

    Args:
        config: sections teacher, corpus and cache.
        folder: local path, or URI of any pyarrow or fsspec file system.
        repair: compute damaged or missing shards again and delete foreign ones, instead of refusing them.
        on_progress: called with the speech tokens done and in all.

    Raises:
        InputError: the folder holds a cache of another teacher, tokenizer, corpus or format; shards are
            damaged; another job writes there; the disk is full; or the teacher lacks a layer of ``cache.layers``.
    """
    storage = Storage.of(folder)
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    corpora = {split: read_corpus(config.corpus.path, split) for split in ("train", "validation")}
    num_layers = teacher.model.layout.num_layers
    if any(layer >= num_layers for layer in config.cache.layers):
        raise InputError(f"cache.layers has layer {max(config.cache.layers)}, the teacher only 0 to {num_layers - 1}")
    identity = corpus_identity(corpora["train"])
    for table in corpora.values():
        check_vocabulary(table, teacher.sequence.vocabulary.text_size, teacher.sequence.vocabulary.speech_size)
    made_by = {
        "teacher": teacher.fingerprint,
        "tokenizer": identity.tokenizer,
        "corpus": identity.corpus_hash,
        "format": format_settings(config.cache),
    }
    with storage.locked():
        storage.remove_unfinished()
        manifest = _opened_manifest(storage, made_by, teacher, config, repair)
        manifest, missing = opened(storage, manifest, _wanted(config, manifest, corpora), repair)
        done = sum(shard.speech_tokens for shard in manifest.shards.values())
        total = done + sum(shard.speech_tokens for shard in missing.values())
        if on_progress is not None:
            on_progress(done, total)
        if not missing and manifest.complete:
            return manifest
        write_manifest(storage, manifest)
        job = CacheJob(config.teacher.kind, config.teacher.path, storage, made_by)
        if config.cache.format == "hidden_quantized":
            quantizer = _quantizer(storage, manifest, job, corpora["train"], config.cache.bits)
            job = dataclasses.replace(job, quantizer=quantizer)
            manifest = dataclasses.replace(manifest, files={QUANTIZER_FILE: sha256(quantizer)})
            write_manifest(storage, manifest)
        shards = dict(manifest.shards)
        for name, shard in _run(job, missing, corpora, config.cache.actors):
            shards[name] = shard
            done += shard.speech_tokens
            if on_progress is not None:
                on_progress(done, total)
        # A worker that was killed and replaced has left its temporary file.
        storage.remove_unfinished()
        manifest = dataclasses.replace(manifest, shards=dict(sorted(shards.items())), complete=True)
        write_manifest(storage, manifest)
    return manifest


def _opened_manifest(
    storage: Storage, made_by: Mapping[str, Any], teacher: Teacher, config: Config, repair: bool
) -> CacheManifest:
    """The folder's manifest, checked to be of these inputs; a new one if there is none."""
    try:
        manifest = read_cache_manifest(storage)
    except DamagedManifestError:
        if not repair:
            raise
        manifest = None
    if manifest is not None:
        check_made_by(str(storage), manifest.made_by, made_by)
        return manifest
    check_unowned_folder(storage)
    return CacheManifest(made_by, teacher.model.config.hidden_size, config.cache.utterances_per_shard, False, {})


def _wanted(config: Config, manifest: CacheManifest, corpora: Mapping[str, pa.Table]) -> dict[str, PlannedShard]:
    """The shards of the utterances that the configuration asks for."""
    limits = {"train": config.corpus.train_tokens, "validation": config.corpus.validation_tokens}
    wanted: dict[str, PlannedShard] = {}
    for split, table in corpora.items():
        counts = token_counts(table, "speech_tokens")
        limit = limits[split]
        counts = counts if limit is None else counts[: first_rows_within(counts, limit)]
        size = manifest.utterances_per_shard
        wanted |= {part.name(size): part for part in plan_shards(split, counts, size)}
    return wanted


def _quantizer(storage: Storage, manifest: CacheManifest, job: CacheJob, train: pa.Table, bits: float) -> bytes:
    """The quantiser of the folder; learnt from the first rows of the training split if it is not there yet."""
    listed = manifest.files.get(QUANTIZER_FILE)
    with contextlib.suppress(FileNotFoundError):
        content = storage.read(QUANTIZER_FILE).to_pybytes()
        # Without an entry in the manifest the job that wrote it was stopped: not trusted, learnt again.
        if listed == sha256(content):
            return content
    count = first_rows_within(token_counts(train, "speech_tokens"), CALIBRATION_TOKENS)
    task = ray.remote(learn_quantizer).options(**_resources())
    quantizer: bytes = _get(task.remote(job, train.slice(0, count), bits))
    if listed not in (None, sha256(quantizer)):
        raise InputError(f"{storage.child(QUANTIZER_FILE)} is damaged and cannot be made again; make a new cache")
    storage.write(QUANTIZER_FILE, quantizer)
    return quantizer


def _run(
    job: CacheJob, missing: Mapping[str, PlannedShard], corpora: Mapping[str, pa.Table], actors: int | None
) -> Iterator[tuple[str, Shard]]:
    """Compute the missing shards by Ray Data; yields each when it is written."""
    if not missing:
        return
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = min(len(missing), actors or max(1, gpus))
    # One row is one whole shard: however Ray Data cuts its blocks, a shard is never divided.
    rows = [
        {
            "name": name,
            "planned": dataclasses.asdict(planned),
            "utterances": _ipc(corpora[planned.split].slice(planned.first, planned.utterances)),
        }
        for name, planned in sorted(missing.items(), key=lambda item: -item[1].speech_tokens)
    ]
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    # The plan and the operators of every run are Ray's business, not the user's; its log file keeps them.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    written = dataset.map_batches(
        ShardWriter,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        **_resources(),
    )
    with contextlib.closing(_rows(written)) as results:
        for row in results:
            if row["error"]:
                raise InputError(row["error"])
            planned = dataclasses.asdict(missing[row["name"]])
            yield row["name"], Shard(**planned, num_bytes=row["num_bytes"], sha256=row["sha256"])


def _rows(dataset: ray.data.Dataset) -> Generator[dict[str, Any], None, None]:
    try:
        yield from dataset.iter_rows()
    except RayTaskError as error:
        raise _cause(error) from None


def _resources() -> dict[str, Any]:
    """Of one worker that holds the teacher: a GPU where there are any, else a CPU."""
    return {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {"num_cpus": 1}


def _get(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise _cause(error) from None


def _cause(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, InputError) else error


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _plan(config: Config, folder: str) -> str:
    """What the verb would do, for ``--dry-run``."""
    limits = {"train": config.corpus.train_tokens, "validation": config.corpus.validation_tokens}
    positions = 0
    for split, limit in limits.items():
        counts = token_counts(read_corpus(config.corpus.path, split, max_speech_tokens=limit), "speech_tokens")
        positions += int(counts.sum()) + len(counts)
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    width = teacher.model.config.hidden_size
    settings = format_settings(config.cache)
    bytes_per_token = {
        "hidden": 2 * width * (1 + len(config.cache.layers)),
        "topk": 3 * config.cache.top_k,
        "hidden_quantized": config.cache.bits / 8 * width,
    }
    return (
        f"teacher {config.teacher.path or config.teacher.kind} over {positions:,} positions, kept as {settings}: "
        f"about {positions * bytes_per_token[config.cache.format] / 1e6:,.1f} MB in {folder}"
    )


class _ProgressLine:
    """Tokens done, tokens a second and the time left; a line every few seconds."""

    def __init__(self) -> None:
        self.began, self.last = time.monotonic(), 0.0
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.began = done, now
        if done < total and now - self.last < 5:
            return
        self.last = now
        rate = (done - self.first) / max(1e-9, now - self.began)
        left = f"{(total - done) / rate:,.0f} s left" if rate else "..."
        print(f"{done:,}/{total:,} speech tokens  {rate:,.0f} tokens/s  {left}", flush=True)


@exit_code_2_on_input_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.teacher_cache", description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--cache", metavar="DIR_OR_URI", help="where the cache lies (default: <run>/cache)")
    parser.add_argument("--repair", action="store_true", help="compute damaged or missing shards again")
    parser.add_argument("--address", help="Ray cluster to join (default: $RAY_ADDRESS, else this machine)")
    arguments = parser.parse_intermixed_args(argv)
    config, run = config_from_arguments(arguments)
    folder = arguments.cache or str(run / "cache")
    if arguments.dry_run:
        print(_plan(config, folder))
        return 0
    cluster = connect(arguments.address)
    if not arguments.cache:
        for line in note_session(run, cluster.resources):
            print(line)
    manifest = build_cache(config, folder, repair=arguments.repair, on_progress=_ProgressLine())
    tokens = sum(manifest.speech_tokens(split) for split in ("train", "validation"))
    print(
        f"{folder}: {len(manifest.shards)} shards, {tokens:,} speech tokens, {manifest.num_bytes / 1e6:,.1f} MB, "
        f"{manifest.bytes_per_token:,.1f} bytes a position, verified"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
