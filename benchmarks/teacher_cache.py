"""What each format of the teacher cache costs, and what it does to the gradient and to a student.

    python benchmarks/teacher_cache.py                      the demo teacher, some minutes on one core
    python benchmarks/teacher_cache.py --teacher FOLDER     another teacher of kind "huggingface"
    python benchmarks/teacher_cache.py --quick              few rows and steps; nothing is written

Every format encodes the same rows of the teacher, into a real cache folder, whose files are what "bytes/token"
counts (tokens, ids and Parquet included, per labelled position). "at 896 dims" scales the rows' part of it to
CosyVoice 2's width (hidden formats) or adds what its 6,564 ids take more than the demo's (top-k).

The gradient is that of Eq. 5 with respect to the student's hidden states, over the validation split, for a student
of the layout 1:1 straight from the weight transfer ("far"), and for students 40 % and 10 % of the way (in hidden
states) from the teacher to that one; their distances are printed. "KL+emb" leaves out the cross-entropy, whose
gradient needs no teacher and is exact in every format; for formats without hidden states it is the KL alone. The
printed columns give the cosines for 10 % / 40 % / far; the relative errors stand in the JSON.

The last columns are the held-out CE, in nats, of a student distilled from each format with the same steps, beside an
online teacher and dense float16 logits. A student this young says no words yet: for its WER distil longer, with
`python -m mamtra_ray.search cache.format=...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch
from measurement import paired, print_table, write_result
from torch import Tensor, nn

from mamtra_ray.cache_formats import RowFormat, format_settings, row_format
from mamtra_ray.cache_manifest import CacheManifest, PlannedShard, encode_shard, finished_shard, write_manifest
from mamtra_ray.cache_storage import Storage
from mamtra_ray.config import CacheConfig, DistillConfig
from mamtra_ray.corpus import corpus_identity, read_corpus, utterances
from mamtra_ray.hidden_quantizer import QUANTIZER_FILE, calibrate, quantizer_bytes, token_context
from mamtra_ray.layouts import from_strategy
from mamtra_ray.losses import HiddenTargets, LossWeights, TopKTargets, distillation_loss
from mamtra_ray.shared_batches import DistillBatch, batches
from mamtra_ray.shared_cache import SharedCache, share_cache
from mamtra_ray.teacher_pass import labelled_hidden_states, sha256, shard_rows
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.base import SpeechLM, Teacher, make_student
from mamtra_ray.training import Distillation, validate

CPU = torch.device("cpu")
COSYVOICE_WIDTH, COSYVOICE_SPEECH = 896, 6564
FORMATS = {
    "hidden fp16": CacheConfig(format="hidden"),
    "quantised, 4 bits": CacheConfig(format="hidden_quantized", bits=4.0),
    "quantised, 3 bits": CacheConfig(format="hidden_quantized", bits=3.0),
    "quantised, 2.5 bits": CacheConfig(format="hidden_quantized", bits=2.5),
    "top-16": CacheConfig(format="topk", top_k=16),
    "top-8": CacheConfig(format="topk", top_k=8),
}


@dataclass(frozen=True)
class Split:
    """Utterances of a split and the teacher's exact rows for them, one after another."""

    name: str
    rows: list[Any]
    hidden_ND: Tensor

    @property
    def speech_tokens(self) -> list[np.ndarray]:
        return [row.speech_tokens for row in self.rows]


def teacher_rows(model: SpeechLM, teacher: Teacher, rows: Sequence[Any]) -> Tensor:
    """Hidden states of ``model`` at the labelled positions, in the order of ``rows``."""
    parts: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch, hidden_ND in labelled_hidden_states(dataclasses.replace(teacher, model=model), list(rows)):
        pieces = hidden_ND.clone().split([len(rows[index].speech_tokens) + 1 for index in batch])
        for index, piece in zip(batch, pieces, strict=True):
            parts[index] = piece
    return torch.cat(parts)


def quantizer(teacher: Teacher, train: Split, bits: float) -> bytes:
    vocabulary = teacher.sequence.vocabulary
    inputs_N, labels_N = (torch.from_numpy(ids) for ids in token_context(train.speech_tokens, vocabulary.speech_size))
    edges = torch.tensor([*range(vocabulary.speech_offset, vocabulary.control_offset), teacher.sequence.separator[-1]])
    head_rows = [*range(vocabulary.speech_size), vocabulary.eos_id]
    model = teacher.model
    with torch.no_grad():
        learnt = calibrate(train.hidden_ND, inputs_N, labels_N, model.embed(edges), model.head.weight[head_rows], bits)
    return quantizer_bytes(learnt)


def write_cache(
    folder: Path, cache: CacheConfig, teacher: Teacher, splits: Sequence[Split]
) -> tuple[CacheManifest, RowFormat]:
    """A real cache folder of rows that are there already."""
    identity = corpus_identity(read_corpus())
    settings = format_settings(cache)
    made_by = {
        "teacher": teacher.fingerprint,
        "tokenizer": identity.tokenizer,
        "corpus": identity.corpus_hash,
        "format": settings,
    }
    storage = Storage.of(folder)
    files, content = {}, None
    if cache.format == "hidden_quantized":
        content = quantizer(teacher, splits[0], cache.bits)
        storage.write(QUANTIZER_FILE, content)
        files[QUANTIZER_FILE] = sha256(content)
    width, speech_size = teacher.model.config.hidden_size, teacher.sequence.vocabulary.speech_size
    stored = row_format(settings, width, speech_size, content)
    shards, size = {}, cache.utterances_per_shard
    for split in splits:
        hidden = split.hidden_ND.split([len(tokens) + 1 for tokens in split.speech_tokens])
        for first in range(0, len(split.rows), size):
            rows = split.rows[first : first + size]
            tokens = [row.speech_tokens for row in rows]
            encoded = stored.encode(torch.cat(hidden[first : first + size]), teacher.model.head, tokens)
            planned = PlannedShard(split.name, first, len(rows), sum(map(len, tokens)))
            name = planned.name(size)
            shard = encode_shard(shard_rows(rows, encoded, stored.columns), made_by, planned, stored.compression)
            storage.write(name, shard)
            shards[name] = finished_shard(planned, shard)
    manifest = CacheManifest(made_by, width, size, True, shards, files)
    write_manifest(storage, manifest)
    return manifest, stored


def gradient(
    student_ND: Tensor, labels_N: Tensor, head: nn.Module, targets: HiddenTargets | TopKTargets, weights: LossWeights
) -> Tensor:
    leaf_ND = student_ND.clone().requires_grad_(True)
    distillation_loss(leaf_ND, head, labels_N, targets, weights).total.backward()
    assert leaf_ND.grad is not None
    return leaf_ND.grad.flatten().double()


def compare_gradients(
    students: dict[str, Tensor],
    labels_N: Tensor,
    head: nn.Module,
    exact: HiddenTargets,
    stored: HiddenTargets | TopKTargets,
) -> dict[str, float]:
    """Cosine and relative error for every student, of the whole loss and without the cross-entropy."""
    embedding = 1.0 if isinstance(stored, HiddenTargets) else 0.0
    found = {}
    for label, ce in (("Eq. 5", 1.0), ("KL+emb", 0.0)):
        weights = LossWeights(ce=ce, logits=1.0, emb=embedding)
        for name, student_ND in students.items():
            one = gradient(student_ND, labels_N, head, exact, weights)
            other = gradient(student_ND, labels_N, head, stored, weights)
            found[f"{label} {name} cos"] = round(torch.cosine_similarity(one, other, dim=0).item(), 4)
            found[f"{label} {name} err"] = round(((one - other).norm() / one.norm()).item(), 3)
    return found


def distilled(
    teacher: Teacher,
    shared: SharedCache,
    held_out: SharedCache,
    steps: int,
    embedding_weight: float,
    targets: str = "cache",
) -> tuple[SpeechLM, dict[str, float]]:
    """A student after some steps on the shared batches, with its held-out CE and the seconds of a step."""
    config = DistillConfig(batch_tokens=2_000, embedding_weight=embedding_weight)
    student = make_student(teacher.model, from_strategy("block_beginning", teacher.model.layout.num_layers, "1:1"))
    training = Distillation(student, config, steps * 1_800, CPU)
    seconds: list[float] = []
    for batch in _endless(shared, teacher):
        began = time.perf_counter()
        training.step(_retargeted(batch, teacher, targets))
        seconds.append(time.perf_counter() - began)
        if len(seconds) == steps:
            break
    score = validate(training.student, batches(held_out, teacher.sequence, batch_tokens=4_000, seed=0, epoch=0))
    return training.student, {"student CE": round(score.ce, 4), "s/step": round(float(np.median(seconds)), 3)}


def _endless(shared: SharedCache, teacher: Teacher) -> Iterator[DistillBatch]:
    epoch = 0
    while True:
        yield from batches(shared, teacher.sequence, batch_tokens=2_000, seed=0, epoch=epoch)
        epoch += 1


def _retargeted(batch: DistillBatch, teacher: Teacher, targets: str) -> DistillBatch:
    """The same batch with rows computed now, or with all logits in float16 (as a top-k row of all classes)."""
    if targets == "cache":
        return batch
    with torch.no_grad():
        if targets == "online":
            hidden_ND = teacher.model.hidden_states(batch.input_ids_BL)[batch.labels_BL != -100]
            return dataclasses.replace(batch, teacher_targets=HiddenTargets(hidden_ND))
        hidden_ND = batch.teacher_targets.hidden_ND.float()
        return dataclasses.replace(batch, teacher_targets=dense_targets(teacher.model.head(hidden_ND)))


def dense_targets(logits_NV: Tensor) -> TopKTargets:
    """All classes with their log-probabilities from float16 logits; nothing is left for the tail."""
    log_probs_NV = logits_NV.half().float().log_softmax(-1)
    ids_NV = torch.arange(logits_NV.shape[1]).expand_as(logits_NV)
    return TopKTargets(ids_NV, log_probs_NV, torch.full((len(logits_NV),), -torch.inf))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder of a teacher of kind huggingface (default: the demo's)")
    parser.add_argument("--tokens", type=int, default=60_000, help="training speech tokens")
    parser.add_argument("--steps", type=int, default=60, help="steps of each student")
    parser.add_argument("--quick", action="store_true", help="few tokens and steps, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens, steps, rounds = (10_000, 2, 1) if options.quick else (options.tokens, options.steps, 5)
    teacher = load_teacher("huggingface" if options.teacher else "demo", options.teacher)
    head, speech_size = teacher.model.head, teacher.sequence.vocabulary.speech_size
    width = teacher.model.config.hidden_size

    splits = []
    for name, limit in (("train", tokens), ("validation", tokens // 5)):
        rows = utterances(read_corpus(None, name, max_speech_tokens=limit))
        splits.append(Split(name, rows, teacher_rows(teacher.model, teacher, rows)))
    held_out = splits[1]
    num_rows = len(held_out.hidden_ND)
    labels_N = torch.from_numpy(token_context(held_out.speech_tokens, teacher.sequence.vocabulary.eos_id)[1])

    ray.init(
        num_cpus=1, include_dashboard=False, object_store_memory=500 << 20, logging_level=logging.WARNING,
        log_to_driver=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name, cache in FORMATS.items():
            manifest, stored = write_cache(Path(folder) / name, cache, teacher, splits)
            made[name] = (
                manifest,
                stored,
                [
                    share_cache(
                        Path(folder) / name,
                        teacher_fingerprint=teacher.fingerprint,
                        corpus_hash=manifest.made_by["corpus"],
                        split=s,
                    )
                    for s in ("train", "validation")
                ],
            )
        exact_train, exact_held_out = made["hidden fp16"][2]
        trained, first_scores = distilled(teacher, exact_train, exact_held_out, steps, 1.0)
        far = make_student(teacher.model, trained.layout)
        far_ND = teacher_rows(far, teacher, held_out.rows)
        away_ND = far_ND - held_out.hidden_ND
        students = {
            "10 %": held_out.hidden_ND + 0.1 * away_ND,
            "40 %": held_out.hidden_ND + 0.4 * away_ND,
            "far": far_ND,
        }
        distances = {
            name: round(((rows - held_out.hidden_ND).norm() / held_out.hidden_ND.norm()).item(), 3)
            for name, rows in students.items()
        }
        exact = HiddenTargets(held_out.hidden_ND)
        table = []
        for name, (manifest, stored, (train, _)) in made.items():
            encoded = stored.encode(held_out.hidden_ND, head, held_out.speech_tokens)
            columns = {key: [np.frombuffer(row[key], np.uint8) for row in encoded] for key in stored.columns}
            timing = paired(
                {
                    "encode": lambda stored=stored: stored.encode(held_out.hidden_ND, head, held_out.speech_tokens),
                    "decode": lambda stored=stored, columns=columns: stored.decode(
                        columns, held_out.speech_tokens, CPU
                    ),
                },
                rounds,
                clock=time.thread_time,
            )
            wide = manifest.bytes_per_token + _more_at_cosyvoice(
                FORMATS[name], manifest, folder, name, width, speech_size
            )
            targets = stored.decode(columns, held_out.speech_tokens, CPU)
            embedding = 1.0 if isinstance(targets, HiddenTargets) else 0.0
            scores = (
                first_scores
                if name == "hidden fp16"
                else distilled(teacher, train, exact_held_out, steps, embedding)[1]
            )
            table.append(
                {
                    "format": name,
                    "bytes/token": round(manifest.bytes_per_token, 1),
                    "at 896 dims": round(wide, 0),
                    "encode tokens/s": round(num_rows / timing["encode"].median),
                    "decode tokens/s": round(num_rows / timing["decode"].median),
                    **compare_gradients(students, labels_N, head, exact, targets),
                    **scores,
                }
            )
        dense = dense_targets(head(held_out.hidden_ND).detach())
        for name, targets, size, wide in (
            ("dense logits fp16", "dense", 2.0 * speech_size, 2.0 * COSYVOICE_SPEECH),
            ("online teacher", "online", 0.0, 0.0),
        ):
            embedding = 1.0 if targets == "online" else 0.0
            table.append(
                {
                    "format": name,
                    "bytes/token": size,
                    "at 896 dims": wide,
                    "encode tokens/s": "",
                    "decode tokens/s": "",
                    **compare_gradients(students, labels_N, head, exact, exact if targets == "online" else dense),
                    **distilled(teacher, exact_train, exact_held_out, steps, embedding, targets)[1],
                }
            )
        ray.shutdown()
    print(f"distance of the students from the teacher (hidden states, relative): {distances}")
    print_table([_printed(row) for row in table])
    if not options.quick:
        write_result(
            "teacher_cache",
            table,
            distances=distances,
            train_tokens=tokens,
            validation_positions=num_rows,
            steps=steps,
            teacher=teacher.name,
            teacher_fingerprint=teacher.fingerprint,
        )


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    """The cosines of a loss in one column."""
    short = {key: value for key, value in row.items() if not key.endswith((" cos", " err"))}
    for loss in ("Eq. 5", "KL+emb"):
        cosines = [f"{value:.3f}" for key, value in row.items() if key.startswith(loss) and key.endswith(" cos")]
        short[f"cos {loss}"] = " / ".join(cosines)
    return short


def _more_at_cosyvoice(
    cache: CacheConfig, manifest: CacheManifest, folder: str, name: str, width: int, speech_size: int
) -> float:
    """Bytes a position that CosyVoice 2's width or vocabulary adds."""
    if cache.format == "topk":
        return cache.top_k * np.log2(COSYVOICE_SPEECH / speech_size) / 8
    import pyarrow.parquet as pq

    payload = 0
    for shard in manifest.shards:
        metadata = pq.read_metadata(Path(folder) / name / shard)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                if column.path_in_schema.startswith(("hidden", "codes")):
                    payload += column.total_compressed_size
    positions = sum(shard.speech_tokens + shard.utterances for shard in manifest.shards.values())
    return payload / positions * (COSYVOICE_WIDTH / width - 1)


if __name__ == "__main__":
    main()
