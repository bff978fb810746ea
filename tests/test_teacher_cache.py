"""The teacher cache: right rows, refused when foreign or damaged, and the same bytes after any interruption."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_cache import LocalTeacher, cache_without_ray, random_rows, tiny_config
from tiny_models import SEQUENCE, SPEECH, transformers_model

from mamtra_ray.config import Config
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import read_corpus
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.teacher_cache import build as teacher_cache
from mamtra_ray.teacher_cache.__main__ import main
from mamtra_ray.teacher_cache.batches import batches
from mamtra_ray.teacher_cache.manifest import (
    MANIFEST,
    CacheManifest,
    PlannedShard,
    complete_manifest,
    read_cache_manifest,
    unlisted_shard,
    write_manifest,
)
from mamtra_ray.teacher_cache.quantizer import QUANTIZER_FILE
from mamtra_ray.teacher_cache.shared import share_cache
from mamtra_ray.teacher_cache.storage import LOCK_FILE, Storage
from mamtra_ray.teacher_cache.worker import CacheJob, ShardWriter
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.huggingface import write_format
from mamtra_ray.teachers.shared import share_teacher

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A configuration and its cache, 5 shards of the train split and 1 of validation; tests copy it."""
    folder = tmp_path_factory.mktemp("cache")
    config = tiny_config(folder)
    cache_without_ray(config, folder / "cache")
    return config, folder / "cache"


@pytest.fixture
def cache(made: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    config, folder = made
    shutil.copytree(folder, tmp_path / "cache")
    return config, tmp_path / "cache"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must be decided without computing anything fails if it computes."""

    def refuse(job: CacheJob, missing: Any, *_: object) -> Iterator[Any]:
        assert not missing, "a shard would be computed"
        return iter(())

    monkeypatch.setattr(teacher_cache, "_run", refuse)
    monkeypatch.setattr(f"{__name__}.share_teacher", LocalTeacher)


def build_cache(config: Config, folder: Path | str, **options: Any) -> CacheManifest:
    """The cache of a configuration, its teacher shared as a session does it."""
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    return teacher_cache.build_cache(
        config.cache,
        config.corpus,
        folder,
        teacher=teacher,
        shared_teacher=share_teacher(teacher),
        worker=WorkerResources(),
        **options,
    )


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


# -- content ------------------------------------------------------------------------------------------------


def test_ray_builds_the_rows_of_transformers_own_model(ray_cluster: None, tmp_path: Path) -> None:
    rows = random_rows()
    config = tiny_config(tmp_path, rows=rows)
    progress: list[tuple[int, int]] = []
    manifest = build_cache(config, tmp_path / "cache", on_progress=lambda *counts: progress.append(counts))
    total = sum(len(row["speech_tokens"]) for row in rows)
    assert progress[0] == (0, total) and progress[-1] == (total, total) and progress == sorted(progress)
    assert len(progress) == 7 and manifest.speech_tokens("train") + manifest.speech_tokens("validation") == total
    model = transformers_model()
    for split in ("train", "validation"):
        stored = [
            r for name, _ in manifest.split_shards(split) for r in pq.read_table(tmp_path / "cache" / name).to_pylist()
        ]
        expected = {row["utterance_id"]: row for row in rows if row["split"] == split}
        order = drawn(read_corpus(config.corpus.path, split), config.corpus.seed)["utterance_id"].to_pylist()
        assert [r["utterance_id"] for r in stored] == order and set(order) == set(expected)
        for found in stored:
            row = expected[found["utterance_id"]]
            speech = [token + SPEECH.start for token in row["speech_tokens"]]
            ids = torch.tensor([[71, *row["text_tokens"], 72, 73, *speech]])
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state[0, -len(speech) - 1 :]
            half = torch.from_numpy(np.frombuffer(found["hidden"], np.float16).copy()).reshape(hidden.shape)
            torch.testing.assert_close(half.float(), hidden, rtol=1e-3, atol=1e-4)
            assert np.frombuffer(found["speech_tokens"], "<i4").tolist() == row["speech_tokens"]
            assert np.frombuffer(found["text_tokens"], "<i4").tolist() == row["text_tokens"]
            assert (found["num_text"], found["num_speech"]) == (len(row["text_tokens"]), len(speech))
    # Independent of who computes it: the same bytes as in this process, one shard after another.
    cache_without_ray(config, tmp_path / "alone")
    assert shard_bytes(tmp_path / "cache") == shard_bytes(tmp_path / "alone")


def test_a_finished_cache_is_reused_as_it_is(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != LOCK_FILE}
    manifest = build_cache(config, folder)
    assert manifest.complete and len(manifest.shards) == 6
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != LOCK_FILE}


def test_a_larger_cache_serves_a_smaller_wish(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    assert len(build_cache(changed(config, "corpus", train_tokens=100), folder).shards) == 6


def test_a_smaller_cache_is_extended_and_keeps_its_full_shards(ray_cluster: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    folder = tmp_path / "cache"
    small = build_cache(changed(config, "corpus", train_tokens=250), folder)
    partial = small.split_shards("train")[-1][0]
    assert small.shards[partial].utterances < 8
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    whole = build_cache(config, folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert [name for name in before if before[name] != after[name]] == [partial]
    cache_without_ray(config, tmp_path / "alone")
    assert shard_bytes(folder) == shard_bytes(tmp_path / "alone")
    assert sum(shard.utterances for shard in whole.shards.values()) == 46


@pytest.mark.parametrize("kind", ["hidden_quantized", "topk"])
def test_other_formats_are_built_and_described(ray_cluster: None, tmp_path: Path, kind: str) -> None:
    config = tiny_config(tmp_path, format=kind, top_k=5)
    manifest = build_cache(config, tmp_path / "cache")
    assert manifest.made_by["format"]["kind"] == kind
    assert (QUANTIZER_FILE in manifest.files) == (kind == "hidden_quantized")
    before = shard_bytes(tmp_path / "cache")
    if kind == "hidden_quantized":
        # Codes of one quantizer mean nothing to another.
        storage, (name, shard) = Storage.of(tmp_path / "cache"), next(iter(manifest.shards.items()))
        plan = PlannedShard(shard.split, shard.first, shard.utterances, shard.speech_tokens)
        assert unlisted_shard(storage, name, manifest.shards_made_by, plan) == shard
        other = dataclasses.replace(manifest, files={QUANTIZER_FILE: "0"})
        assert unlisted_shard(storage, name, other.shards_made_by, plan) is None
        # A stopped job's quantizer is learned again, and gives the same bytes.
        shutil.copytree(tmp_path / "cache", tmp_path / "again")
        for name in (MANIFEST, QUANTIZER_FILE, "train-00001.parquet"):
            (tmp_path / "again" / name).unlink()
        build_cache(config, tmp_path / "again")
        assert shard_bytes(tmp_path / "again") == before


# -- trust --------------------------------------------------------------------------------------------------


def test_a_cache_of_something_else_is_refused_and_says_of_what(
    cache: tuple[Config, Path], tmp_path: Path, no_ray: None
) -> None:
    config, folder = cache
    before = shard_bytes(folder)
    others = {
        "another teacher": tiny_config(tmp_path / "teacher", seed=1),
        "another tokenizer": tiny_config(tmp_path / "tokenizer", tokenizer="bpe"),
        "another corpus": tiny_config(tmp_path / "corpus", rows=random_rows(seed=5)),
        "another format": changed(config, "cache", format="topk"),
    }
    for message, other in others.items():
        for repair in (False, True):
            with pytest.raises(InputError, match=f"{folder} was made with {message}"):
                build_cache(other, folder, repair=repair)
    assert shard_bytes(folder) == before


def test_a_corpus_of_unknown_tokens_is_refused(tmp_path: Path, no_ray: None) -> None:
    rows = random_rows()
    rows[3]["speech_tokens"][0] = 41
    with pytest.raises(InputError, match="'utterance 3' has speech token 41"):
        build_cache(tiny_config(tmp_path, rows=rows), tmp_path / "cache")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "is truncated": truncate,
    "is damaged": flip_a_bit,
    "is missing": Path.unlink,
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_bad_shard_is_named_by_every_reader(cache: tuple[Config, Path], problem: str, no_ray: None) -> None:
    config, folder = cache
    DAMAGE[problem](folder / "train-00003.parquet")
    with pytest.raises(InputError, match=rf"shard train-00003.parquet {problem}.*--repair") as error:
        build_cache(config, folder)
    assert "train-00002" not in str(error.value)


def test_repair_computes_only_the_bad_shards(ray_cluster: None, cache: tuple[Config, Path]) -> None:
    config, folder = cache
    good = shard_bytes(folder)
    untouched = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    for number, damage in enumerate(DAMAGE.values()):
        damage(folder / f"train-0000{number}.parquet")
    (folder / "train-00099.parquet").write_bytes(good["train-00004.parquet"])
    (folder / "copy.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"copy.parquet is not in its manifest; .*train-00000.*train-00099"):
        build_cache(config, folder)
    manifest = build_cache(config, folder, repair=True)
    assert manifest.complete and shard_bytes(folder) == good
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert {name for name in after if after[name] != untouched[name]} == {f"train-0000{n}.parquet" for n in range(3)}


def test_damaged_foreign_and_future_manifests_are_refused(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    content = json.loads((folder / MANIFEST).read_text())
    for text, message in {
        "{": "damaged",
        "[]": "damaged",
        json.dumps({**content, "kind": "finalist"}): "kind is 'finalist'",
        json.dumps({**content, "schema_version": 7}): "schema version 7",
        json.dumps({**content, "shards": {"a": {}}}): "damaged",
    }.items():
        (folder / MANIFEST).write_text(text)
        with pytest.raises(InputError, match=message):
            build_cache(config, folder)
        # Somebody else's manifest, or one from the future, is not a damage to repair.
        if message.startswith(("kind", "schema")):
            with pytest.raises(InputError, match=message):
                build_cache(config, folder, repair=True)
            assert (folder / MANIFEST).read_text() == text


def test_no_flipped_bit_of_a_manifest_passes(cache: tuple[Config, Path]) -> None:
    _, folder = cache
    storage, good = Storage.of(folder), (folder / MANIFEST).read_bytes()
    manifest = read_cache_manifest(storage)
    random = np.random.default_rng(0)
    for position in random.choice(len(good), 300, replace=False):
        content = bytearray(good)
        content[position] ^= 1 << int(random.integers(8))
        (folder / MANIFEST).write_bytes(content)
        with contextlib.suppress(InputError):
            # White space may change.
            assert read_cache_manifest(storage) == manifest, content[max(0, position - 20) : position + 20]


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", ["part-00000.parquet", "train-00000.parquet", "train-00099.parquet"])
def test_a_folder_of_somebody_elses_parquet_is_left_alone(
    made: tuple[Config, Path], tmp_path: Path, no_ray: None, name: str, repair: bool
) -> None:
    """Such as the corpus itself, given as the cache's folder by mistake."""
    config, _ = made
    shutil.copy(config.corpus.path, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match=rf"is no teacher cache but holds Parquet files \({name}\)"):
        build_cache(config, tmp_path, repair=repair)
    assert (tmp_path / name).read_bytes() == before and not (tmp_path / MANIFEST).exists()


def test_a_lost_manifest_is_made_again_from_the_shards_alone(
    cache: tuple[Config, Path], no_ray: None, monkeypatch
) -> None:
    config, folder = cache
    manifest = complete_manifest(Storage.of(folder))
    (folder / MANIFEST).unlink()
    monkeypatch.setattr(teacher_cache, "_run", lambda job, missing, *_: iter(()) if not missing else pytest.fail())
    assert build_cache(config, folder).shards == manifest.shards


def test_a_shard_that_moved_is_not_mistaken_for_another(cache: tuple[Config, Path], no_ray: None) -> None:
    """A whole, valid shard under another one's name: without a manifest only its own metadata tell."""
    config, folder = cache
    (folder / MANIFEST).unlink()
    shutil.copy(folder / "train-00001.parquet", folder / "train-00002.parquet")
    with pytest.raises(AssertionError, match="would be computed"):
        build_cache(config, folder)


# -- interruption -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Make the operating system refuse files that grow beyond this, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_left_is_one_sentence_and_damages_nothing(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path)
    storage.write("a.parquet", b"old")
    with largest_file(1000), pytest.raises(InputError, match=r"no space left to write .*a.parquet: .* is intact"):
        storage.write("a.parquet", bytes(5000))
    assert (tmp_path / "a.parquet").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_worker_without_space_says_so_instead_of_failing(made: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = made
    storage = Storage.of(tmp_path / "full")
    teacher = LocalTeacher(load_teacher(config.teacher.kind, config.teacher.path))
    job = CacheJob(teacher, storage, complete_manifest(Storage.of(folder)).made_by)
    table = read_corpus(config.corpus.path, "train").slice(0, 8)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    plan = {"split": "train", "first": 0, "utterances": 8, "speech_tokens": 1}
    row = {"name": "train-00000.parquet", "planned": plan, "utterances": sink.getvalue().to_pybytes()}
    with largest_file(2000):
        out = ShardWriter(job)({key: np.array([value], dtype=object) for key, value in row.items()})
    assert "no space left" in out["error"][0] and not list(storage.local_folder.iterdir())


def test_a_finished_cache_is_reused_on_a_full_disk(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    with largest_file(0):
        assert build_cache(config, folder).complete
    stopped_before_the_end(folder)
    other = pytest.raises(InputError, match="being written by another process")
    with largest_file(0), Storage.of(folder).locked(), other:
        build_cache(config, folder)


def stopped_before_the_end(folder: Path) -> None:
    """As a job leaves a cache that is killed before its last write: the next one has a manifest to write."""
    storage = Storage.of(folder)
    write_manifest(storage, dataclasses.replace(complete_manifest(storage), complete=False))


def test_a_finished_cache_needs_no_lock_and_no_right_to_write(cache: tuple[Config, Path], no_ray: None) -> None:
    """Two searches may open it at once, and it may lie on a disk that is mounted read-only."""
    config, folder = cache
    (folder / LOCK_FILE).unlink(missing_ok=True)
    before = {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert build_cache(config, folder).complete
    assert {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    with Storage.of(folder).locked():
        assert build_cache(config, folder).complete
        shard = next(folder.glob("*.parquet"))
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(InputError, match="being written by process"):
            build_cache(config, folder, repair=True)


@pytest.mark.slow
def test_a_cache_on_a_read_only_disk_is_used(made: tuple[Config, Path], tmp_path: Path) -> None:
    config, finished = made
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "--bind", str(finished), str(folder)], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "a").touch()
        output, _ = (process := driver(config, folder)).communicate(timeout=240)
        assert process.returncode == 0 and "verified" in output, output
    finally:
        subprocess.run(["umount", str(folder)], check=True)


KILLED_WHILE_WRITING = """
import os, signal, sys
from mamtra_ray.teacher_cache.storage import Storage
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
Storage.of(sys.argv[1]).write("train-00002.parquet", b"a" * 100_000)
"""


def test_killed_in_the_middle_of_a_write(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    before = shard_bytes(folder)
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(folder)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert list(folder.glob(".*.partial")) and shard_bytes(folder) == before
    stopped_before_the_end(folder)
    assert build_cache(config, folder).complete
    assert not list(folder.glob(".*.partial"))


def worker_pids(name: str) -> list[int]:
    """Ray workers of the cluster that this process started, that run ``name``."""

    def parent(pid: str) -> str:
        return (Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[1]

    pids = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # Ray gives a worker its task as the title. Its parent is the raylet, which is our child.
            if name in (process / "cmdline").read_text() and parent(parent(process.name)) == str(os.getpid()):
                pids.append(int(process.name))
    return pids


def test_a_killed_actor_costs_one_shard_and_changes_nothing(
    ray_cluster: None, made: tuple[Config, Path], tmp_path: Path
) -> None:
    config, folder = made
    killed: list[int] = []

    def kill_once(done: int, total: int) -> None:
        if done and not killed:
            killed.extend(worker_pids("ShardWriter"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    build_cache(config, tmp_path / "cache", on_progress=kill_once)
    assert killed
    assert shard_bytes(tmp_path / "cache") == shard_bytes(folder)


def driver(config: Config, folder: Path, *arguments: str) -> subprocess.Popen:
    """The verb in a process and a cluster of its own."""
    command = [sys.executable, "-m", "mamtra_ray.teacher_cache", "--run", f"{folder}_run", "--address", "local"]
    overrides = [
        f"cache.location={folder}",
        f"teacher.kind={config.teacher.kind}",
        f"teacher.path={config.teacher.path}",
        f"corpus.path={config.corpus.path}",
        f"cache.utterances_per_shard={config.cache.utterances_per_shard}",
    ]
    return subprocess.Popen(
        [*command, *arguments, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shards_before_kill", [0, 1, 3])
def test_a_killed_driver_goes_on_where_it_was(
    made: tuple[Config, Path], tmp_path: Path, shards_before_kill: int
) -> None:
    config, finished = made
    folder = tmp_path / "cache"
    process = driver(config, folder)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.parquet"))) < shards_before_kill or not (folder / MANIFEST).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    # The orphaned actors end by themselves when they notice; the next job does not wait for that.
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    again = driver(config, folder)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert "verified" in output
    assert shard_bytes(folder) == shard_bytes(finished)
    assert complete_manifest(Storage.of(folder)) == complete_manifest(Storage.of(finished))
    kept = [name for name, changed_at in there.items() if (folder / name).stat().st_mtime_ns == changed_at]
    assert len(kept) >= len(there) - 1


@pytest.mark.slow
def test_a_full_disk_ends_the_verb_with_one_sentence(made: tuple[Config, Path], tmp_path: Path) -> None:
    config, finished = made
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        process = driver(config, folder)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 2 and "Traceback" not in output
        assert "error: no space left to write" in output
        subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
        process = driver(config, folder)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert shard_bytes(folder) == shard_bytes(finished)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_second_job_on_the_folder_stops_with_the_name_of_the_first(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    stopped_before_the_end(folder)
    with Storage.of(folder).locked(), pytest.raises(InputError, match=rf"being written by process {os.getpid()} on"):
        build_cache(config, folder)
    assert build_cache(config, folder).complete


# -- other file systems -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URI of an empty bucket of moto's S3 server."""
    moto = pytest.importorskip("moto.server")
    import boto3

    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "secret"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys).create_bucket(
        Bucket="bucket"
    )
    yield f"s3://testing:secret@bucket/{{}}?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    server.stop()


def test_s3_holds_the_same_bytes(
    ray_cluster: None, made: tuple[Config, Path], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = made
    uri = s3.format("one/cache")
    manifest = build_cache(config, uri)
    storage = Storage.of(uri)
    assert manifest == complete_manifest(storage)
    assert {name: storage.read(name).to_pybytes() for name in manifest.shards} == shard_bytes(folder)
    assert LOCK_FILE not in storage.names()
    made_by = manifest.made_by
    shared = share_cache(uri, teacher_fingerprint=made_by["teacher"], corpus_hash=made_by["corpus"])
    assert sum(batch.num_tokens for batch in batches(shared, SEQUENCE, tokens_per_batch=500, seed=0, epoch=0)) == sum(
        shard.speech_tokens + shard.utterances for _, shard in manifest.split_shards("train")
    )
    storage.write("train-00001.parquet", storage.read("train-00001.parquet").to_pybytes()[:-9])
    with pytest.raises(InputError, match=r"s3://bucket/one/cache: shard train-00001.parquet is truncated") as error:
        build_cache(config, uri)
    assert "secret" not in str(error.value)
    build_cache(config, uri, repair=True)
    assert storage.read("train-00001.parquet").to_pybytes() == (folder / "train-00001.parquet").read_bytes()


def test_a_lease_is_waited_for_and_expires(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamtra_ray.teacher_cache.storage.LEASE_SECONDS", 4.0)
    storage = Storage.of(s3.format("leased"))
    dead = {"host": "elsewhere", "pid": 7, "token": "x", "renewed": time.time()}
    storage.write(LOCK_FILE, json.dumps(dead).encode())
    began = time.time()
    with storage.locked():
        assert time.time() - began >= 3.9
        # Held: a second one waits in vain, because the holder is alive.
        monkeypatch.setattr("mamtra_ray.teacher_cache.storage.LEASE_SECONDS", 1e4)
        monkeypatch.setattr("mamtra_ray.teacher_cache.storage.time.monotonic", iter([0.0, 1e6]).__next__)
        with pytest.raises(InputError, match=f"process {os.getpid()}"), storage.locked():
            pass


def test_a_lost_lease_is_neither_renewed_nor_deleted(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that slept for longer than its lease must not take it back from the one that took over."""
    monkeypatch.setattr("mamtra_ray.teacher_cache.storage._RENEW_SECONDS", 0.05)
    storage = Storage.of(s3.format("lost"))
    other = json.dumps({"host": "elsewhere", "pid": 7, "token": "x", "renewed": time.time()}).encode()
    with storage.locked():
        storage.write(LOCK_FILE, other)
        time.sleep(0.5)
        assert storage.read(LOCK_FILE).to_pybytes() == other
    assert storage.read(LOCK_FILE).to_pybytes() == other


def test_a_file_uri_is_a_local_folder(cache: tuple[Config, Path], no_ray: None) -> None:
    config, folder = cache
    assert Storage.of(f"file://{folder}") == Storage.of(folder)
    assert build_cache(config, f"file://{folder}").complete


def test_an_unreachable_store_is_one_sentence(made: tuple[Config, Path], no_ray: None) -> None:
    config, _ = made
    with pytest.raises(InputError, match="no file system opens nonsense://x/y"):
        build_cache(config, "nonsense://key:secret@x/y")


def test_fsspec_file_systems_work_too(made: tuple[Config, Path]) -> None:
    _, folder = made
    storage = Storage.of("memory://some/where")
    manifest = complete_manifest(Storage.of(folder))
    write_manifest(storage, manifest)
    assert read_cache_manifest(storage) == manifest and storage.names() == [MANIFEST]


# -- the verb -----------------------------------------------------------------------------------------------


def test_dry_run_and_wrong_input(made: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = made
    overrides = [f"teacher.kind={config.teacher.kind}", f"teacher.path={config.teacher.path}"]
    assert main(["--dry-run", "--run", str(tmp_path / "run"), *overrides, f"corpus.path={config.corpus.path}"]) == 0
    positions = sum(len(row["speech_tokens"]) + 1 for row in random_rows())
    assert f"{positions:,} positions" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["--dry-run", "--run", str(tmp_path / "run"), *overrides, "corpus.path=/nowhere"]) == 2
    assert "error: corpus /nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("longest", [64, 30])
def test_nothing_longer_than_the_teacher_reaches_cache_or_training(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], longest: int
) -> None:
    """A teacher that was trained on windows of ``longest`` tokens, and one utterance of 600 in either split."""
    rows = random_rows()
    for row in (rows[0], rows[-1]):
        row["speech_tokens"] = [0] * 600
    config = tiny_config(tmp_path, rows=rows)
    write_format(tmp_path / "teacher", SEQUENCE, 25.0, (2.0, 20.0), made_by={}, max_length=longest)
    teacher = load_teacher("huggingface", config.teacher.path)
    overhead = len(SEQUENCE.prefix) + len(SEQUENCE.separator)
    lengths = {row["utterance_id"]: overhead + len(row["text_tokens"]) + len(row["speech_tokens"]) for row in rows}
    fitting = {name for name, length in lengths.items() if length <= longest}
    assert 0 < len(fitting) < len(rows)
    notes: list[str] = []
    manifest = build_cache(config, tmp_path / "cache", on_note=notes.append)
    assert sum(shard.utterances for shard in manifest.shards.values()) == len(fitting)
    assert len(notes) == 2 and all(f"longer than the teacher's {longest} tokens" in note for note in notes)
    made_by = {"teacher_fingerprint": teacher.fingerprint, "corpus_hash": manifest.made_by["corpus"]}
    seen = 0
    for split in ("train", "validation"):
        shared = share_cache(tmp_path / "cache", split=split, **made_by)
        for batch in batches(shared, SEQUENCE, tokens_per_batch=200, seed=0, epoch=0):
            assert int(batch.attention_mask_BL.sum(1).max()) <= longest
            seen += len(batch.input_ids_BL)
    assert seen == len(fitting)
    space = [f"teacher.{name}={value}" for name, value in config.teacher.model_dump().items()]
    assert main([*space, f"corpus.path={config.corpus.path}", f"--run={tmp_path / 'run'}", "--dry-run"]) == 0
    assert f"left out: {len(rows) - len(fitting)} utterances longer" in capsys.readouterr().out
