"""One session of a run: its settings, its folder, its cluster, and what every phase needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout

from mamtra_ray import efficiency
from mamtra_ray.config import Config, save_config
from mamtra_ray.corpus.check import check_text_tokens
from mamtra_ray.corpus.selection import usable
from mamtra_ray.corpus.table import CorpusIdentity, corpus_identity, read_corpus, split_of
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.run.checks import search_space
from mamtra_ray.run.folder import write_architecture
from mamtra_ray.run.identity import check_identity
from mamtra_ray.run.memory import (
    PLANNED_PHASES,
    Lengths,
    check_compiles,
    check_memory,
    machine_of,
    memory_of_phases,
    one_of_every_ratio,
)
from mamtra_ray.run.names import CONFIG, COSTS, LOCK
from mamtra_ray.run.open_run import OpenRun
from mamtra_ray.runtime.cluster import connect
from mamtra_ray.runtime.environment import note_session
from mamtra_ray.runtime.progress import Costs, Screen, said_while
from mamtra_ray.runtime.resources import WorkerResources, check_resources, worker_resources
from mamtra_ray.runtime.stopping import take_stop_signals
from mamtra_ray.teachers import cached_teacher
from mamtra_ray.teachers.outline import architecture_of
from mamtra_ray.teachers.shared import SharedTeacher, share_teacher
from mamtra_ray.teachers.teacher import Teacher


@dataclass(frozen=True)
class Session:
    """One session of a run: its settings, its folder, and what every phase needs."""

    config: Config
    folder: Path
    teacher: Teacher
    shared_teacher: SharedTeacher
    architecture: Architecture
    corpus: CorpusIdentity
    worker: WorkerResources
    screen: Screen
    dashboard: str
    """Where Ray's dashboard answers; ``off`` without one."""
    lock: FileLock
    """Held as long as this session lives; a crash leaves none."""

    @property
    def num_layers(self) -> int:
        return self.teacher.model.layout.num_layers

    @property
    def space(self) -> SearchSpace:
        """The layouts that the search may use."""
        return search_space(self.config, self.num_layers)

    @property
    def shared(self) -> Path:
        """The folder beside the run folders for what several runs can use."""
        return self.folder.parent / "shared"

    def costs(self, layout: Layout) -> dict[str, float]:
        """Cache bytes, decoding FLOPs and parameters of ``layout`` at the run's context length."""
        length = self.config.context_length
        return {
            "cache_bytes": efficiency.cache_bytes(self.architecture, layout, length),
            "decode_flops": efficiency.decode_flops(self.architecture, layout, length),
            "parameters": efficiency.parameters(self.architecture, layout),
        }


def start_session(run: OpenRun, phases: tuple[str, ...], address: str | None) -> Session:
    """Check everything that can be checked, connect to Ray, and make or lock the run folder.

    Raises:
        InputError: ratios or constraints that the teacher cannot meet, too little memory, a cluster that is too small
            or absent, a run that another process is working on, or one with results of another teacher or corpus.
    """
    config, folder = run.config, run.folder
    with said_while("loading the teacher"):
        teacher = cached_teacher(config.teacher.kind, config.teacher.path)
    search_space(config, teacher.model.layout.num_layers)
    corpus = read_corpus(config.corpus_path)
    check_text_tokens(corpus, config.teacher)
    identity = corpus_identity(corpus)
    architecture = architecture_of(teacher, config.student.state_sharing)
    if set(PLANNED_PHASES) & set(phases):
        # The others need no training split, and a corpus for evaluation may have none.
        _check_memory(config, teacher, architecture, corpus, phases, address)
    if {"trials", "distill"} & set(phases):
        check_compiles(config, address)
    with said_while("connecting to Ray"):
        cluster = connect(address)
    take_stop_signals()
    worker = worker_resources(config.resources, cluster.resources)
    check_resources(config, worker, cluster.resources)
    lock = lock_run(folder)
    check_identity(folder, teacher.fingerprint, identity.corpus_hash)
    if run.writes_config:
        save_config(config, folder / CONFIG)
    write_architecture(folder, architecture)
    screen = Screen(phases, Costs(folder / COSTS))
    for line in note_session(folder, cluster.resources):
        screen.say(line)
    return Session(
        config=config,
        folder=folder,
        teacher=teacher,
        shared_teacher=share_teacher(teacher, cpu_offload=config.teacher.cpu_offload),
        architecture=architecture,
        corpus=identity,
        worker=worker,
        screen=screen,
        dashboard=cluster.dashboard,
        lock=lock,
    )


def _check_memory(
    config: Config,
    teacher: Teacher,
    architecture: Architecture,
    corpus: pa.Table,
    phases: tuple[str, ...],
    address: str | None,
) -> None:
    """The verb ``distill`` has looked at its layout before."""
    space = search_space(config, architecture.num_layers)
    overhead, longest = teacher.sequence.overhead, teacher.max_length
    train = usable(split_of(corpus, "train"), "train", overhead, longest, config.corpus.seed)
    lengths = Lengths.of(train, overhead, config.corpus.train_tokens)
    needed = memory_of_phases(config, architecture, lengths, one_of_every_ratio(space))
    check_memory([phase for phase in needed if phase.phase in phases], machine_of(config, address))


def lock_run(folder: Path) -> FileLock:
    """Make the folder and keep others out of it while this process lives; a crash leaves no lock.

    Raises:
        InputError: another process works on this run, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another process is working on {folder}: wait for it, or give another folder to --run"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{str(folder)[:80]!r} cannot be a run folder: {reason[:80]}") from None
    return lock
