"""One state for each query head, or one for each key-value head? Both, trained alike on the demo teacher.

    python benchmarks/state_sharing.py                     # about ten minutes on one core
    python benchmarks/state_sharing.py --quick             # a minute, nothing is written

Both variants see the same batches in the same order with the same budget: mixers aligned to the attentions, then
distilled with Eq. 5 in a layout; held-out cross-entropy and KL to the teacher, WER of greedy speech, bytes of state,
time of a training step and of a decoding step. Repeated for every seed; differences are per_kv_head minus
per_query_head of the same layout and seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measurement import print_table, write_result
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mamtra_ray.align.mixer_training import MixerTraining
from mamtra_ray.config import load_config
from mamtra_ray.corpus.table import Utterance, read_corpus, utterances
from mamtra_ray.distill.training import Distillation, validate
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.losses import IGNORE, HiddenTargets
from mamtra_ray.models.mamba import StateSharing, state_bytes
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import load_recognizer
from mamtra_ray.speech.wer import bootstrap_interval, paired_difference, word_error_rate
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import demo
from mamtra_ray.teachers.teacher import Teacher

SHARINGS: tuple[StateSharing, StateSharing] = ("per_query_head", "per_kv_head")


@dataclass(frozen=True)
class Batch:
    """Utterances padded right, with the teacher's hidden states at the labeled positions."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    labels_BL: Tensor
    teacher_targets: Any
    num_tokens: int

    @property
    def host_labels_BL(self) -> Tensor:
        return self.labels_BL

    @property
    def step_tokens(self) -> int:
        return self.num_tokens


def make_batch(teacher: Teacher, rows: list[Utterance]) -> Batch:
    examples = [teacher.sequence.training_example(row.text_tokens.tolist(), row.speech_tokens.tolist()) for row in rows]
    input_ids_BL = pad_sequence([ids for ids, _ in examples], batch_first=True)
    labels_BL = pad_sequence([labels for _, labels in examples], batch_first=True, padding_value=IGNORE)
    lengths_B = torch.tensor([len(ids) for ids, _ in examples])
    with torch.no_grad():
        hidden_BLD = teacher.model.hidden_states(input_ids_BL)
    labeled_BL = labels_BL != IGNORE
    return Batch(
        input_ids_BL=input_ids_BL,
        attention_mask_BL=torch.arange(input_ids_BL.shape[1]) < lengths_B[:, None],
        labels_BL=labels_BL,
        teacher_targets=HiddenTargets(hidden_BLD[labeled_BL]),
        num_tokens=int(labeled_BL.sum()),
    )


def endless_batches(teacher: Teacher, rows: list[Utterance], tokens_per_batch: int, seed: int) -> Iterator[Batch]:
    """Utterances of similar length together, in a new order every epoch."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(rows))
        by_length = sorted(order.tolist(), key=lambda i: len(rows[i].speech_tokens) + random.uniform(0, 20))
        chosen: list[list[Utterance]] = [[]]
        for i in by_length:
            if (len(chosen[-1]) + 1) * (len(rows[i].speech_tokens) + 40) > tokens_per_batch and chosen[-1]:
                chosen.append([])
            chosen[-1].append(rows[i])
        for j in random.permutation(len(chosen)):
            yield make_batch(teacher, chosen[j])


def aligned_mixers(
    teacher: Teacher, rows: list[Utterance], tokens: int, seed: int
) -> dict[StateSharing, dict[int, dict[str, Tensor]]]:
    config = load_config(overrides=[f"align.tokens={tokens}"]).align
    trainings = {
        sharing: MixerTraining(teacher.model, config, sharing, torch.device("cpu"), seed=seed) for sharing in SHARINGS
    }
    batches = endless_batches(teacher, rows, config.tokens_per_batch, seed)
    first = [next(batches) for _ in range(10)]
    for training in trainings.values():
        training.fit_output_projections(first)
    while trainings[SHARINGS[0]].position.tokens < tokens:
        batch = next(batches)
        for training in trainings.values():
            training.step(batch)
    return {
        sharing: {layer: mixer.state_dict() for layer, mixer in training.mixers.items()}
        for sharing, training in trainings.items()
    }


def distilled(
    teacher: Teacher, rows: list[Utterance], layout: Layout, libraries: Any, tokens: int, seed: int
) -> tuple[dict[StateSharing, SpeechLM], dict[StateSharing, list[float]]]:
    """The two students, trained in turns on every batch, and their seconds per step."""
    config = load_config(overrides=[f"distill.tokens={tokens}"]).distill
    trainings = {}
    for sharing in SHARINGS:
        student = make_student(teacher.model, layout, "aligned", libraries[sharing], sharing, seed)
        trainings[sharing] = Distillation(student, config, tokens, torch.device("cpu"))
    seconds: dict[StateSharing, list[float]] = {sharing: [] for sharing in SHARINGS}
    batches = endless_batches(teacher, rows, config.tokens_per_batch, seed + 1)
    while trainings[SHARINGS[0]].position.tokens < tokens:
        batch = next(batches)
        turn = trainings[SHARINGS[0]].position.step % 2
        for sharing in SHARINGS[turn:] + SHARINGS[:turn]:
            began = time.perf_counter()
            trainings[sharing].step(batch)
            seconds[sharing].append(time.perf_counter() - began)
    return {sharing: training.student.eval() for sharing, training in trainings.items()}, seconds


def spoken(teacher: Teacher, model: SpeechLM, rows: list[Utterance], codec: Any, recognizer: Any) -> list[str]:
    hypotheses: list[str] = []
    for start in range(0, len(rows), 10):
        part = rows[start : start + 10]
        texts = [row.text_tokens.tolist() for row in part]
        prompts = [teacher.sequence.prompt(text) for text in texts]
        results = generate(model, prompts, [teacher.length_bounds(text) for text in texts])
        hypotheses += recognizer.transcribe(codec.decode_batch([np.asarray(r.tokens) for r in results]))
    return hypotheses


@torch.no_grad()
def decode_milliseconds(student: SpeechLM, mixer_layers: tuple[int, ...]) -> float:
    """One decoding step of all mixers of a student, median of 200."""
    mixers = [student.body.layers[layer].mamba for layer in mixer_layers]
    hidden_B1D = torch.randn(1, 1, student.config.hidden_size)
    states = [mixer(hidden_B1D, return_state=True)[1] for mixer in mixers]
    seconds = []
    for _ in range(200):
        began = time.perf_counter()
        states = [mixer(hidden_B1D, state=s, return_state=True)[1] for mixer, s in zip(mixers, states, strict=True)]
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a demo teacher; none for the packaged one")
    parser.add_argument("--align-tokens", type=int, default=60_000)
    parser.add_argument("--tokens", type=int, default=60_000, help="of the distillation")
    parser.add_argument("--sentences", type=int, default=60, help="spoken and recognized")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ratios", nargs="+", default=["1:1", "1:5"], help="of block_beginning")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.align_tokens = arguments.tokens = 4_000
        arguments.sentences, arguments.seeds, arguments.ratios = 4, [0], ["1:1"]
    torch.set_num_threads(1)
    teacher = demo.load(arguments.teacher)
    teacher.model.eval().requires_grad_(False)
    train_rows, test_rows = (utterances(read_corpus(split=split)) for split in ("train", "test"))
    test_rows = test_rows[: arguments.sentences]
    held_out = [
        make_batch(teacher, rows)
        for rows in np.array_split(np.array(utterances(read_corpus(split="validation"))[:120], dtype=object), 12)
    ]
    codec, recognizer = load_codec(), load_recognizer()
    references = [row.text for row in test_rows]
    teacher_wer = word_error_rate(references, spoken(teacher, teacher.model, test_rows, codec, recognizer)).wer

    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        libraries = aligned_mixers(teacher, train_rows, arguments.align_tokens, seed)
        for ratio in arguments.ratios:
            layout = from_strategy("block_beginning", teacher.model.config.num_layers, ratio)
            students, seconds = distilled(teacher, train_rows, layout, libraries, arguments.tokens, seed)
            results = {}
            for sharing, student in students.items():
                scores = validate(student, iter(held_out))
                wer = word_error_rate(references, spoken(teacher, student, test_rows, codec, recognizer))
                results[sharing] = wer
                low, high = bootstrap_interval(wer.errors, wer.words)
                shape = dataclasses.replace(teacher.model.config.mixer, state_sharing=sharing)
                rows.append(
                    {
                        "layout": str(layout),
                        "seed": seed,
                        "state_sharing": sharing,
                        "ce": scores.ce,
                        "kl": scores.kl,
                        "wer": wer.wer,
                        "wer_95": f"[{low:.3f}, {high:.3f}]",
                        "state_bytes_per_sequence": len(layout.mamba_layers) * state_bytes(shape),
                        "step_ms": 1e3 * statistics.median(seconds[sharing]),
                        "decode_mixers_ms": decode_milliseconds(student, layout.mamba_layers),
                    }
                )
            per_query, per_kv = rows[-2:]
            gap = paired_difference(results["per_kv_head"], results["per_query_head"]).difference
            ratios = [b / a for a, b in zip(*(seconds[sharing] for sharing in SHARINGS), strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            differences.append(
                {
                    "layout": str(layout),
                    "seed": seed,
                    "ce": per_kv["ce"] - per_query["ce"],
                    "kl": per_kv["kl"] - per_query["kl"],
                    "wer": gap.value,
                    "wer_95": f"[{gap.low:.3f}, {gap.high:.3f}]",
                    "state_ratio": per_kv["state_bytes_per_sequence"] / per_query["state_bytes_per_sequence"],
                    "step_ratio": f"{quartiles[1]:.2f} [{quartiles[0]:.2f}, {quartiles[2]:.2f}]",
                }
            )
            print_table(rows[-2:])
            print_table(differences[-1:])
            print(flush=True)
    print(f"teacher: WER {teacher_wer:.3f} on the same {len(test_rows)} sentences")
    print_table(rows)
    print("per_kv_head minus per_query_head (ratios: per_kv_head over per_query_head):")
    print_table(differences)
    if not arguments.quick:
        write_result("state_sharing", rows, differences=differences, teacher_wer=teacher_wer)


if __name__ == "__main__":
    main()
