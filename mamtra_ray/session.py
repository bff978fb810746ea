"""One session of a run: its settings, its folder, and the two steps that all runs on a teacher and corpus share.

Results that several runs can use (teacher cache, mixer library) lie in ``shared/`` beside the run folders, named by
a hash of what made them; everything else lies in the run folder.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamtra_ray import efficiency
from mamtra_ray.align import align_mixers, load_library
from mamtra_ray.artifacts import content_hash
from mamtra_ray.candidates import check_budgets
from mamtra_ray.cluster import check_resources, connect, with_gpus
from mamtra_ray.config import Config, load_config, save_config
from mamtra_ray.corpus import corpus_identity, read_corpus
from mamtra_ray.efficiency_architectures import Architecture, decoder_architecture
from mamtra_ray.environment import note_session
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.models.granite import check_representable
from mamtra_ray.progress import Ledger, Screen
from mamtra_ray.run_folder import write_architecture
from mamtra_ray.shared_batches import padding_waste
from mamtra_ray.shared_cache import SharedCache, share_cache
from mamtra_ray.teacher_cache import build_cache
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.base import Teacher

TRAINED_FROM = ("teacher", "corpus", "cache", "student", "align", "distill")
"""Sections of the configuration that a distilled student depends on."""


@functools.lru_cache(maxsize=1)
def cached_teacher(kind: str, path: str | None) -> Teacher:
    """The teacher, loaded once per process: trial actors are reused for many layouts."""
    return load_teacher(kind, path)


@functools.lru_cache(maxsize=1)
def cached_library(folder: str, teacher_fingerprint: str) -> dict[int, dict[str, torch.Tensor]]:
    """The mixer library, loaded once per process."""
    return load_library(Path(folder), teacher_fingerprint=teacher_fingerprint)


@dataclass(frozen=True)
class Session:
    """One session of a run: its settings, its folder, and what every phase needs."""

    config: Config
    folder: Path
    teacher: Teacher
    architecture: Architecture
    corpus_hash: str
    screen: Screen
    dashboard: str
    """Where Ray's dashboard answers; ``off`` without one."""

    @property
    def num_layers(self) -> int:
        return self.teacher.model.layout.num_layers

    def made_from(self, *sections: str) -> dict[str, str]:
        """Identifies a result that depends on teacher, corpus and these sections of the configuration."""
        return {
            "teacher": self.teacher.fingerprint,
            "corpus": self.corpus_hash,
            "settings": self.config.hash_of(*sections),
        }

    def shared_folder(self, step: str, *sections: str) -> Path:
        """Where ``step`` keeps its result for all runs beside this one."""
        return self.folder.parent / "shared" / f"{step}-{content_hash(self.made_from(*sections))}"

    def costs(self, num_attention: int) -> dict[str, float]:
        """The costs of any layout with ``num_attention`` attention layers."""
        layout = Layout("A" * num_attention + "M" * (self.num_layers - num_attention))
        length = self.config.search.context_length
        return {
            "cache_bytes": efficiency.cache_bytes(self.architecture, layout, length),
            "decode_flops": efficiency.decode_flops(self.architecture, layout, length),
            "parameters": efficiency.parameters(self.architecture, layout),
        }


def start_session(config: Config, folder: Path, phases: tuple[str, ...], address: str | None) -> Session:
    """Check everything that can be checked, connect to Ray, make the run folder and keep the configuration in it.

    Raises:
        InputError: budgets or constraints that the teacher cannot meet, or a cluster that is too small or absent.
    """
    if config.cache.format == "topk" and config.distill.embedding_weight:
        raise InputError("cache.format topk keeps no hidden states for the embedding loss: distill.embedding_weight=0")
    teacher = cached_teacher(config.teacher.kind, config.teacher.path)
    check_representable(teacher.model.config)
    check_budgets(config.search, teacher.model.layout.num_layers)
    identity = corpus_identity(read_corpus(config.corpus.path))
    cluster = connect(address)
    with_devices = with_gpus(config, cluster.resources)
    check_resources(with_devices, cluster.resources)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    architecture = architecture_of(config, teacher)
    write_architecture(folder, architecture)
    screen = Screen(phases, Ledger(folder / "ledger.json"))
    for line in note_session(folder, cluster.resources):
        screen.say(line)
    return Session(
        config=with_devices,
        folder=folder,
        teacher=teacher,
        architecture=architecture,
        corpus_hash=identity.corpus_hash,
        screen=screen,
        dashboard=cluster.dashboard,
    )


def architecture_of(config: Config, teacher: Teacher) -> Architecture:
    """The shape of ``teacher`` and its students, for parameters, FLOPs and cache bytes in closed form."""
    shape, vocabulary = teacher.model.config, teacher.model.vocabulary
    tables = (vocabulary.size + vocabulary.speech_size) * shape.hidden_size
    return decoder_architecture(
        teacher.name,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        qkv_bias=shape.qkv_bias,
        table_parameters=tables + (0 if teacher.model.head.bias is None else vocabulary.speech_size),
        head_outputs=vocabulary.speech_size,
        state_sharing=config.student.state_sharing,
    )


def make_cache(session: Session) -> tuple[SharedCache, SharedCache]:
    """The teacher's outputs, once for all runs, then in the object store for all trials of this one."""
    folder = session.shared_folder("cache", "teacher", "corpus", "cache")
    with session.screen.phase("cache", f"the teacher's outputs, by Ray Data, into {folder}"):
        build_cache(session.config, folder, on_progress=lambda done, total: session.screen.count(done, total, "tokens"))
        train, validation = (
            share_cache(
                folder,
                teacher_fingerprint=session.teacher.fingerprint,
                corpus_hash=session.corpus_hash,
                split=split,
                max_tokens=limit,
            )
            for split, limit in (
                ("train", session.config.corpus.train_tokens),
                ("validation", session.config.corpus.validation_tokens),
            )
        )
        size = session.config.distill.batch_tokens
        waste = padding_waste(train, session.teacher.sequence, batch_tokens=size)
        session.screen.say(f"    {train.num_utterances:,} utterances, {waste:.1%} padding in {size:,}-token batches")
        session.screen.ledger.add("cache", padding=f"{waste:.2%}")
    return train, validation


def make_library(session: Session, train: SharedCache, validation: SharedCache) -> Path | None:
    """One mixer per layer that has learnt its attention's output, once for all runs."""
    if session.config.student.initialisation != "aligned":
        return None
    folder = session.shared_folder("mixers", "teacher", "corpus", "cache", "student", "align")
    with session.screen.phase("align", f"every layer's mixer to its attention, into {folder}"):
        align_mixers(
            session.config,
            folder,
            teacher=session.teacher,
            train=train,
            validation=validation,
            on_progress=lambda done, total: session.screen.count(done, total, "tokens"),
        )
    return folder


def check_run_folder(config: Config, folder: Path, resume: bool) -> None:
    """Refuse to mix two different searches in one folder, and to resume what never began.

    Raises:
        InputError: ``resume`` without a run in ``folder``; or another configuration's run without ``resume``.
    """
    saved = folder / "config.yaml"
    if not saved.exists():
        if resume:
            raise InputError(f"{folder} holds no run to resume (it has no config.yaml)")
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and no run (it has no config.yaml); give another folder to --run")
        return
    before = load_config(saved)
    if resume or before == config:
        return
    old, new = _flat(before.model_dump()), _flat(config.model_dump())
    key = next(key for key in new if new[key] != old.get(key))
    raise InputError(
        f"{folder} holds a run with another configuration ({key}: {old.get(key)!r}, not {new[key]!r}); "
        "add --resume to go on with the new one, or give another folder to --run"
    )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
