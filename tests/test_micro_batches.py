"""Gradients of micro batches: those of the whole batch, for any number of parts and processes; out of memory."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, CPU, Batch, join_two, make_batch, student_of, teacher  # noqa: F401 (a fixture)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mamtra_ray.config import DistillConfig
from mamtra_ray.distill.accumulation import Accumulation
from mamtra_ray.distill.micro_batches import micro_batches
from mamtra_ray.distill.training import Distillation, validate
from mamtra_ray.errors import DivergedError, InputError
from mamtra_ray.losses import IGNORE, HiddenTargets
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student

LENGTHS = (9, 4, 6, 2, 12)
"""Speech tokens of the utterances; every sequence has 6 more."""


def gradients(teacher, batch, double=True, **changes):  # noqa: F811
    """(terms, gradients by name) of one step in float64, where a rounding is far below any mistake."""
    student = student_of(teacher)
    student = student.double() if double else student
    if double:
        targets = batch.teacher_targets
        layers = {layer: t.double() for layer, t in targets.layers_ND.items()}
        batch = dataclasses.replace(batch, teacher_targets=HiddenTargets(targets.hidden_ND.double(), layers))
    accumulation = Accumulation(student, CONFIG.model_copy(update=changes), CPU)
    terms = accumulation.add_gradients(batch)
    return terms, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("most", [1, 20, 31, 60, 1000])
def test_micro_batches_have_the_gradient_of_the_whole_batch(teacher, most):  # noqa: F811
    batch = make_batch(teacher, LENGTHS, 0)
    with torch.no_grad():
        _, layers = teacher.model.hidden_states(batch.input_ids_BL, return_layers=True)
    labeled = batch.labels_BL != IGNORE
    targets = HiddenTargets(batch.teacher_targets.hidden_ND, {1: layers[1][labeled]})
    batch = dataclasses.replace(batch, teacher_targets=targets)
    changes = {"hidden_layers": ("final", 1), "loss_chunk_tokens": 5}
    whole_terms, whole = gradients(teacher, batch, **changes)
    terms, found = gradients(teacher, batch, micro_batch_tokens=most, **changes)
    torch.testing.assert_close(terms, whole_terms, rtol=1e-12, atol=0)
    assert set(found) == set(whole) and len(whole) > 30
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("most", [1, 20, 31, 60, 1000, None])
def test_parts_hold_every_labeled_position_once_and_no_more_than_they_may(teacher, most):  # noqa: F811
    batch = make_batch(teacher, LENGTHS, 0)
    parts = micro_batches(batch, most)
    labeled = batch.labels_BL != IGNORE
    assert torch.equal(torch.cat([part.labels_n for part in parts]), batch.labels_BL[labeled])
    hidden = torch.cat([part.teacher_targets.hidden_ND for part in parts])
    assert torch.equal(hidden, batch.teacher_targets.hidden_ND)
    ids = torch.cat([part.input_ids_bl.flatten()[part.labeled_n] for part in parts])
    assert torch.equal(ids, batch.input_ids_BL[labeled])
    assert sum(part.num_utterances for part in parts) == len(LENGTHS)
    lengths, first = [speech + 6 for speech in LENGTHS], 0
    for part in parts:
        end = first + part.num_utterances
        assert most is None or part.num_padded <= most or part.num_utterances == 1
        if most is not None:
            assert part.input_ids_bl.shape[1] == max(lengths[first:end])
            if end < len(lengths):
                with_next = max(lengths[first : end + 1]) * (end + 1 - first)
                assert with_next > most, "the next utterance would have fitted"
        first = end


def test_held_out_scores_do_not_depend_on_the_parts(teacher):  # noqa: F811
    batch, student = make_batch(teacher, LENGTHS, 0), student_of(teacher)
    whole = validate(student, [batch])
    for most in (1, 30):
        parts = validate(student, [batch], most)
        assert parts.tokens == whole.tokens
        assert (parts.ce, parts.kl) == pytest.approx((whole.ce, whole.kl), rel=1e-5)


class Memory:
    """A made-up device, on which a forward pass of more than ``room`` padded tokens runs out of memory."""

    def __init__(self, monkeypatch, room):
        self.room, self.held = room, []
        forward = SpeechLM.hidden_states

        def limited(student, input_ids_BL, **more):
            self.held.append(input_ids_BL.numel())
            # Drawn before and after: a step that is done again must not see other numbers.
            torch.rand(1)
            if input_ids_BL.numel() > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(student, input_ids_BL, **more)

        monkeypatch.setattr(SpeechLM, "hidden_states", limited)


def test_auto_halves_until_a_step_fits_and_remembers(teacher, monkeypatch, tmp_path):  # noqa: F811
    batches = [make_batch(teacher, LENGTHS, seed) for seed in range(3)]
    config = CONFIG.model_copy(update={"micro_batch_tokens": 22})
    expected = Distillation(student_of(teacher), config, 100, CPU)
    curve = [expected.step(batch).read() for batch in batches]

    said: list[str] = []
    auto = CONFIG.model_copy(update={"micro_batch_tokens": "auto"})
    training = Distillation(student_of(teacher), auto, 100, CPU, say=said.append)
    memory = Memory(monkeypatch, room=36)
    random_state = torch.get_rng_state()
    found = [training.step(batches[0]).read()]
    # 5 rows of 18 do not fit, of 45 neither (2 of 15, 1 of 12): what fits are halves of what did not.
    assert training.accumulation.most_tokens == 22 and memory.held[:1] == [90]
    assert said == [
        f"a step did not fit in memory: from now on in micro batches of {most} padded tokens" for most in (45, 22)
    ]
    random_state_after = torch.get_rng_state()
    torch.set_rng_state(random_state)
    for _ in micro_batches(batches[0], 22):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), random_state_after), "as if only the last try had been made"
    tries = len(memory.held)
    found.append(training.step(batches[1]).read())
    assert len(memory.held) == tries + len(micro_batches(batches[1], 22)), "no second search"
    training.save(tmp_path)
    resumed = Distillation(student_of(teacher), auto, 100, CPU, say=said.append)
    resumed.load(tmp_path)
    found.append(resumed.step(batches[2]).read())
    assert len(said) == 2 and found == curve
    for (name, weight), other in zip(
        expected.student.state_dict().items(), resumed.student.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name


def test_what_cannot_be_made_smaller_is_refused_and_changes_nothing(teacher, monkeypatch):  # noqa: F811
    batch = make_batch(teacher, LENGTHS, 0)
    for micro, hint in (("auto", "activation_checkpointing"), (30, r"micro_batch_tokens \(or auto\)"), (None, "auto")):
        config = CONFIG.model_copy(update={"micro_batch_tokens": micro})
        training = Distillation(student_of(teacher), config, 100, CPU, say=lambda _: None)
        before = {name: weight.clone() for name, weight in training.student.state_dict().items()}
        with monkeypatch.context() as patch:
            Memory(patch, room=17)  # the longest utterance takes 18
            with pytest.raises(InputError, match=f"does not fit in memory: try .*{hint}"):
                training.step(batch)
        assert training.position.step == 0 and not training.optimizer.state
        assert all(torch.equal(before[name], weight) for name, weight in training.student.state_dict().items())


def test_auto_halves_for_the_held_out_scores_too(teacher, monkeypatch):  # noqa: F811
    batch = make_batch(teacher, LENGTHS, 0)
    config = CONFIG.model_copy(update={"micro_batch_tokens": "auto"})
    training = Distillation(student_of(teacher), config, 100, CPU)
    whole = training.validate(lambda: [batch])
    Memory(monkeypatch, room=36)
    parts = training.validate(lambda: [batch])
    assert (parts.ce, parts.kl, parts.tokens) == pytest.approx((whole.ce, whole.kl, whole.tokens), rel=1e-5)
    assert training.student.training
    with pytest.raises(InputError, match="held-out scores of AMAM do not fit"):
        Distillation(student_of(teacher), CONFIG, 100, CPU).validate(lambda: [batch])


@pytest.mark.parametrize("micro", [30, "auto"])
def test_two_processes_with_unequal_numbers_of_parts_equal_one(teacher, tmp_path, micro):  # noqa: F811
    """Process 0 has three utterances in up to three parts, process 1 one; with auto, only process 0 runs out."""
    lengths = [(9, 4, 12), (3,)]
    parts = [make_batch(teacher, rows, seed) for seed, rows in enumerate(lengths)]
    teacher.model.save(tmp_path / "teacher")
    torch.save([[b.input_ids_BL, b.labels_BL, b.teacher_targets.hidden_ND] for b in parts], tmp_path / "parts.pt")
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path), micro), nprocs=2)
    width = parts[0].input_ids_BL.shape[1] - parts[1].input_ids_BL.shape[1]
    pad = torch.nn.functional.pad
    whole = Batch(
        torch.cat([parts[0].input_ids_BL, pad(parts[1].input_ids_BL, (0, width))]),
        torch.cat([parts[0].labels_BL, pad(parts[1].labels_BL, (0, width), value=IGNORE)]),
        HiddenTargets(torch.cat([b.teacher_targets.hidden_ND for b in parts])),
        sum(b.num_tokens for b in parts),
        sum(b.num_tokens for b in parts),
    )
    _, expected = gradients(teacher, whole, double=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True)
        assert found.pop("most_tokens") == {30: 30, "auto": 27}[micro]
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def _one_of_two(rank: int, folder: str, micro: int | str) -> None:
    batch = join_two(rank, folder)
    student = make_student(SpeechLM.load(f"{folder}/teacher"), "AMAM")
    config = DistillConfig(**{**CONFIG.model_dump(), "micro_batch_tokens": micro})
    accumulation = Accumulation(student, config, CPU, world_size=2)
    if micro == "auto":
        patch = pytest.MonkeyPatch()
        memory = Memory(patch, room=36)
        accumulation.add_gradients(batch)
        # 54 tokens did not fit here, and 9 there would have.
        assert len(memory.held) == (4 if rank == 0 else 2)
        patch.undo()
    else:
        accumulation.add_gradients(batch)
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    torch.save({**found, "most_tokens": accumulation.most_tokens}, Path(folder) / f"gradients-{rank}.pt")
    del accumulation
    gc.collect()
    torch.distributed.destroy_process_group()


class ReadsOfTheDevice(TorchDispatchMode):
    """Notes every operation whose result's size or value the CPU must wait for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_assert_async")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        name = operation.overloadpacket.__name__
        indices = arguments[1] if name in ("index", "index_put", "index_put_") else []
        masks = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if masks or name in self.WAITING:
            self.found.append(name)
        return operation(*arguments, **(named or {}))


def test_a_step_waits_for_nothing_on_the_device(teacher, monkeypatch):  # noqa: F811
    batch = make_batch(teacher, LENGTHS, 0)
    config = CONFIG.model_copy(update={"micro_batch_tokens": 40, "hidden_layers": ("final",)})
    training = Distillation(student_of(teacher), config, 100, CPU)
    training.checks_one_step_later = True
    training.step(batch)
    # Where to cut is known from the labels' copy on the CPU.
    parts = micro_batches(batch, 40)
    monkeypatch.setattr("mamtra_ray.distill.accumulation.micro_batches", lambda *_: parts)
    monkeypatch.setattr("mamtra_ray.distill.curve.HostCopy.read", lambda _: [0.0] * 5)
    with ReadsOfTheDevice() as reads:
        training.step(batch)
    assert reads.found == []
    with ReadsOfTheDevice() as reads:
        float(batch.labels_BL[batch.labels_BL != IGNORE].sum())
    assert reads.found == ["index", "_local_scalar_dense"], "the check sees what it is for"


def test_a_gradient_that_is_looked_at_later_still_ends_the_training(teacher, tmp_path):  # noqa: F811
    batch = make_batch(teacher, (5,), 0)
    nan = HiddenTargets(batch.teacher_targets.hidden_ND * torch.nan)
    spoiled = dataclasses.replace(batch, teacher_targets=nan)
    for then in ("step", "save", "validate"):
        training = Distillation(student_of(teacher), CONFIG, 100, CPU)
        training.checks_one_step_later = True
        training.step(batch)
        training.step(spoiled)
        with pytest.raises(DivergedError, match="norm is nan at step 1 "):
            {
                "step": lambda: training.step(batch),  # noqa: B023
                "save": lambda: training.save(tmp_path),  # noqa: B023
                "validate": lambda: training.validate(lambda: [batch]),  # noqa: B023
            }[then]()
    assert not list(tmp_path.iterdir())


def test_bfloat16_keeps_weights_and_sums_of_gradients_in_float32(teacher, tmp_path):  # noqa: F811
    config = CONFIG.model_copy(update={"precision": "bfloat16", "micro_batch_tokens": 30})
    training = Distillation(student_of(teacher), config, 100, CPU)
    training.step(make_batch(teacher, LENGTHS, 0))
    moments = [t for state in training.optimizer.state.values() for t in state.values()]
    training.save(tmp_path)
    saved = SpeechLM.load(tmp_path / "student").state_dict().values()
    assert {t.dtype for t in (*training.student.parameters(), *moments, *saved)} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(teacher, precision):  # noqa: F811
    batch = make_batch(teacher, LENGTHS, 0)
    kept, found = {}, {}
    for is_on in (False, True):
        student = student_of(teacher)
        config = CONFIG.model_copy(update={"activation_checkpointing": is_on, "precision": precision})
        with SavedBytes(student) as saved:
            accumulation = Accumulation(student, config, CPU)
            terms = accumulation.objective(micro_batches(batch, None)[0], float(batch.num_tokens))
        kept[is_on] = saved.total
        del terms
        accumulation.add_gradients(batch)
        found[is_on] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for name, gradient in found[False].items():
        assert torch.equal(found[True][name], gradient), name
    assert kept[True] < kept[False] / 4


class SavedBytes:
    """Bytes that forward passes keep for the backward pass, parameters left out, every storage once."""

    def __init__(self, model):
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._held: list[Tensor] = []
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._held.append(tensor)  # or its place could be another one's
            self.total += storage.nbytes()
        return tensor

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
