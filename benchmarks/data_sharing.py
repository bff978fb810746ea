"""Getting the cached rows to the training: Ray's object store against the alternatives, for one and two trials.

    python benchmarks/data_sharing.py                      the demo teacher, some minutes on two cores
    python benchmarks/data_sharing.py --teacher FOLDER     another teacher of kind "huggingface"
    python benchmarks/data_sharing.py --quick              few tokens and steps; nothing is written

Sources: the materialized blocks in the object store (what every training here uses); Ray Data's read_parquet anew
in every epoch; pyarrow reading the shards anew in every epoch; and the online teacher, which computes the rows.
All give the same batches' worth of rows as tensors. Every trial is an actor of its own for every source; sources take
turns, epoch by epoch, in an order that rotates.

"delivered" is what a trial gets when it does nothing else, the median of several epochs; "x" is relative to the object
store in the same round, with the quartiles. Then a real training of the layout 1:1 over whole epochs: "waiting" is the
share of its time spent until the batch is there (with the online teacher: computed), "step x" the time of an epoch,
waiting included, over the object store's. "private" is by how much the trial's memory exceeds the idle actor's at most,
pages shared with others not counted, while it reads and while it trains. With two trials the slower one counts.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers start at niceness 15, and a busy machine would starve them.
os.environ.setdefault("RAY_worker_niceness", "0")
# Workers found their modules in benchmarks/ only if it is on their path too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
)

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from measurement import print_table, quartiles, write_result

from mamtra_ray.config import Config, DistillConfig
from mamtra_ray.distill.training import Distillation
from mamtra_ray.layouts import from_strategy
from mamtra_ray.losses import IGNORE, HiddenTargets
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.batches import DistillBatch, _batch, batches, padding_waste, plan_epoch
from mamtra_ray.teacher_cache.build import build_cache
from mamtra_ray.teacher_cache.formats import HiddenFormat
from mamtra_ray.teacher_cache.shared import SharedCache, share_cache
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.shared import share_teacher

BATCH_TOKENS = 2_000
SOURCES = ("object store", "pyarrow per epoch", "Ray read_parquet per epoch", "online teacher")


def epoch_of(
    source: str, shared: SharedCache, folder: str, sequence: SequenceFormat, teacher: Any, epoch: int
) -> Iterator[DistillBatch]:
    """One epoch of batches from a source."""
    if source == "object store":
        yield from batches(shared, sequence, tokens_per_batch=BATCH_TOKENS, seed=0, epoch=epoch)
        return
    if source == "online teacher":
        for batch in batches(shared, sequence, tokens_per_batch=BATCH_TOKENS, seed=0, epoch=epoch):
            with torch.no_grad():
                hidden_ND = teacher.model.hidden_states(batch.input_ids_BL)[batch.labels_BL != IGNORE]
            yield DistillBatch(**{**vars(batch), "teacher_targets": HiddenTargets(hidden_ND)})
        return
    names = [f"{folder}/{name}" for name, _ in shared.manifest.split_shards("train")]
    columns = ["text_tokens", "speech_tokens", "hidden"]
    plan = plan_epoch(shared, sequence, tokens_per_batch=BATCH_TOKENS, seed=0, epoch=epoch)[0]
    stored = HiddenFormat(shared.manifest.hidden_size)
    if source == "pyarrow per epoch":
        tables = [pq.read_table(name, columns=columns, use_threads=False) for name in names]
        rows = [value for table in tables for value in zip(*(table[name] for name in columns), strict=True)]
        for chosen in plan:
            values = {
                name: [np.frombuffer(rows[row][index].as_buffer(), np.uint8) for row in chosen]
                for index, name in enumerate(columns)
            }
            yield _batch(sequence, stored, values, torch.device("cpu"))
        return
    # Streams in stored order, a block at a time: what a training written against Ray Data would do.
    dataset = ray.data.read_parquet(names, columns=columns)
    for table in dataset.iter_batches(batch_size=16, batch_format="pyarrow", prefetch_batches=2):
        values = {name: [np.frombuffer(value.as_buffer(), np.uint8) for value in table[name]] for name in columns}
        yield _batch(sequence, stored, values, torch.device("cpu"))


class Trial:
    """An actor that reads, or trains, from one source."""

    def __init__(self, config: Config, shared: SharedCache, folder: str, source: str) -> None:
        torch.set_num_threads(1)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        self.teacher = load_teacher(config.teacher.kind, config.teacher.path)
        self.shared, self.folder, self.source = shared, folder, source
        layers = self.teacher.model.layout.num_layers
        student = make_student(self.teacher.model, from_strategy("block_beginning", layers, "1:1"))
        self.training = Distillation(student, DistillConfig(tokens_per_batch=BATCH_TOKENS), 10**6, torch.device("cpu"))
        self.idle_megabytes = private_megabytes()

    def read(self, epoch: int) -> dict[str, float]:
        """Tokens a second of an epoch (of its first 20 batches where each runs the teacher), and memory."""
        tokens, began, largest = 0, time.perf_counter(), 0.0
        for index, batch in enumerate(self._epoch(epoch)):
            tokens += batch.num_tokens
            # What a training would do at least: touch every value.
            batch.teacher_targets.hidden_ND.sum()
            if index % 20 == 0:
                largest = max(largest, private_megabytes() - self.idle_megabytes)
            if self.source == "online teacher" and index == 20:
                break
        return {"tokens/s": tokens / (time.perf_counter() - began), "private MB": largest}

    def train(self, epoch: int, steps: int) -> dict[str, float]:
        """Seconds of an epoch (or of its first ``steps``), how many of them waited for data, and memory."""
        waited, seconds, largest = 0.0, 0.0, 0.0
        source_batches = self._epoch(epoch)
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(source_batches, None)
            waited += time.perf_counter() - asked
            if batch is not None:
                self.training.step(batch)
            seconds += time.perf_counter() - asked
            if batch is None:
                break
            largest = max(largest, private_megabytes() - self.idle_megabytes)
        return {"seconds": seconds, "waited": waited, "private MB": largest}

    def _epoch(self, epoch: int) -> Iterator[DistillBatch]:
        return iter(epoch_of(self.source, self.shared, self.folder, self.teacher.sequence, self.teacher, epoch))


def private_megabytes() -> float:
    """Memory of this process that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def summary(
    source: str, read: dict[str, list[dict[str, float]]], trained: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """One row of the table."""

    def against_store(results: dict[str, list[dict[str, float]]], key: str) -> str:
        pairs = zip(results[source], results["object store"], strict=True)
        ratio, low, high = quartiles([own[key] / store[key] for own, store in pairs])
        return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"

    waiting, low, high = quartiles([100 * result["waited"] / result["seconds"] for result in trained[source]])
    return {
        "delivered tokens/s": round(quartiles([result["tokens/s"] for result in read[source]])[0]),
        "delivered x": against_store(read, "tokens/s"),
        "private MB reading": round(max(result["private MB"] for result in read[source]), 1),
        "waiting %": f"{waiting:.2f} [{low:.2f}, {high:.2f}]",
        "step x": against_store(trained, "seconds"),
        "private MB training": round(max(result["private MB"] for result in trained[source]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder of a teacher of kind huggingface (default: the demo's)")
    parser.add_argument("--tokens", type=int, default=30_000, help="speech tokens of the cache")
    parser.add_argument("--rounds", type=int, default=5, help="epochs read from each source")
    parser.add_argument("--train-rounds", type=int, default=3, help="epochs trained from each source")
    parser.add_argument("--quick", action="store_true", help="few tokens and steps, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds, options.train_rounds = 10_000, 2, 1
    steps = 3 if options.quick else 10**6
    teacher = {"kind": "huggingface" if options.teacher else "demo", "path": options.teacher}
    config = Config.model_validate(
        {"teacher": teacher, "corpus": {"train_tokens": options.tokens, "validation_tokens": 1}}
    )
    # For what Ray Data runs; the trials themselves ask for no CPU, so that those waiting for their turn hold none.
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=500 << 20,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    table = []
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_teacher(**teacher)
        manifest = build_cache(
            config.cache,
            config.corpus,
            folder,
            teacher=loaded,
            shared_teacher=share_teacher(loaded),
            worker=WorkerResources(),
        )
        shared = share_cache(
            folder, teacher_fingerprint=manifest.made_by["teacher"], corpus_hash=manifest.made_by["corpus"]
        )
        for trials in (1, 2):
            actors = {
                source: [
                    ray.remote(Trial).options(num_cpus=0).remote(config, shared, folder, source) for _ in range(trials)
                ]
                for source in SOURCES
            }
            read: dict[str, list[dict[str, float]]] = {source: [] for source in SOURCES}
            trained: dict[str, list[dict[str, float]]] = {source: [] for source in SOURCES}
            for results, method, rounds, arguments in (
                (read, "read", options.rounds, ()),
                (trained, "train", options.train_rounds, (steps,)),
            ):
                # Round 0 opens files and starts Ray Data's workers; it does not count.
                for number in range(rounds + 1):
                    turn = number % len(SOURCES)
                    for source in SOURCES[turn:] + SOURCES[:turn]:
                        found = ray.get([getattr(a, method).remote(number, *arguments) for a in actors[source]])
                        if number:
                            results[source].append(
                                {key: (min if key == "tokens/s" else max)(f[key] for f in found) for key in found[0]}
                            )
            for source in SOURCES:
                for actor in actors[source]:
                    ray.kill(actor)
                table.append({"trials": trials, "source": source, **summary(source, read, trained)})
        print(
            f"{shared.num_utterances} utterances, {shared.labeled_positions:,} positions, "
            f"{shared.num_bytes / 1e6:.0f} MB in the object store, padding "
            f"{100 * padding_waste(shared, loaded.sequence, tokens_per_batch=BATCH_TOKENS):.1f} %"
        )
    ray.shutdown()
    print_table(table)
    if not options.quick:
        write_result(
            "data_sharing",
            table,
            tokens=options.tokens,
            rounds=options.rounds,
            train_rounds=options.train_rounds,
            tokens_per_batch=BATCH_TOKENS,
            shared_megabytes=round(shared.num_bytes / 1e6),
        )


if __name__ == "__main__":
    # Ray pickles a class of __main__ by value; imported under its own name it is sent by reference.
    import data_sharing

    data_sharing.main()
