"""What a Ray worker of the teacher cache does: hold the teacher, run it over utterances, write a shard.

Tensor letters: B batch, L length, N labeled positions, D model width.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mamtra_ray.corpus.table import Utterance, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE
from mamtra_ray.run.memory import CACHE_BATCH_TOKENS
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.teacher_cache.formats import row_format
from mamtra_ray.teacher_cache.manifest import NEXT_TOKEN, PlannedShard, encode_shard, finished_shard, shard_table
from mamtra_ray.teacher_cache.quantizer import QUANTIZER_FILE, calibrate, quantizer_bytes, token_context
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teachers.shared import SharedTeacher
from mamtra_ray.teachers.teacher import Teacher


@dataclass(frozen=True)
class CacheJob:
    """What every worker of one cache must know.

    Attributes:
        teacher: whose outputs are kept.
        made_by: entries of the manifest.
        quantizer: content of the quantizer's file, for the format that has one.
    """

    teacher: SharedTeacher
    storage: Storage
    made_by: Mapping[str, Any]
    quantizer: bytes | None = None

    @property
    def shards_made_by(self) -> dict[str, Any]:
        """As the finished manifest has it."""
        return {**self.made_by, **({} if self.quantizer is None else {QUANTIZER_FILE: sha256(self.quantizer)})}


@torch.inference_mode()
def labeled_hidden_states(
    teacher: Teacher, rows: list[Utterance], layers: Sequence[int] = ()
) -> Iterator[tuple[list[int], Tensor]]:
    """Final hidden states of the labeled positions, batch by batch.

    Utterances of about equal length share a batch. The batches depend on ``rows`` only, so that a repeated
    pass gives the same bits.

    Yields:
        indices into ``rows`` of a batch, and their positions' hidden states (N, D), in that order; with ``layers``
        (N, (1 + layers) D), the outputs of these decoder layers beside them.
    """
    sequence = teacher.sequence
    examples = [
        sequence.training_example(row.text_tokens.tolist(), row.speech_tokens.tolist(), row.next_token) for row in rows
    ]
    by_length = sorted(range(len(rows)), key=lambda index: (-len(examples[index][0]), index))
    while by_length:
        longest = len(examples[by_length[0]][0])
        count = max(1, CACHE_BATCH_TOKENS // longest)
        batch, by_length = by_length[:count], by_length[count:]
        input_ids_BL = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels_BL = torch.full((len(batch), longest), IGNORE)
        for row, index in enumerate(batch):
            input_ids, labels = examples[index]
            input_ids_BL[row, : len(input_ids)] = input_ids
            labels_BL[row, : len(labels)] = labels
        # Padded right, so no position sees padding and no mask is needed.
        device = teacher.model.device
        hidden_BLD = teacher.model.hidden_states(input_ids_BL.to(device), return_layers=bool(layers))
        if layers:
            final_BLD, outputs = hidden_BLD
            hidden_BLD = torch.cat([final_BLD, *(outputs[layer] for layer in layers)], -1)
        yield batch, hidden_BLD[(labels_BL != IGNORE).to(device)]


class TeacherPass:
    """A loaded teacher and the job it is for."""

    def __init__(self, job: CacheJob) -> None:
        # Measured: with several workers on a machine one thread each is fastest; it also fixes the summation order.
        torch.set_num_threads(1)
        self.job = job
        model = job.teacher.model_on(device_of_this_process())
        self.teacher = dataclasses.replace(job.teacher.load(), model=model)

    @torch.inference_mode()
    def shard(self, planned: PlannedShard, table: pa.Table) -> pa.Buffer:
        """The bytes of the shard of these utterances."""
        rows = utterances(table)
        model = self.teacher.model
        rows_format = row_format(
            self.job.made_by["format"], model.config.hidden_size, model.vocabulary.speech_size, self.job.quantizer
        )
        encoded: list[dict[str, Any]] = [{} for _ in rows]
        layers = self.job.made_by["format"].get("layers", ())
        for batch, hidden_ND in labeled_hidden_states(self.teacher, rows, layers):
            speech_tokens = [rows[index].speech_tokens for index in batch]
            for index, columns in zip(batch, rows_format.encode(hidden_ND, model.head, speech_tokens), strict=True):
                encoded[index] = columns
        content = shard_rows(rows, encoded, rows_format.columns)
        return encode_shard(content, self.job.shards_made_by, planned, rows_format.compression)


def shard_rows(rows: Sequence[Utterance], encoded: Sequence[Mapping[str, bytes]], columns: Sequence[str]) -> pa.Table:
    """A shard's table: tokens and lengths of the utterances beside the format's columns."""
    complete = [
        {
            "utterance_id": row.utterance_id,
            "text_tokens": row.text_tokens.astype("<i4").tobytes(),
            "speech_tokens": row.speech_tokens.astype("<i4").tobytes(),
            "num_text": len(row.text_tokens),
            "num_speech": len(row.speech_tokens),
            **({} if row.next_token is None else {NEXT_TOKEN: np.array(row.next_token, "<i4").tobytes()}),
            **values,
        }
        for row, values in zip(rows, encoded, strict=True)
    ]
    follows = any(row.next_token is not None for row in rows)
    return shard_table(complete, (*columns, *([NEXT_TOKEN] if follows else [])))


class ShardWriter:
    """A Ray Data actor: rows in are planned shards with their utterances, rows out say what was written."""

    def __init__(self, job: CacheJob) -> None:
        self.job = job
        self.teacher_pass: TeacherPass | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute and write each shard; what the user can act on comes back as an error text, not as a traceback."""
        out: dict[str, list[Any]] = {"name": [], "num_bytes": [], "sha256": [], "error": []}
        for name, planned, utterances_ipc in zip(batch["name"], batch["planned"], batch["utterances"], strict=True):
            shard, error = None, ""
            try:
                self.teacher_pass = self.teacher_pass or TeacherPass(self.job)
                plan = PlannedShard(**planned)
                table = pa.ipc.open_stream(pa.py_buffer(utterances_ipc)).read_all()
                content = self.teacher_pass.shard(plan, table)
                self.job.storage.write(name, content)
                shard = finished_shard(plan, content)
            except InputError as problem:
                error = str(problem)
            out["name"].append(name)
            out["num_bytes"].append(shard.num_bytes if shard else 0)
            out["sha256"].append(shard.sha256 if shard else "")
            out["error"].append(error)
        return {key: np.array(values) for key, values in out.items()}


def learn_quantizer(job: CacheJob, table: pa.Table, bits: float) -> bytes:
    """A Ray task: calibrate the quantizer on the teacher's rows of these utterances; returns its file's content."""
    teacher_pass = TeacherPass(job)
    rows = utterances(table)
    model, sequence = teacher_pass.teacher.model, teacher_pass.teacher.sequence
    hidden, order = [], []
    for batch, hidden_ND in labeled_hidden_states(teacher_pass.teacher, rows):
        hidden.append(hidden_ND.float().cpu())
        order += batch
    vocabulary = model.vocabulary
    context = token_context([rows[index].speech_tokens for index in order], vocabulary.speech_size)
    speech_ids = range(vocabulary.speech_offset, vocabulary.control_offset)
    before_speech = (*sequence.prefix, *sequence.separator)[-1]
    edge_ids = torch.tensor([*speech_ids, before_speech], device=model.device)
    head_rows = torch.tensor([*range(vocabulary.speech_size), vocabulary.eos_id], device=model.device)
    with torch.inference_mode():
        quantizer = calibrate(
            torch.cat(hidden),
            torch.from_numpy(context[0]),
            torch.from_numpy(context[1]),
            model.embed(edge_ids).cpu(),
            model.head.weight[head_rows].cpu(),
            bits,
        )
        return quantizer_bytes(quantizer)


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()
