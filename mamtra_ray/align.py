"""Verb ``align``: one Mamba mixer per layer learns its attention's output, all layers in one pass over the corpus.

The result is a *mixer library*, from which any layout starts without further training::

    mixers.safetensors   layers.{i}.{parameter of MambaMixer}
    manifest.json        teacher, corpus and settings that made it; every layer's error before and after

One worker is a plain Ray task, since a Ray Train run takes 10 s and more to begin; several are a Ray Train run with
data-parallel mixers. (Splitting the layers over the workers instead would need no gradient exchange, but every worker
would repeat the teacher's pass: a third of the work on the demo.)
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError, WorkerCrashedError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamtra_ray.artifacts import (
    check_made_by,
    content_hash,
    file_hash,
    read_manifest,
    write_manifest,
    written_atomically,
)
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.mixer_training import Batch, MixerTraining
from mamtra_ray.progress import table
from mamtra_ray.shared_batches import SharedCache, batches
from mamtra_ray.teachers.base import Teacher

KIND, SCHEMA_VERSION = "mixer library", 1
WEIGHTS, MANIFEST, STATE = "mixers.safetensors", "manifest.json", "state.pt"

# Tokens of the least-squares start, per channel of the projection that it fits.
_TOKENS_PER_CHANNEL = 40
_SECONDS_PER_CHECKPOINT = 20.0
_ATTEMPTS = 3

Progress = Callable[[int, int], None]
"""Called with (done, total) training tokens."""


@dataclass(frozen=True)
class LibraryManifest:
    """What a mixer library says of itself; errors are per layer, normalised (1 = as good as writing nothing)."""

    errors_transferred: dict[int, float]
    """Held-out error of the mixers with the attention's weights."""
    errors_start: dict[int, float]
    """The same after the least-squares fit of the output projections, before the first step."""
    errors: dict[int, float]
    """After training."""
    tokens: int
    steps: int
    seconds: float
    """Of training, over all sessions; without loading and validation."""
    workers: int


@dataclass(frozen=True)
class AlignJob:
    """What a worker needs; small, since data and teacher stay in the object store."""

    config: Config
    folder: str
    made_by: dict[str, str]
    teacher: Any
    """Reference of the :class:`Teacher`."""
    train: SharedCache
    validation: SharedCache


def align_mixers(
    config: Config,
    folder: Path,
    *,
    teacher: Teacher,
    train: SharedCache,
    validation: SharedCache,
    on_progress: Progress | None = None,
) -> LibraryManifest:
    """Train the library into ``folder``, or go on with one that was stopped; one that fits is not trained again.

    Ray must be initialised.

    Args:
        config: sections align (how long, how many workers), student (state sharing) and search (CPUs and GPUs of a
            worker) count.
        folder: of the library.
        teacher, train, validation: what to learn from; validation gives the reported errors.
        on_progress: called with (done, total) training tokens.

    Raises:
        InputError: ``folder`` holds a library of another teacher, corpus or other settings.
    """
    made_by = library_made_by(config, teacher, train)
    if (folder / MANIFEST).exists():
        return read_library_manifest(folder, made_by)
    folder.mkdir(parents=True, exist_ok=True)
    job = AlignJob(config, str(folder.resolve()), made_by, [ray.put(teacher)], train, validation)
    report = on_progress or (lambda _done, _total: None)
    if config.align.workers == 1:
        _align_in_a_task(job, report)
    else:
        _align_on_ray_train(job, report)
    report(config.align.tokens, config.align.tokens)
    return read_library_manifest(folder, made_by)


def library_made_by(config: Config, teacher: Teacher, train: SharedCache) -> dict[str, str]:
    """Identifies a library: teacher, corpus, and the settings that its weights depend on."""
    settings = config.align.model_dump(exclude={"workers"}) | {
        "state_sharing": config.student.state_sharing,
        "train_speech_tokens": train.speech_tokens,
    }
    corpus = train.manifest.made_by["corpus"]
    return {"teacher": teacher.fingerprint, "corpus": corpus, "settings": content_hash(settings)}


def align(job: AlignJob, device: torch.device, rank: int = 0, world_size: int = 1) -> Iterator[int]:
    """Train in this process, as one of ``world_size``; yields the tokens done about every half second.

    The process of rank 0 keeps a checkpoint in the library's folder and writes the library at the end. A checkpoint
    of the same job is taken up.
    """
    config, folder = job.config, Path(job.folder)
    teacher: Teacher = ray.get(job.teacher[0])
    training = MixerTraining(teacher.model, config.align, config.student.state_sharing, device, world_size)

    def train_batches(epoch: int, skip: int = 0) -> Iterator[Batch]:
        return batches(
            job.train,
            teacher.sequence,
            batch_tokens=max(1, config.align.batch_tokens // world_size),
            seed=0,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            skip_batches=skip,
            device=device,
        )

    def held_out() -> dict[int, float]:
        return training.errors(
            batches(
                job.validation,
                teacher.sequence,
                batch_tokens=config.align.batch_tokens,
                seed=0,
                epoch=0,
                device=device,
            )
        )

    state = _saved_state(folder / STATE, job.made_by)
    if state is None:
        transferred = held_out()
        wanted = _TOKENS_PER_CHANNEL * teacher.model.config.mixer.inner_size // world_size
        training.fit_output_projections(_first_tokens(train_batches(epoch=0), wanted))
        start, seconds_before = held_out(), 0.0
    else:
        training.load(folder / STATE)
        transferred, start, seconds_before = state["transferred"], state["start"], state["seconds"]

    began = last_yield = last_save = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    while training.position.tokens < config.align.tokens:
        for batch in train_batches(training.position.epoch, training.position.batch):
            training.step(batch)
            now = time.monotonic()
            if rank == 0 and now - last_save > _SECONDS_PER_CHECKPOINT:
                training.save(
                    folder / STATE, made_by=job.made_by, transferred=transferred, start=start, seconds=seconds()
                )
                last_save = now
            if now - last_yield > 0.5:
                yield training.position.tokens
                last_yield = now
            if training.position.tokens >= config.align.tokens:
                break
        else:
            training.next_epoch()
    spent = seconds()
    errors = held_out()
    if rank == 0:
        manifest = LibraryManifest(
            transferred, start, errors, training.position.tokens, training.position.step, round(spent, 2), world_size
        )
        save_library(folder, training.library(), job.made_by, manifest)
        (folder / STATE).unlink(missing_ok=True)
    yield training.position.tokens


def save_library(
    folder: Path, library: dict[int, dict[str, Tensor]], made_by: dict[str, str], manifest: LibraryManifest
) -> None:
    """Write a library; the manifest last, so a folder with a manifest is complete."""
    tensors = {f"layers.{layer}.{name}": tensor for layer, part in library.items() for name, tensor in part.items()}
    with written_atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    content = dataclasses.asdict(manifest)
    write_manifest(folder / MANIFEST, KIND, SCHEMA_VERSION, made_by, sha256=file_hash(folder / WEIGHTS), **content)


def read_library_manifest(folder: Path, made_by: dict[str, str] | None = None) -> LibraryManifest:
    """Read the manifest of a library, and check what made it.

    Raises:
        InputError: no library, or one of another teacher, corpus or other settings.
    """
    path = folder / MANIFEST
    content = read_manifest(path, KIND, SCHEMA_VERSION)
    check_made_by(path, content["made_by"], made_by or {})
    try:
        fields = {field.name: content[field.name] for field in dataclasses.fields(LibraryManifest)}
        for name in ("errors_transferred", "errors_start", "errors"):
            fields[name] = {int(layer): float(error) for layer, error in fields[name].items()}
        return LibraryManifest(**fields)
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no manifest of a mixer library: {error}") from None


def load_library(folder: Path, *, teacher_fingerprint: str) -> dict[int, dict[str, Tensor]]:
    """Tensors of every layer's mixer, checked: layer -> parameter name -> tensor (float32, on the CPU).

    Raises:
        InputError: no library, one of another teacher, or a damaged one.
    """
    read_library_manifest(folder, {"teacher": teacher_fingerprint})
    path = folder / WEIGHTS
    if file_hash(path) != read_manifest(folder / MANIFEST, KIND, SCHEMA_VERSION).get("sha256"):
        raise InputError(f"{path} is not the file that {folder / MANIFEST} describes: it was changed or cut off")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    library: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, layer, parameter = name.split(".", 2)
        library.setdefault(int(layer), {})[parameter] = tensor
    return dict(sorted(library.items()))


def _align_in_a_task(job: AlignJob, report: Progress) -> None:
    total = job.config.align.tokens
    # Not Ray's own retries: they replay what a generator yielded, which a resumed training does not repeat.
    for attempt in range(1, _ATTEMPTS + 1):
        task = _align_task.options(
            num_cpus=job.config.search.cpus_per_worker, num_gpus=job.config.search.gpus_per_worker or 0
        )
        try:
            for tokens in cast(Iterable[Any], task.remote(job)):
                report(min(ray.get(tokens), total), total)
            return
        except (WorkerCrashedError, RayActorError):
            if attempt == _ATTEMPTS:
                raise


@ray.remote(num_returns="streaming", max_retries=0)
def _align_task(job: AlignJob) -> Iterator[int]:
    yield from align(job, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _align_on_ray_train(job: AlignJob, report: Progress) -> None:
    config = job.config
    gpus = config.search.gpus_per_worker or 0
    counter = _Counter.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    trainer = ray.train.torch.TorchTrainer(
        train_fn_per_worker,
        train_loop_config={"job": job, "counter": counter},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.align.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": config.search.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(Path(job.folder) / "train"),
            failure_config=ray.train.FailureConfig(max_failures=_ATTEMPTS - 1),
        ),
    )
    with _watched(counter, config.align.tokens, report):
        trainer.fit()


def train_fn_per_worker(train_loop_config: dict[str, Any]) -> None:
    """Ray Train's worker function. Its checkpoint lies in the library's folder, which all nodes must see."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    for tokens in align(train_loop_config["job"], ray.train.torch.get_device(), rank, context.get_world_size()):
        if rank == 0:
            train_loop_config["counter"].set.remote(tokens)


@ray.remote
class _Counter:
    """The tokens that rank 0 has seen."""

    def __init__(self) -> None:
        self.tokens = 0

    def set(self, tokens: int) -> None:
        self.tokens = tokens

    def get(self) -> int:
        return self.tokens


@contextmanager
def _watched(counter: Any, total: int, report: Progress) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            report(min(ray.get(counter.get.remote()), total), total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _saved_state(path: Path, made_by: dict[str, str]) -> dict[str, Any] | None:
    """A checkpoint of the same job; none if there is none, or if it belongs to another job."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True, map_location="cpu")
    return state if state["made_by"] == made_by else None


def _first_tokens(source: Iterable[Batch], tokens: int) -> Iterator[Batch]:
    """Batches until they hold ``tokens`` positions."""
    seen = 0
    for batch in source:
        yield batch
        seen += batch.input_ids_BL.numel()
        if seen >= tokens:
            return


def error_table(manifest: LibraryManifest) -> str:
    """Every layer's error: with transferred weights, after least squares, after training."""
    rows = [
        [
            layer,
            f"{manifest.errors_transferred[layer]:.3f}",
            f"{manifest.errors_start[layer]:.3f}",
            f"{manifest.errors[layer]:.3f}",
        ]
        for layer in sorted(manifest.errors)
    ]
    return table(["layer", "transferred", "least squares", "aligned"], rows)


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    from mamtra_ray.session import make_cache, make_library, start_session

    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.align", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    options = parser.parse_args(arguments)
    config, folder = config_from_arguments(options)
    if options.dry_run:
        print(f"align: {config.align.tokens:,} tokens on {config.align.workers} worker(s), into {folder.parent}/shared")
        return 0
    session = start_session(config, folder, ("cache", "align"), options.address)
    library = make_library(session, *make_cache(session))
    if library is None:
        raise InputError(
            f"student.initialisation is {config.student.initialisation}: nothing to align (set it to aligned)"
        )
    manifest = read_library_manifest(library)
    print(error_table(manifest))
    print(f"\n{manifest.tokens:,} tokens in {manifest.seconds:.0f} s, {library}")
    return 0


if __name__ == "__main__":
    # As an imported module: Ray must find its functions by name.
    from mamtra_ray.align import main as imported_main

    raise SystemExit(imported_main())
