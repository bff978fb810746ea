"""Distillation steps: they lower the loss, resume bit for bit, and several processes equal one."""

import dataclasses
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import transformers_model, write_folder
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from mamtra_ray.artifacts import write_json
from mamtra_ray.config import DistillConfig
from mamtra_ray.distill.training import Distillation, validate
from mamtra_ray.errors import DivergedError, InputError
from mamtra_ray.losses import IGNORE, HiddenTargets
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import huggingface
from mamtra_ray.teachers.teacher import Teacher

CONFIG = DistillConfig(learning_rate=3e-3, warmup_fraction=0.25, tokens_per_batch=40)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    input_ids_BL: Tensor
    labels_BL: Tensor
    teacher_targets: Any
    num_tokens: int
    step_tokens: int

    @property
    def host_labels_BL(self) -> Tensor:
        return self.labels_BL


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    return huggingface.load(write_folder(tmp_path_factory.mktemp("teacher"), transformers_model("qwen2")))


def make_batch(teacher: Teacher, lengths: tuple[int, ...], seed: int) -> Batch:
    """Right-padded utterances with the teacher's hidden states at the labeled positions."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = teacher.model.vocabulary
    rows = []
    for length in lengths:
        text = torch.randint(vocabulary.text_size, (3,), generator=generator).tolist()
        speech = torch.randint(vocabulary.eos_id, (length,), generator=generator).tolist()
        rows.append(teacher.sequence.training_example(text, speech))
    ids_BL = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    labels_BL = torch.nn.utils.rnn.pad_sequence([labels for _, labels in rows], True, IGNORE)
    labeled_BL = labels_BL != IGNORE
    with torch.no_grad():
        hidden_ND = teacher.model.hidden_states(ids_BL)[labeled_BL]
    tokens = int(labeled_BL.sum())
    return Batch(ids_BL, labels_BL, HiddenTargets(hidden_ND), tokens, tokens)


def student_of(teacher: Teacher) -> SpeechLM:
    letters = "AM" * (teacher.model.layout.num_layers // 2) + "M" * (teacher.model.layout.num_layers % 2)
    return make_student(teacher.model, letters)


def test_steps_lower_the_held_out_loss_and_leave_table_and_head_alone(teacher):
    batches = [make_batch(teacher, (9, 4), seed) for seed in range(3)]
    training = Distillation(student_of(teacher), CONFIG, 20 * 15, CPU)
    table = training.student.body.embed_tokens.weight.clone()
    before = validate(training.student, iter(batches))
    for step in range(20):
        training.step(batches[step % 3])
    after = validate(training.student, iter(batches))
    assert after.ce < before.ce and after.kl < 0.9 * before.kl
    assert training.position.tokens == sum(batches[step % 3].num_tokens for step in range(20))
    assert torch.equal(training.student.body.embed_tokens.weight, table)
    assert torch.equal(training.student.head.weight, teacher.model.head.weight)


@pytest.mark.parametrize("levels", [("final",), (1,), ("final", 0, 3)])
def test_the_embedding_loss_is_taken_where_the_configuration_says(teacher, levels):
    batch = make_batch(teacher, (9, 4), 0)
    student = student_of(teacher)
    theirs, ours = states_of(teacher.model, batch), states_of(student, batch)
    expected = torch.stack([(theirs[level] - ours[level]).square().mean() for level in levels]).mean()
    layers = {layer: theirs[layer] for layer in range(4)}
    batch = dataclasses.replace(batch, teacher_targets=HiddenTargets(batch.teacher_targets.hidden_ND, layers))
    config = CONFIG.model_copy(update={"hidden_layers": levels, "ce_weight": 0.0, "kl_weight": 0.0})
    before = [layer.mlp.down_proj.weight.clone() for layer in student.body.layers]
    terms = Distillation(student, config, 100, CPU).step(batch).read()
    assert terms["hidden"] == pytest.approx(expected.item(), rel=1e-5)
    assert terms["total"] == pytest.approx(terms["hidden"])
    after = [layer.mlp.down_proj.weight for layer in student.body.layers]
    learnt = [index for index in range(4) if not torch.equal(before[index], after[index])]
    assert learnt == list(range(4 if "final" in levels else max(levels) + 1))


@torch.no_grad()
def states_of(model: SpeechLM, batch: Batch) -> dict[Any, Tensor]:
    """Hidden states at the labeled positions, by level."""
    final_BLD, layers = model.hidden_states(batch.input_ids_BL, return_layers=True)
    labeled_BL = batch.labels_BL != IGNORE
    return {level: t[labeled_BL] for level, t in (("final", final_BLD), *enumerate(layers))}


def test_held_out_scores_count_every_token_once(teacher):
    batches = [make_batch(teacher, (9, 4), 0), make_batch(teacher, (2,), 1)]
    student = student_of(teacher)
    ce, kl, tokens = 0.0, 0.0, 0
    for batch in batches:
        labeled = batch.labels_BL != IGNORE
        logits = student(batch.input_ids_BL)[labeled].double()
        target = teacher.model.head(batch.teacher_targets.hidden_ND).double().log_softmax(-1)
        ce += cross_entropy(logits, batch.labels_BL[labeled], reduction="sum").item()
        kl += kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True).item()
        tokens += int(labeled.sum())
    scores = validate(student, iter(batches))
    assert scores.tokens == tokens
    assert scores.ce == pytest.approx(ce / tokens, rel=1e-5)
    assert scores.kl == pytest.approx(kl / tokens, rel=1e-4)


def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(teacher, tmp_path):
    batches = [make_batch(teacher, (5, 7), seed) for seed in range(4)]
    whole = Distillation(student_of(teacher), CONFIG, 100, CPU)
    for batch in batches:
        whole.step(batch)
    first = Distillation(student_of(teacher), CONFIG, 100, CPU)
    for batch in batches[:2]:
        first.step(batch)
    first.next_epoch()
    first.save(tmp_path)
    second = Distillation(student_of(teacher), CONFIG, 100, CPU)
    second.load(tmp_path)
    assert (second.position.step, second.position.epoch, second.position.batch) == (2, 1, 0)
    for batch in batches[2:]:
        second.step(batch)
    for (name, expected), found in zip(
        whole.student.state_dict().items(), second.student.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name


def test_a_foreign_training_state_is_refused(teacher, tmp_path):
    training = Distillation(student_of(teacher), CONFIG, 100, CPU)
    training.save(tmp_path)
    write_json(tmp_path / "training.json", {"kind": "corpus"})
    with pytest.raises(InputError, match="no training state"):
        training.load(tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_schedule(teacher, schedule):
    config = CONFIG.model_copy(update={"schedule": schedule})
    training = Distillation(student_of(teacher), config, 1000, CPU)

    def at(tokens: int) -> float:
        training.position = dataclasses.replace(training.position, tokens=tokens)
        return training.learning_rate() / config.learning_rate

    assert 0 < at(0) < at(100) < at(200) < 1
    assert at(250) == pytest.approx(1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert at(625) == pytest.approx(1 if schedule == "constant" else middle)
    assert at(1000) == pytest.approx(1 if schedule == "constant" else 0.1)
    assert at(5000) == at(1000)


def test_an_exploded_step_is_refused_before_it_spoils_the_weights(teacher):
    training = Distillation(student_of(teacher), CONFIG, 100, CPU)
    batch = make_batch(teacher, (5,), 0)
    spoiled = dataclasses.replace(batch, teacher_targets=HiddenTargets(batch.teacher_targets.hidden_ND * math.inf))
    before = [parameter.clone() for parameter in training.student.parameters()]
    with pytest.raises(DivergedError, match="has diverged: its gradient's norm is nan at step"):
        training.step(spoiled)
    assert all(torch.equal(a, b) for a, b in zip(before, training.student.parameters(), strict=True))


def test_two_processes_equal_one(teacher, tmp_path):
    """Utterances of unequal length on two processes give the weights of one process with the whole batch."""
    parts = [make_batch(teacher, (9,), 0), make_batch(teacher, (3,), 1)]
    teacher.model.save(tmp_path / "teacher")
    torch.save([[b.input_ids_BL, b.labels_BL, b.teacher_targets.hidden_ND] for b in parts], tmp_path / "parts.pt")
    # Not forked: a fork of a process whose libraries have threads can hang.
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)

    length = parts[0].input_ids_BL.shape[1]
    whole = Batch(
        torch.cat([torch.nn.functional.pad(b.input_ids_BL, (0, length - b.input_ids_BL.shape[1])) for b in parts]),
        torch.cat(
            [torch.nn.functional.pad(b.labels_BL, (0, length - b.labels_BL.shape[1]), value=IGNORE) for b in parts]
        ),
        HiddenTargets(torch.cat([b.teacher_targets.hidden_ND for b in parts])),
        sum(b.num_tokens for b in parts),
        sum(b.num_tokens for b in parts),
    )
    alone = Distillation(student_of(teacher), CONFIG, 100, CPU)
    for _ in range(3):
        alone.step(whole)
    together = SpeechLM.load(tmp_path / "student").state_dict()
    moved = 0.0
    for name, expected in alone.student.state_dict().items():
        # Adam divides by the gradient's size, so where that is near 0 the order of a sum shows (3e-5, one in 1,000).
        torch.testing.assert_close(together[name], expected, rtol=0, atol=1e-4, msg=name)
    start = student_of(teacher).state_dict()
    moved = max((together[name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3


def join_two(rank: int, folder: str) -> Batch:
    """In one of two processes: join the other one, and take this one's part of the step in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parts = torch.load(f"{folder}/parts.pt", weights_only=True)
    counts = [int((labels_BL != IGNORE).sum()) for _, labels_BL, _ in parts]
    ids_BL, labels_BL, hidden_ND = parts[rank]
    return Batch(ids_BL, labels_BL, HiddenTargets(hidden_ND), counts[rank], sum(counts))


def _one_of_two(rank: int, folder: str) -> None:
    batch = join_two(rank, folder)
    teacher = SpeechLM.load(f"{folder}/teacher")
    letters = "AM" * (teacher.layout.num_layers // 2) + "M" * (teacher.layout.num_layers % 2)
    training = Distillation(make_student(teacher, letters), CONFIG, 100, CPU, world_size=2)
    for _ in range(3):
        training.step(batch)
    if rank == 0:
        training.student.save(Path(folder) / "student")
    # DistributedDataParallel must go before its process group: the other way round, PyTorch 2.13 sometimes hangs
    # (the group's destructor joins, under the interpreter's lock, a thread that waits for that lock).
    del training
    gc.collect()
    torch.distributed.destroy_process_group()
