"""Sharded students: the training of one process, its checkpoints for any number of processes, and what each holds."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, CPU, Batch, make_batch, student_of, teacher  # noqa: F401 (a fixture)
from torch.distributed.tensor import DTensor

from mamtra_ray.config import Config, DistillConfig
from mamtra_ray.distill.training import Distillation
from mamtra_ray.efficiency.memory import distillation_memory
from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE, HiddenTargets
from mamtra_ray.runtime.sharding import whole
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers.outline import architecture_of

LENGTHS = (9, 4, 12, 3)
"""Speech tokens of the utterances of a batch."""
RANKS = {1: [(0, 1, 2, 3)], 2: [(0, 1, 2), (3,)], 3: [(0, 1), (2,), (3,)]}
"""Which of them every process has, by the number of processes."""
STEPS, TOKENS = 3, 3 * (sum(LENGTHS) + len(LENGTHS))
SHARDED = CONFIG.model_copy(update={"micro_batch_tokens": 30, "fully_shard": True})
GRADIENTS = {
    "parts": {},
    "whole": {"micro_batch_tokens": None},
    "checkpointed": {"activation_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16 checkpointed": {"precision": "bfloat16", "activation_checkpointing": True},
    "bfloat16 unsharded": {"precision": "bfloat16", "fully_shard": False},
}
"""Settings whose gradients are compared."""


def rows(batch, numbers):
    """The utterances ``numbers`` of a batch, as one process of several gets them."""
    labels_BL = batch.labels_BL[list(numbers)]
    hidden = batch.teacher_targets.hidden_ND.split((batch.labels_BL != IGNORE).sum(1).tolist())
    targets = HiddenTargets(torch.cat([hidden[number] for number in numbers]))
    tokens = int((labels_BL != IGNORE).sum())
    return Batch(batch.input_ids_BL[list(numbers)], labels_BL, targets, tokens, batch.num_tokens)


def read_batches(folder):
    batches = []
    for ids_BL, labels_BL, hidden_ND in torch.load(Path(folder) / "batches.pt", weights_only=True):
        tokens = int((labels_BL != IGNORE).sum())
        batches.append(Batch(ids_BL, labels_BL, HiddenTargets(hidden_ND), tokens, tokens))
    return batches


def run_processes(function, folder, count):
    shutil.rmtree(folder / "rendezvous", ignore_errors=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_process, args=(function, str(folder), count), nprocs=count)


def _process(rank, function, folder, count):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    batches = read_batches(folder)
    function(rank, Path(folder), batches, [rows(batch, RANKS[count][rank]) for batch in batches])
    # What holds the process group goes first, see test_training.
    gc.collect()
    torch.distributed.destroy_process_group()


def training_of(folder, count, **changes):
    """Of the student that shares its teacher's tensors, as workers make it."""
    config = DistillConfig(**{**SHARDED.model_dump(), **changes})
    student = make_student(SpeechLM.load(folder / "teacher"), "AMAM", share_weights=config.fully_shard)
    return Distillation(student, config, TOKENS, CPU, world_size=count)


def by_two(rank, folder, batches, own):
    found = {}
    for name, changes in GRADIENTS.items():
        training = training_of(folder, 2, **changes)
        training.accumulation.add_gradients(own[0])
        found[name] = {n: whole(p.grad) for n, p in training.student.named_parameters() if p.requires_grad}
    training = training_of(folder, 2)
    # As workers do: before the first step, before saving and before loading.
    training.validate(lambda: batches)
    curve = [training.step(batch).read() for batch in own[:2]]
    training.validate(lambda: batches)
    training.save(folder / "half")
    assert not (folder / "half" / "student").exists()
    held = [p.to_local() if isinstance(p, DTensor) else p for p in training.student.parameters()]
    moments = [t for state in training.optimizer.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    training.accumulation.add_gradients(own[2])
    local_gradients = [p.grad.to_local() for p in training.student.parameters() if p.requires_grad]
    training.optimizer.zero_grad()
    found["bytes"] = {
        "parameters": sum(t.nbytes for t in held),
        "optimizer": sum(t.to_local().nbytes for t in moments),
        "gradients": sum(t.nbytes for t in local_gradients),
    }
    again = training_of(folder, 2)
    again.validate(lambda: batches)
    again.load(folder / "half")
    assert again.position == training.position
    for each in (training, again):
        point = each.step(own[2]).read()
    curve.append(point)
    for (name, one), other in zip(training.student.named_parameters(), again.student.named_parameters(), strict=True):
        assert torch.equal(whole(one), whole(other[1])), f"{name} is not bit for bit what it would have been"
    again.save(folder / "end")
    scores = again.validate(lambda: batches)
    in_bfloat16 = training_of(folder, 2, precision="bfloat16").validate(lambda: batches)
    torch.save(
        {
            **found,
            "curve": curve,
            "scores": (scores.ce, scores.kl),
            "bfloat16 scores": (in_bfloat16.ce, in_bfloat16.kl),
        },
        folder / f"found-{rank}.pt",
    )


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):  # noqa: F811
    """What two processes have left in a folder, and the training of one process in its place."""
    folder = tmp_path_factory.mktemp("sharded")
    teacher.model.save(folder / "teacher")
    batches = [make_batch(teacher, LENGTHS, seed) for seed in range(STEPS)]
    torch.save([[b.input_ids_BL, b.labels_BL, b.teacher_targets.hidden_ND] for b in batches], folder / "batches.pt")
    run_processes(by_two, folder, 2)
    alone, curve = training_alone(teacher), []
    for step, batch in enumerate(batches):
        if step == 2:
            alone.save(folder / "half of one")
        curve.append(alone.step(batch).read())
    return folder, alone, curve


def training_alone(teacher):  # noqa: F811
    return Distillation(student_of(teacher), CONFIG, TOKENS, CPU)


def found_by(folder, rank=0):
    return torch.load(folder / f"found-{rank}.pt", weights_only=True)


def assert_same_weights(found, expected):
    for name, weight in expected.items():
        # Adam divides by the gradient's size, so where that is near 0 the order of a sum shows.
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["parts", "whole", "checkpointed"])
def test_gradients_of_two_processes_are_those_of_one(teacher, made, name):  # noqa: F811
    folder, _, _ = made
    alone = training_alone(teacher)
    alone.accumulation.add_gradients(read_batches(folder)[0])
    expected = {name: p.grad for name, p in alone.student.named_parameters() if p.requires_grad}
    for rank in range(2):
        found = found_by(folder, rank)[name]
        assert set(found) == set(expected) and len(found) > 30
        for tensor, gradient in expected.items():
            torch.testing.assert_close(found[tensor], gradient, rtol=1e-3, atol=1e-5, msg=tensor)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 checkpointed"])
def test_bfloat16_rounds_what_autocast_rounds(made, name):
    found = found_by(made[0])
    difference = 0.0
    for tensor, gradient in found["bfloat16 unsharded"].items():
        assert found[name][tensor].dtype == torch.float32
        torch.testing.assert_close(found[name][tensor], gradient, rtol=1e-5, atol=1e-6, msg=tensor)
        difference = max(difference, (gradient - found["parts"][tensor]).abs().max().item())
    assert difference > 1e-4, "in float32 they are others"


def test_a_training_of_two_processes_is_that_of_one(teacher, made):  # noqa: F811
    folder, alone, curve = made
    for rank in range(2):
        found = found_by(folder, rank)
        norms = [point["grad_norm"] for point in found["curve"]]
        assert norms == pytest.approx([point["grad_norm"] for point in curve], rel=1e-4)
        scores = alone.validate(lambda: read_batches(folder))
        assert found["scores"] == pytest.approx((scores.ce, scores.kl), rel=1e-5)
        start = training_alone(teacher).validate(lambda: read_batches(folder))
        assert found["bfloat16 scores"] == pytest.approx((start.ce, start.kl), rel=1e-2)
    student, start = SpeechLM.load(folder / "end" / "student").state_dict(), student_of(teacher).state_dict()
    assert_same_weights(student, alone.student.state_dict())
    assert max((student[name] - start[name]).abs().max().item() for name in start) > 1e-3
    assert torch.equal(student["head.weight"], teacher.model.head.weight)
    # The teacher whose tensors the student began with is as it was.
    assert SpeechLM.load(folder / "teacher").fingerprint() == teacher.model.fingerprint()


def test_one_process_goes_on_with_what_two_have_written(teacher, made):  # noqa: F811
    folder, alone, _ = made
    resumed = training_alone(teacher)
    resumed.load(folder / "half")
    assert resumed.position.step == 2
    resumed.step(read_batches(folder)[2])
    assert_same_weights(resumed.student.state_dict(), alone.student.state_dict())


def by_three(rank, folder, batches, own):
    for start in ("half", "half of one"):
        training = training_of(folder, 3)
        training.validate(lambda: batches)
        training.load(folder / start)
        training.step(own[2])
        training.save(folder / f"{start}, by three")
    for damaged in ("damaged", "lost"):
        with pytest.raises(InputError, match=r"is damaged, or not the file|does not exist"):
            training_of(folder, 3).load(folder / damaged)


@pytest.fixture(scope="module")
def damaged(made):
    folder, _, _ = made
    for name in ("damaged", "lost"):
        shutil.copytree(folder / "half", folder / name)
    shard = next((folder / "damaged").glob("shards-2/__1_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    next((folder / "lost").glob("shards-2/__0_*")).unlink()
    return folder


@pytest.mark.slow
def test_three_processes_go_on_with_what_two_or_one_have_written(made, damaged):
    """Some tensors have rows for two processes only."""
    run_processes(by_three, damaged, 3)
    for start in ("half", "half of one"):
        student = SpeechLM.load(damaged / f"{start}, by three" / "student").state_dict()
        assert_same_weights(student, made[1].student.state_dict())


def test_files_of_a_state_are_all_checked(teacher, damaged):  # noqa: F811
    folder = damaged
    content = json.loads((folder / "half" / "training.json").read_text())
    there = {str(path.relative_to(folder / "half")) for path in (folder / "half").glob("shards-2/*")}
    assert set(content["shards"]) == there and any(name.endswith("/.metadata") for name in there)
    assert sum(name.endswith(".distcp") for name in there) == 2
    with pytest.raises(InputError, match=r"__1_0\.distcp is damaged, or not the file"):
        training_alone(teacher).load(folder / "damaged")
    with pytest.raises(InputError, match=r"__0_0\.distcp does not exist"):
        training_alone(teacher).load(folder / "lost")
    other = Distillation(make_student(teacher.model, "MMAA"), CONFIG, TOKENS, CPU)
    with pytest.raises(InputError, match="made with another layout: 'AMAM', not 'MMAA'"):
        other.load(folder / "half")


def test_a_process_holds_its_part(teacher, made):  # noqa: F811
    """Rows of odd sizes are padded, so a process may hold a little more than a half."""
    folder, alone, _ = made
    shape = architecture_of(teacher, "per_query_head")
    plan = distillation_memory(
        shape, alone.student.layout, tokens=30, length=18, batch_tokens=60, workers=2, fully_shard=True
    )
    for rank in range(2):
        held = found_by(folder, rank)["bytes"]
        assert {name: getattr(plan, name) for name in held} == pytest.approx(held, rel=0.02)


def test_settings_that_do_not_go_together_are_refused_before_anything_runs():
    works = {"fully_shard": True, "workers": 2, "learning_rate": 1e-4}
    assert Config.model_validate({"distill": works}).distill.fully_shard
    for changes, sentence in (
        ({"workers": 1}, "distill.workers is 1"),
        ({"learning_rate": "auto"}, "auto tries rates on one worker"),
        ({"micro_batch_tokens": "auto"}, "leaves the others waiting"),
        ({"compile": True}, "not supported together"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Config.model_validate({"distill": works | changes})
