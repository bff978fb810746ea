"""A corpus of random utterances for the tiny teacher of :mod:`tiny_models`, and a cache of it made without Ray."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import VOCABULARY, transformers_model, write_folder

from mamtra_ray.config import Config
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import corpus_identity, read_corpus, token_counts, write_corpus
from mamtra_ray.teacher_cache.build import cache_made_by
from mamtra_ray.teacher_cache.manifest import CacheManifest, finished_shard, plan_shards, write_manifest
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teacher_cache.worker import CacheJob, TeacherPass
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.shared import SharedTeacher
from mamtra_ray.teachers.teacher import Teacher


class LocalTeacher(SharedTeacher):
    """A ``SharedTeacher`` that needs no Ray: in this process only."""

    teacher: Teacher

    def __init__(self, teacher: Teacher, cpu_offload: bool = False) -> None:
        super().__init__(teacher.fingerprint, (), cpu_offload)
        object.__setattr__(self, "teacher", teacher)

    def load(self) -> Teacher:
        return self.teacher


def random_rows(train: int = 40, validation: int = 6, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {
            "utterance_id": f"utterance {index}",
            "text": "some words",
            "text_tokens": random.integers(0, VOCABULARY.text_size, random.integers(2, 8)).tolist(),
            "speech_tokens": random.integers(0, VOCABULARY.eos_id, random.integers(3, longest)).tolist(),
            "split": "train" if index < train else "validation",
        }
        for index in range(train + validation)
    ]


def tiny_config(folder: Path, *, seed: int = 0, tokenizer: str = "tiny", rows: Any = None, **cache: Any) -> Config:
    """Write a teacher and a corpus into ``folder`` and return the configuration of a cache of them."""
    write_folder(folder / "teacher", transformers_model(seed=seed))
    write_corpus(folder / "corpus.parquet", rows or random_rows(), tokenizer=tokenizer, made_by={"test": True})
    return Config.model_validate(
        {
            "teacher": {"kind": "huggingface", "path": str(folder / "teacher")},
            "corpus": {"path": str(folder / "corpus.parquet")},
            "cache": {"utterances_per_shard": 8, **cache},
            "distill": {"hidden_weight": 0.0} if cache.get("format") == "topk" else {},
        }
    )


def cache_without_ray(config: Config, folder: Path) -> CacheManifest:
    """The cache of all utterances, by the worker's own code but in this process."""
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    storage = Storage.of(folder)
    identity = corpus_identity(read_corpus(config.corpus.path))
    made_by = cache_made_by(config.cache, teacher.fingerprint, identity, seed=config.corpus.seed, longest=None)
    size = config.cache.utterances_per_shard
    manifest = CacheManifest(made_by, teacher.model.config.hidden_size, size, True, {})
    local = LocalTeacher(teacher, config.teacher.cpu_offload)
    teacher_pass = TeacherPass(CacheJob(local, storage, made_by))
    shards = {}
    for split in ("train", "validation"):
        table = drawn(read_corpus(config.corpus.path, split), config.corpus.seed)
        for planned in plan_shards(split, token_counts(table, "speech_tokens"), size):
            content = teacher_pass.shard(planned, table.slice(planned.first, planned.utterances))
            storage.write(planned.name(size), content)
            shards[planned.name(size)] = finished_shard(planned, content)
    manifest = dataclasses.replace(manifest, shards=shards)
    write_manifest(storage, manifest)
    return manifest
