"""Peak memory of real distillation steps beside the closed form of `--dry-run`.

    python benchmarks/step_memory.py            two shapes, four settings each (a minute on an idle core, 2 GB)
    python benchmarks/step_memory.py --quick    one shape, smaller; nothing is written

Every setting runs in a process of its own. It is warmed up with a tiny student; then the student is made and takes one
step, which makes the optimizer's state; then the peak of the resident set is started anew and another step is taken.
``measured`` is that peak above what the process held before the student. Weights are random: memory does not depend on
them. ``ratio`` is the closed form over what was measured. On a GPU (--device cuda) the peak is the allocator's.

glibc keeps freed blocks below a limit that it raises up to 32 MB, and they then count as held. What that adds depends
on the order of everything before; here the limit stays at 128 KiB (MALLOC_MMAP_THRESHOLD_), unless --glibc says
otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import time
from typing import Any

import torch
from measurement import print_table, write_result
from memory import held_now, peak, release_free_memory, reset_peak
from random_models import random_teacher
from torch import Tensor

from mamtra_ray.config import DistillConfig
from mamtra_ray.distill.training import Distillation
from mamtra_ray.efficiency import ARCHITECTURES
from mamtra_ray.efficiency.memory import distillation_memory
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.losses import HiddenTargets
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student


@dataclasses.dataclass(frozen=True)
class Batch:
    """Utterances of equal length, every position labeled."""

    input_ids_BL: Tensor
    labels_BL: Tensor
    host_labels_BL: Tensor
    teacher_targets: HiddenTargets
    num_tokens: int
    step_tokens: int


def random_batch(student: SpeechLM, rows: int, length: int, device: str) -> Batch:
    vocabulary, tokens = student.vocabulary, rows * length
    ids_BL = torch.randint(vocabulary.speech_offset, vocabulary.control_offset, (rows, length))
    labels_BL = torch.randint(vocabulary.speech_size, (rows, length))
    targets = HiddenTargets(torch.randn(tokens, student.config.hidden_size).to(device))
    return Batch(ids_BL.to(device), labels_BL.to(device), labels_BL, targets, tokens, tokens)


def student_of(architecture: str, num_layers: int) -> SpeechLM:
    teacher = random_teacher(ARCHITECTURES[architecture], num_layers)
    return make_student(teacher, from_strategy("block_beginning", num_layers, "1:1"))


def measure(
    architecture: str, num_layers: int, rows: int, length: int, changes: dict[str, Any], device: str
) -> dict[str, Any]:
    """One process, one setting."""
    torch.set_num_threads(1)
    tokens = rows * length
    config = DistillConfig(learning_rate=1e-5, tokens_per_batch=tokens, **changes)
    warm = Distillation(student_of("demo", 2), config, 10**6, torch.device(device))
    warm.step(random_batch(warm.student, 1, 40, device))
    del warm
    release_free_memory()
    before = held_now(device)
    training = Distillation(student_of(architecture, num_layers), config, 10**6, torch.device(device))
    batch = random_batch(training.student, rows, length, device)
    training.step(batch).read()
    release_free_memory()
    reset_peak(device)
    began = time.perf_counter()
    training.step(batch).read()
    seconds = time.perf_counter() - began
    vocabulary, width = training.student.vocabulary, training.student.config.hidden_size
    bias = 0 if training.student.head.bias is None else vocabulary.speech_size
    shape = dataclasses.replace(
        ARCHITECTURES[architecture],
        num_layers=num_layers,
        table_parameters=(vocabulary.size + vocabulary.speech_size) * width + bias,
        head_outputs=vocabulary.speech_size,
    )
    micro = config.micro_batch_tokens
    expected = distillation_memory(
        shape,
        Layout(str(training.student.layout)),
        tokens=length * (micro // length) if isinstance(micro, int) else tokens,
        length=length,
        batch_tokens=tokens,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens,
    )
    measured = peak(device) - before
    return {
        "shape": f"{architecture}, {num_layers} layers",
        "tokens": tokens,
        "setting": ", ".join(f"{key}={value}" for key, value in changes.items()) or "defaults",
        "closed form MB": round(expected.total / 1e6, 1),
        "measured MB": round(measured / 1e6, 1),
        "ratio": round(expected.total / measured, 3),
        "seconds of the step": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--glibc", action="store_true", help="with the C library's own limit; nothing is written")
    options = parser.parse_args()
    if not options.glibc:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)  # read when a process starts
    shapes = [("demo", 12, 16, 120), ("cosyvoice2", 2, 2, 256)]
    if options.quick:
        shapes = [("demo", 4, 8, 120)]
    rows = []
    context = multiprocessing.get_context("spawn")
    for architecture, num_layers, utterances, length in shapes:
        settings: list[dict[str, Any]] = [
            {},
            {"micro_batch_tokens": utterances * length // 2},
            {"activation_checkpointing": True},
            {"loss_chunk_tokens": 1024},
        ]
        for changes in settings:
            with context.Pool(1) as pool:
                rows.append(
                    pool.apply(measure, (architecture, num_layers, utterances, length, changes, options.device))
                )
            print(rows[-1], flush=True)
    print_table(rows)
    if not (options.quick or options.glibc):
        write_result("step_memory", rows, settings={"threads": 1, "dtype": "float32", "device": options.device})


if __name__ == "__main__":
    main()
