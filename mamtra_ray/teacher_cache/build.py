"""Run the teacher over the corpus once and keep its outputs, for every later training.

Ray Data actors hold the teacher; each turns one shard's utterances at a time into one Parquet file. A shard is
a pure function of teacher, corpus and format, and appears whole or not at all, so a job that was killed
anywhere goes on with the shards that are missing and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError

from mamtra_ray.artifacts import check_made_by
from mamtra_ray.config import CacheConfig, CorpusConfig
from mamtra_ray.corpus.selection import usable
from mamtra_ray.corpus.table import (
    CorpusIdentity,
    check_tokenizer,
    check_vocabulary,
    corpus_identity,
    first_rows_within,
    read_corpus,
    token_counts,
)
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.teacher_cache.formats import format_settings
from mamtra_ray.teacher_cache.inventory import check_unowned_folder, opened, take_inventory
from mamtra_ray.teacher_cache.manifest import (
    CacheManifest,
    DamagedManifestError,
    PlannedShard,
    Shard,
    plan_shards,
    read_cache_manifest,
    write_manifest,
)
from mamtra_ray.teacher_cache.quantizer import CALIBRATION_TOKENS, QUANTIZER_FILE
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teacher_cache.worker import CacheJob, ShardWriter, learn_quantizer, sha256
from mamtra_ray.teachers.shared import SharedTeacher
from mamtra_ray.teachers.teacher import Teacher


def cache_made_by(
    config: CacheConfig, teacher_fingerprint: str, corpus: CorpusIdentity, *, seed: int, longest: int | None
) -> dict[str, Any]:
    """Identifies a cache: all that its rows' bytes depend on. How many rows it has is no part of that.

    Args:
        config: form of the rows.
        teacher_fingerprint, corpus: what they are made from.
        seed: ``corpus.seed``, which gives their order.
        longest: tokens of the teacher's longest sequence, beyond which they are left out.
    """
    return {
        "teacher": teacher_fingerprint,
        "tokenizer": corpus.tokenizer,
        "corpus": corpus.corpus_hash,
        "format": format_settings(config),
        "selection": {"seed": seed, "longest": longest},
    }


def build_cache(
    config: CacheConfig,
    corpus: CorpusConfig,
    folder: Path | str,
    *,
    teacher: Teacher,
    shared_teacher: SharedTeacher,
    worker: WorkerResources,
    repair: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_activity: Callable[[str], None] = lambda what: None,
) -> CacheManifest:
    """Make the teacher cache of the train and validation splits in ``folder``, or complete or reuse it.

    Utterances are taken in the order of :func:`mamtra_ray.corpus.selection.usable`.

    Everything that is already there is verified. A cache of more utterances than asked for is reused as it
    is; one of fewer is extended, by one job at a time. Ray must be initialized.

    Args:
        config: form of the rows; shards and actors.
        corpus: which one, and how much of it.
        folder: local path, or URI of any pyarrow or fsspec file system.
        teacher, shared_teacher: the same, for the driver and for its workers.
        worker: what an actor asks Ray for.
        repair: compute damaged or missing shards again and delete foreign ones, instead of refusing them.
        on_progress: called with the speech tokens done and in all.
        on_note: called with what the user should know, such as how many utterances are left out.
        on_activity: called with what is done beside shards, in words.

    Raises:
        InputError: the folder holds a cache of another teacher, tokenizer, corpus or format; shards are
            damaged; another job writes there; the disk is full; or the teacher lacks a layer of ``cache.layers``.
    """
    on_activity("reading the corpus, verifying what is there")
    storage = Storage.of(folder)
    whole = {split: read_corpus(corpus.path, split) for split in ("train", "validation")}
    overhead, longest = teacher.sequence.overhead, teacher.max_length
    corpora = {split: usable(table, split, overhead, longest, corpus.seed) for split, table in whole.items()}
    if longest is not None and on_note is not None:
        for split, table in whole.items():
            if left_out := len(table) - len(corpora[split]):
                on_note(
                    f"{left_out:,} utterances of {split} are longer than the teacher's {longest:,} tokens: left out"
                )
    num_layers = teacher.model.layout.num_layers
    if any(layer >= num_layers for layer in config.layers):
        raise InputError(f"cache.layers has layer {max(config.layers)}, the teacher only 0 to {num_layers - 1}")
    identity = corpus_identity(corpora["train"])
    for table in corpora.values():
        check_tokenizer(table, teacher.tokenizer)
        check_vocabulary(table, teacher.sequence.vocabulary.text_size, teacher.sequence.vocabulary.speech_size)
    made_by = cache_made_by(config, teacher.fingerprint, identity, seed=corpus.seed, longest=longest)
    if (finished := _finished(storage, made_by, lambda manifest: _wanted(corpus, manifest, corpora))) is not None:
        if on_progress is not None:
            done = sum(shard.speech_tokens for shard in finished.shards.values())
            on_progress(done, done)
        return finished
    with storage.locked():
        storage.remove_unfinished()
        manifest = _opened_manifest(storage, made_by, teacher, config, repair)
        manifest, missing = opened(storage, manifest, _wanted(corpus, manifest, corpora), repair)
        done = sum(shard.speech_tokens for shard in manifest.shards.values())
        total = done + sum(shard.speech_tokens for shard in missing.values())
        if on_progress is not None:
            on_progress(done, total)
        if not missing and manifest.complete:
            return manifest
        write_manifest(storage, manifest)
        job = CacheJob(shared_teacher, storage, made_by)
        if config.format == "hidden_quantized":
            on_activity("learning the quantizer")
            quantizer = _quantizer(storage, manifest, job, corpora["train"], config.bits, worker)
            job = dataclasses.replace(job, quantizer=quantizer)
            manifest = dataclasses.replace(manifest, files={QUANTIZER_FILE: sha256(quantizer)})
            write_manifest(storage, manifest)
        shards = dict(manifest.shards)
        on_activity("starting actors, first shards")
        for name, shard in _run(job, missing, corpora, config.actors, worker):
            shards[name] = shard
            done += shard.speech_tokens
            if on_progress is not None:
                on_progress(done, total)
        # A worker that was killed and replaced has left its temporary file.
        storage.remove_unfinished()
        manifest = dataclasses.replace(manifest, shards=dict(sorted(shards.items())), complete=True)
        write_manifest(storage, manifest)
    return manifest


def _finished(
    storage: Storage, made_by: Mapping[str, Any], wanted: Callable[[CacheManifest], Mapping[str, PlannedShard]]
) -> CacheManifest | None:
    """The manifest of a cache that has all that is wanted, verified without a lock; None if anything is to be done.

    So a finished cache may lie where nobody can write, and any number of jobs may open it at once.
    """
    try:
        manifest = read_cache_manifest(storage)
    except DamagedManifestError:
        return None
    if manifest is None or not manifest.complete or dict(manifest.made_by) != dict(made_by):
        return None
    inventory = take_inventory(storage, manifest, wanted(manifest))
    return None if inventory.missing or inventory.problems or inventory.obsolete else manifest


def _opened_manifest(
    storage: Storage, made_by: Mapping[str, Any], teacher: Teacher, config: CacheConfig, repair: bool
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
    return CacheManifest(made_by, teacher.model.config.hidden_size, config.utterances_per_shard, False, {})


def _wanted(corpus: CorpusConfig, manifest: CacheManifest, corpora: Mapping[str, pa.Table]) -> dict[str, PlannedShard]:
    """The shards of the utterances that the configuration asks for."""
    limits = {"train": corpus.train_tokens, "validation": corpus.validation_tokens}
    wanted: dict[str, PlannedShard] = {}
    for split, table in corpora.items():
        counts = token_counts(table, "speech_tokens")
        limit = limits[split]
        counts = counts if limit is None else counts[: first_rows_within(counts, limit)]
        size = manifest.utterances_per_shard
        wanted |= {part.name(size): part for part in plan_shards(split, counts, size)}
    return wanted


def _quantizer(
    storage: Storage, manifest: CacheManifest, job: CacheJob, train: pa.Table, bits: float, worker: WorkerResources
) -> bytes:
    """The quantizer of the folder; learned from the first rows of the training split if it is not there yet."""
    listed = manifest.files.get(QUANTIZER_FILE)
    with contextlib.suppress(FileNotFoundError):
        content = storage.read(QUANTIZER_FILE).to_pybytes()
        # Without an entry in the manifest the job that wrote it was stopped: not trusted, learned again.
        if listed == sha256(content):
            return content
    count = first_rows_within(token_counts(train, "speech_tokens"), CALIBRATION_TOKENS)
    task = ray.remote(learn_quantizer).options(**worker.options())
    quantizer: bytes = _get(task.remote(job, train.slice(0, count), bits))
    if listed not in (None, sha256(quantizer)):
        raise InputError(f"{storage.child(QUANTIZER_FILE)} is damaged and cannot be made again; make a new cache")
    storage.write(QUANTIZER_FILE, quantizer)
    return quantizer


def _run(
    job: CacheJob,
    missing: Mapping[str, PlannedShard],
    corpora: Mapping[str, pa.Table],
    actors: int | None,
    worker: WorkerResources,
) -> Iterator[tuple[str, Shard]]:
    """Compute the missing shards by Ray Data; yields each when it is written."""
    if not missing:
        return
    # On CPUs one actor uses all cores best; on GPUs there is one for each.
    slots = worker.slots(ray.cluster_resources()) if worker.gpus else 1
    actors = min(len(missing), actors or max(1, slots))
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
    # Ray logs the plan and the operators of every run; they stay in its log file.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    written = dataset.map_batches(
        ShardWriter,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        **worker.options(),
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
