"""What each format of the teacher cache costs, and what it does to the gradient and to a student.

    python benchmarks/teacher_cache.py                      the demo teacher, some minutes on one core
    python benchmarks/teacher_cache.py --teacher FOLDER     another teacher of kind "huggingface"
    python benchmarks/teacher_cache.py --quick              few rows and steps; nothing is written

Every format encodes the same rows of the teacher, into a real cache folder, whose files are what "bytes/token"
counts (tokens, ids and Parquet included, per labeled position). "at 896 dims" scales the rows' part of it to
CosyVoice 2's width (hidden formats) or adds what its 6,564 ids take more than the demo's (top-k).

The gradient is that of Eq. 5 with respect to the student's hidden states, over the validation split, for five students
of the layout 1:1: straight from the weight transfer ("far"); 40 % and 10 % of the way (in hidden states) from the
teacher to that one; with aligned mixers ("aligned"); and that one after its distillation ("distilled"). Their distances
from the teacher are printed. "KL+emb" leaves out the cross-entropy, whose gradient needs no teacher and is exact in
every format; for formats without hidden states it is the KL alone. The printed columns give the cosines in the order of
the distances; the relative errors stand in the JSON.

The last columns are of students distilled from each format, beside an online teacher and dense float16 logits: all
begin with the same aligned mixers and see the same batches, and take turns step by step. Held-out CE and KL to the
teacher in nats; the time of a step, data included, over hidden fp16's; WER of greedy speech, and its paired
difference to the student of the online teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from cache_students import (
    CPU,
    Listener,
    Source,
    aligned_mixers,
    dense_targets,
    distil_in_turns,
    largest_difference,
    scores,
    wer_columns,
)
from measurement import paired, print_table, write_result
from torch import Tensor, nn

from mamtra_ray.config import CacheConfig
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import corpus_identity, read_corpus, utterances
from mamtra_ray.losses import HiddenTargets, LossWeights, TopKTargets, distillation_loss
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.formats import RowFormat, format_settings, row_format
from mamtra_ray.teacher_cache.manifest import CacheManifest, PlannedShard, encode_shard, finished_shard, write_manifest
from mamtra_ray.teacher_cache.quantizer import QUANTIZER_FILE, calibrate, quantizer_bytes, token_context
from mamtra_ray.teacher_cache.shared import SharedCache, share_cache
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teacher_cache.worker import labeled_hidden_states, sha256, shard_rows
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.teacher import Teacher

COSYVOICE_WIDTH, COSYVOICE_SPEECH = 896, 6564
FORMATS = {
    "hidden fp16": CacheConfig(format="hidden"),
    "quantized, 4 bits": CacheConfig(format="hidden_quantized", bits=4.0),
    "quantized, 3 bits": CacheConfig(format="hidden_quantized", bits=3.0),
    "quantized, 3.3 bits": CacheConfig(format="hidden_quantized", bits=3.3),
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
    """Hidden states of ``model`` at the labeled positions, in the order of ``rows``."""
    parts: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch, hidden_ND in labeled_hidden_states(dataclasses.replace(teacher, model=model), list(rows)):
        pieces = hidden_ND.clone().split([len(rows[index].speech_tokens) + 1 for index in batch])
        for index, piece in zip(batch, pieces, strict=True):
            parts[index] = piece
    return torch.cat(parts)


def quantizer(teacher: Teacher, train: Split, bits: float) -> bytes:
    vocabulary = teacher.sequence.vocabulary
    inputs_N, labels_N = (torch.from_numpy(ids) for ids in token_context(train.speech_tokens, vocabulary.speech_size))
    before_speech = (*teacher.sequence.prefix, *teacher.sequence.separator)[-1]
    edges = torch.tensor([*range(vocabulary.speech_offset, vocabulary.control_offset), before_speech])
    head_rows = [*range(vocabulary.speech_size), vocabulary.eos_id]
    model = teacher.model
    with torch.no_grad():
        learnt = calibrate(train.hidden_ND, inputs_N, labels_N, model.embed(edges), model.head.weight[head_rows], bits)
    return quantizer_bytes(learnt)


def write_cache(
    folder: Path, cache: CacheConfig, teacher: Teacher, splits: Sequence[Split], corpus: Path | str | None = None
) -> tuple[CacheManifest, RowFormat]:
    """A real cache folder of rows that are there already, of the demo's corpus or another one."""
    identity = corpus_identity(read_corpus(corpus))
    settings = format_settings(cache)
    made_by = {
        "teacher": teacher.fingerprint,
        "tokenizer": identity.tokenizer,
        "corpus": identity.corpus_hash,
        "format": settings,
        "selection": {"seed": 0, "longest": teacher.max_length},
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
            shard = encode_shard(
                shard_rows(rows, encoded, stored.columns), made_by | files, planned, stored.compression
            )
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
    hidden = 1.0 if isinstance(stored, HiddenTargets) else 0.0
    found = {}
    for label, ce in (("Eq. 5", 1.0), ("KL+emb", 0.0)):
        weights = LossWeights(ce=ce, kl=1.0, hidden=hidden)
        for name, student_ND in students.items():
            one = gradient(student_ND, labels_N, head, exact, weights)
            other = gradient(student_ND, labels_N, head, stored, weights)
            found[f"{label} {name} cos"] = round(torch.cosine_similarity(one, other, dim=0).item(), 4)
            found[f"{label} {name} err"] = round(((one - other).norm() / one.norm()).item(), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder of a teacher of kind huggingface (default: the demo's)")
    parser.add_argument("--cache-tokens", type=int, default=60_000, help="training speech tokens in the cache")
    parser.add_argument("--align-tokens", type=int, default=60_000)
    parser.add_argument("--tokens", type=int, default=60_000, help="of each student's distillation")
    parser.add_argument("--sentences", type=int, default=60, help="spoken and recognized")
    parser.add_argument("--quick", action="store_true", help="few tokens and sentences, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.cache_tokens, options.align_tokens, options.tokens, options.sentences = 10_000, 3_000, 4_000, 2
    torch.set_num_threads(1)
    teacher = load_teacher("huggingface" if options.teacher else "demo", options.teacher)
    head, speech_size = teacher.model.head, teacher.sequence.vocabulary.speech_size
    width = teacher.model.config.hidden_size

    splits = []
    for name, limit in (("train", options.cache_tokens), ("validation", options.cache_tokens // 5)):
        rows = utterances(drawn(read_corpus(None, name), 0, limit))
        splits.append(Split(name, rows, teacher_rows(teacher.model, teacher, rows)))
    held_out = splits[1]
    num_rows = len(held_out.hidden_ND)
    labels_N = torch.from_numpy(token_context(held_out.speech_tokens, teacher.sequence.vocabulary.eos_id)[1])

    ray.init(
        address="local",
        num_cpus=1, include_dashboard=False, object_store_memory=500 << 20, logging_level=logging.WARNING,
        log_to_driver=False,
    )  # fmt: skip
    stored: dict[str, tuple[CacheManifest, RowFormat]] = {}
    sources, payload = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, cache in FORMATS.items():
            folder = Path(temporary) / name
            stored[name] = write_cache(folder, cache, teacher, splits)
            payload[name] = payload_bytes(folder, stored[name][0])
            hidden_weight = 0.0 if cache.format == "topk" else 1.0
            sources.append(Source(name, shared(folder, stored[name][0], "train"), "cache", hidden_weight))
        exact_folder = Path(temporary) / "hidden fp16"
        exact_held_out = shared(exact_folder, stored["hidden fp16"][0], "validation")
        exact_train = sources[0].shared
        sources += [
            Source("dense logits fp16", exact_train, "dense", 0.0),
            Source("online teacher", exact_train, "online", 1.0),
        ]
        mixers = aligned_mixers(teacher, sources[0], options.align_tokens)
        lessons = distil_in_turns(teacher, sources, mixers, options.tokens)
        student_scores = {
            name: scores(lesson, lessons["hidden fp16"], exact_held_out, teacher) for name, lesson in lessons.items()
        }
        ray.shutdown()
    fp16_difference = largest_difference(lessons["hidden fp16"], lessons["online teacher"])
    teacher_wer = None
    if not options.teacher:
        listener = Listener(teacher, utterances(read_corpus(None, "test"))[: options.sentences])
        heard = {name: listener.word_errors(lesson.student) for name, lesson in lessons.items()}
        for name, result in heard.items():
            student_scores[name] |= wer_columns(result, heard["online teacher"])
        teacher_wer = listener.word_errors(teacher.model).wer

    layout = lessons["hidden fp16"].student.layout
    rows_of = {
        "far": make_student(teacher.model, layout),
        "aligned": make_student(teacher.model, layout, "aligned", mixers),
        "distilled": lessons["online teacher"].student.eval(),
    }
    students = {name: teacher_rows(student, teacher, held_out.rows) for name, student in rows_of.items()}
    away_ND = students["far"] - held_out.hidden_ND
    students |= {f"{share:.0%}": held_out.hidden_ND + share * away_ND for share in (0.1, 0.4)}
    distances = {
        name: round(((rows - held_out.hidden_ND).norm() / held_out.hidden_ND.norm()).item(), 3)
        for name, rows in students.items()
    }
    distances = dict(sorted(distances.items(), key=lambda item: item[1]))
    students = {name: students[name] for name in distances}

    exact = HiddenTargets(held_out.hidden_ND)
    table = []
    for name, (manifest, row_format_) in stored.items():
        encoded = row_format_.encode(held_out.hidden_ND, head, held_out.speech_tokens)
        columns = {key: [np.frombuffer(row[key], np.uint8) for row in encoded] for key in row_format_.columns}
        timing = paired(
            {
                "encode": functools.partial(row_format_.encode, held_out.hidden_ND, head, held_out.speech_tokens),
                "decode": functools.partial(row_format_.decode, columns, held_out.speech_tokens, CPU),
            },
            1 if options.quick else 7,
            clock=time.thread_time,
        )
        wider = payload[name] * (COSYVOICE_WIDTH / width - 1)
        if FORMATS[name].format == "topk":
            wider = FORMATS[name].top_k * np.log2(COSYVOICE_SPEECH / speech_size) / 8
        table.append(
            {
                "format": name,
                "bytes/token": round(manifest.bytes_per_token, 1),
                "at 896 dims": round(manifest.bytes_per_token + wider),
                "encode tokens/s": round(num_rows / timing["encode"].median),
                "decode tokens/s": round(num_rows / timing["decode"].median),
                **compare_gradients(
                    students, labels_N, head, exact, row_format_.decode(columns, held_out.speech_tokens, CPU)
                ),
                **student_scores[name],
            }
        )
    dense = dense_targets(head(held_out.hidden_ND).detach())
    for name, targets, size, wide in (
        ("dense logits fp16", dense, 2 * speech_size, 2 * COSYVOICE_SPEECH),
        ("online teacher", exact, 0, 0),
    ):
        table.append(
            {
                "format": name,
                "bytes/token": size,
                "at 896 dims": wide,
                "encode tokens/s": "",
                "decode tokens/s": "",
                **compare_gradients(students, labels_N, head, exact, targets),
                **student_scores[name],
            }
        )
    print(f"distance of the students from the teacher (hidden states, relative): {distances}")
    print(f"hidden fp16 against the online teacher, any term at any step: {fp16_difference:.2e} relative")
    print_table([_printed(row) for row in table])
    if teacher_wer is not None:
        print(f"the teacher's own WER: {teacher_wer:.3f}")
    if not options.quick:
        write_result(
            "teacher_cache",
            table,
            distances=distances,
            cache_tokens=options.cache_tokens,
            align_tokens=options.align_tokens,
            distil_tokens=options.tokens,
            sentences=options.sentences,
            validation_positions=num_rows,
            fp16_against_online_largest_relative_difference=fp16_difference,
            teacher_wer=teacher_wer,
            teacher=teacher.name,
            teacher_fingerprint=teacher.fingerprint,
        )


def shared(folder: Path, manifest: CacheManifest, split: str) -> SharedCache:
    made_by = manifest.made_by
    return share_cache(folder, teacher_fingerprint=made_by["teacher"], corpus_hash=made_by["corpus"], split=split)


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    """The cosines of a loss in one column."""
    short = {key: value for key, value in row.items() if not key.endswith((" cos", " err"))}
    for loss in ("Eq. 5", "KL+emb"):
        cosines = [f"{value:.3f}" for key, value in row.items() if key.startswith(loss) and key.endswith(" cos")]
        short[f"cos {loss}"] = " / ".join(cosines)
    return short


def payload_bytes(folder: Path, manifest: CacheManifest) -> float:
    """Bytes a position of the teacher's rows alone, as Parquet stores them."""
    payload = 0
    for shard in manifest.shards:
        metadata = pq.read_metadata(folder / shard)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                if column.path_in_schema.startswith(("hidden", "codes")):
                    payload += column.total_compressed_size
    return payload / sum(shard.speech_tokens + shard.utterances for shard in manifest.shards.values())


if __name__ == "__main__":
    main()
