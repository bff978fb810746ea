"""The closed form of a step's memory against what autograd keeps and against all tensors that live in a step."""

from contextlib import nullcontext

import pytest
import torch
from test_micro_batches import SavedBytes
from test_training import CPU, make_batch
from tiny_models import transformers_model, write_folder
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamtra_ray.align.mixer_training import MixerTraining
from mamtra_ray.config import AlignConfig, Config, DistillConfig
from mamtra_ray.distill.__main__ import main as distill
from mamtra_ray.distill.training import Distillation
from mamtra_ray.efficiency.architectures import decoder_architecture
from mamtra_ray.efficiency.memory import (
    alignment_memory,
    distillation_memory,
    forward_memory,
    mixer_parameters,
    saved_bytes,
)
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run import memory as run_memory
from mamtra_ray.run.memory import (
    Lengths,
    Machine,
    check_memory,
    memory_of_phases,
    memory_table,
    training_memory,
)
from mamtra_ray.search.__main__ import main as search
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import huggingface
from mamtra_ray.teachers.outline import architecture_of

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}


class LiveBytes(TorchDispatchMode):
    """The most bytes that the given tensors and all made since then have held at once."""

    def __init__(self, *held):
        super().__init__()
        self.peak, self._live = 0, {}
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            weak = StorageWeakRef(storage)
            self._live.setdefault(weak.cdata, (weak, storage.nbytes()))

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))
        return result


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = transformers_model("qwen2", **SHAPE)
    return huggingface.load(write_folder(tmp_path_factory.mktemp("teacher"), model))


def architecture(teacher, sharing="per_query_head"):
    return architecture_of(teacher, sharing)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharing", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize(("letters", "speech"), [("AAAA", (20, 30)), ("MMMM", (20, 40, 58)), ("AMMA", (90, 70, 80))])
def test_what_autograd_keeps(teacher, letters, speech, sharing, precision):
    student = make_student(teacher.model, letters, state_sharing=sharing)
    ids_BL = make_batch(teacher, speech, 0).input_ids_BL
    cast = nullcontext() if precision == "float32" else torch.autocast("cpu", dtype=torch.bfloat16)
    with SavedBytes(student) as saved, cast:
        hidden = student.hidden_states(ids_BL)
    shape = architecture(teacher, sharing)
    expected = saved_bytes(shape, Layout(letters), ids_BL.numel(), ids_BL.shape[1], precision)
    assert expected == pytest.approx(saved.total, rel=0.03)
    del hidden


@pytest.mark.parametrize(
    ("letters", "changes"),
    [
        ("AMAM", {}),
        ("MMMM", {"hidden_weight": 0.0}),
        ("AMAM", {"precision": "bfloat16"}),
        ("AMAM", {"micro_batch_tokens": 130}),
        ("AMAM", {"activation_checkpointing": True}),
        ("AAMM", {"activation_checkpointing": True, "precision": "bfloat16"}),
        ("AMAM", {"activation_checkpointing": True, "micro_batch_tokens": 130}),
        ("AMMM", {"loss_chunk_tokens": 16}),
    ],
)
def test_the_peak_of_a_step(teacher, letters, changes):
    batch = make_batch(teacher, (55,) * 8, 0)
    config = DistillConfig(**{"learning_rate": 1e-3, "tokens_per_batch": 500, **changes})
    training = Distillation(make_student(teacher.model, letters), config, 10**6, CPU)
    training.step(batch)
    moments = [t for state in training.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    held = (*training.student.parameters(), *moments, batch.teacher_targets.hidden_ND)
    with LiveBytes(*held) as live:
        training.step(batch)
    width = batch.input_ids_BL.shape[1]
    whole = batch.input_ids_BL.numel()
    expected = distillation_memory(
        architecture(teacher),
        Layout(letters),
        tokens=width * (config.micro_batch_tokens // width) if config.micro_batch_tokens else whole,
        length=width,
        batch_tokens=whole,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens,
        hidden_loss=bool(config.hidden_weight),
    )
    assert expected.parameters == sum(p.nbytes for p in training.student.parameters())
    assert expected.optimizer == pytest.approx(sum(t.nbytes for t in moments), rel=0.01)
    assert expected.total == pytest.approx(live.peak, rel=0.2)


def test_the_peak_of_an_alignment_step_and_of_a_forward_pass(teacher):
    batch = make_batch(teacher, (55,) * 8, 0)
    batch = replace_mask(batch)
    width, tokens = batch.input_ids_BL.shape[1], batch.input_ids_BL.numel()
    training = MixerTraining(teacher.model, AlignConfig(), "per_query_head", CPU)
    mixer = next(iter(training.mixers.values()))
    assert mixer_parameters(architecture(teacher)) == sum(p.numel() for p in mixer.parameters())
    training.step(batch)
    moments = [t for state in training.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    mixers = [p for mixer in training.mixers.values() for p in mixer.parameters()]
    with LiveBytes(*teacher.model.parameters(), *mixers, *moments) as live:
        training.step(batch)
    expected = alignment_memory(architecture(teacher), tokens=tokens, length=width)
    assert expected.total == pytest.approx(live.peak, rel=0.2)
    with LiveBytes(*teacher.model.parameters()) as live, torch.no_grad():
        teacher.model.hidden_states(batch.input_ids_BL)
    expected = forward_memory(architecture(teacher), tokens=tokens, logits_tokens=0)
    assert expected.total == pytest.approx(live.peak, rel=0.2)


def replace_mask(batch):
    """With what the alignment reads beside."""
    mask_BL = torch.ones_like(batch.input_ids_BL, dtype=torch.bool)
    return type("Batch", (), {**vars(batch), "attention_mask_BL": mask_BL})()


LENGTHS = Lengths(longest=300, total=10**7)


def phases(**distill):
    config = Config(distill=DistillConfig(**distill))
    return memory_of_phases(config, run_memory_architecture(), LENGTHS, [Layout("AM" * 12)])


def run_memory_architecture():
    from mamtra_ray.efficiency import ARCHITECTURES

    return ARCHITECTURES["cosyvoice2"]


def peak(name, **distill):
    return next(phase for phase in phases(**distill) if phase.phase == name)


def llasa(name):
    """Llama-3.2-3B or Llama-3.1-8B with Llasa's vocabulary of 193,800, and a head for its 65,536 codes and an end."""
    layers, width, inner, heads = {"3B": (28, 3072, 8192, 24), "8B": (32, 4096, 14336, 32)}[name]
    return decoder_architecture(
        f"Llasa-{name}",
        num_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=False,
        table_parameters=(193_800 + 65_537) * width,
        head_outputs=65_537,
    )


@pytest.mark.parametrize(
    ("name", "cards"), [("3B", {24: 4, 48: 2, 80: 1}), ("8B", {24: 16, 48: 4, 80: 2})], ids=["3B", "8B"]
)
def test_which_cards_a_large_student_needs(name, cards):
    """The least power of two of cards of a size, in GB, with a tenth of it left for what is not counted."""
    shape, settings = llasa(name), {"micro_batch_tokens": 2048, "activation_checkpointing": True}
    layout, found = Layout("AM" * (shape.num_layers // 2)), {}
    lengths, powers = Lengths(longest=2048, total=10**8), (1, 2, 4, 8, 16)
    for size in cards:
        for workers in powers:
            config = Config(
                distill=DistillConfig(
                    **settings,
                    learning_rate=1e-5,
                    workers=workers,
                    fully_shard=workers > 1,
                    precision="bfloat16" if workers > 1 else "float32",
                )
            )
            planned = training_memory(config, shape, lengths, [layout], "distill", workers)
            if planned.memory.total < 0.9 * size * 1e9:
                found[size] = workers
                check_memory([planned], Machine("the card", size * 10**9, is_card=True))
                break
    assert found == cards
    one = training_memory(Config(distill=DistillConfig(**settings)), shape, lengths, [layout], "distill", 1)
    card = Machine("the card", 48 * 10**9, is_card=True)
    with pytest.raises(InputError, match=r"distill: one process needs .* GB .* lower .*distill.fully_shard=true"):
        check_memory([one], Machine("the card", 36 * 10**9, is_card=True))
    # Before it is trained, a card must hold the teacher, and with student.initialization=aligned its mixers' training.
    assert forward_memory(shape, tokens=8192, logits_tokens=0).total < {"3B": 16e9, "8B": 34e9}[name]
    aligned = alignment_memory(shape, tokens=4096, length=2048).total
    assert aligned < {"3B": 32e9, "8B": 65e9}[name] and (aligned > card.memory_bytes) == (name == "8B")
    shared = alignment_memory(shape, tokens=4096, length=2048, workers=2, fully_shard=True).total
    assert shared < {"3B": 22e9, "8B": 40e9}[name]
    # Or one card, with the teacher's layers on the CPU.
    passes = [
        forward_memory(shape, tokens=8192, logits_tokens=0, cpu_offload=True),
        forward_memory(shape, tokens=4096, logits_tokens=1024, mixers=True, cpu_offload=True),
        alignment_memory(shape, tokens=4096, length=2048, cpu_offload=True),
    ]
    most = {"3B": (4.8e9, 5.8e9, 21e9), "8B": (7.0e9, 7.4e9, 38e9)}[name]
    assert all(one.total < limit for one, limit in zip(passes, most, strict=True))


def test_layers_on_the_cpu_are_not_on_the_card(teacher):
    """What is left: everything outside the layers, and the largest layer that a pass needs."""
    shape, pure_mamba = architecture(teacher), make_student(teacher.model, "MMMM")
    outside = sum(p.numel() for name, p in teacher.model.named_parameters() if not name.startswith("body.layers."))
    attention, mamba = (
        max(sum(p.numel() for p in layer.parameters()) for layer in model.body.layers)
        for model in (teacher.model, pure_mamba)
    )
    sizes = {"tokens": 512, "logits_tokens": 0, "cpu_offload": True}
    assert forward_memory(shape, **sizes).parameters == 4 * (outside + attention)
    assert forward_memory(shape, **sizes, mixers=True).parameters == 4 * (outside + max(attention, mamba))
    sizes = {"tokens": 512, "length": 128}
    aligned, offloaded = (alignment_memory(shape, **sizes, cpu_offload=offload) for offload in (False, True))
    assert aligned.total - offloaded.total == 4 * 3 * attention


def test_a_sharded_alignment_is_divided():
    shape, sizes = run_memory_architecture(), {"tokens": 512, "length": 128}
    whole = alignment_memory(shape, **sizes)
    part = alignment_memory(shape, **sizes, workers=4, fully_shard=True)
    assert part.gradients == pytest.approx(whole.gradients / 4, rel=1e-6)
    assert part.optimizer == pytest.approx(whole.optimizer / 4, rel=1e-6)
    head = 4 * shape.head_outputs * shape.hidden_size
    assert part.parameters == pytest.approx(head + (whole.parameters - head) / 4, rel=1e-6)
    copies = alignment_memory(shape, **sizes, workers=4)
    assert copies.gradients == 2 * whole.gradients and copies.parameters == whole.parameters


def test_a_sharded_student_is_divided():
    settings = {"micro_batch_tokens": 2048, "learning_rate": 1e-5, "precision": "bfloat16"}
    whole = peak("finalists", workers=8, **settings).memory
    part = peak("finalists", workers=8, fully_shard=True, **settings).memory
    assert part.gradients == pytest.approx(whole.gradients / 8, rel=1e-6)
    assert part.optimizer == pytest.approx(whole.optimizer / 8, rel=1e-6)
    # The head is not.
    head = 4 * run_memory_architecture().head_outputs * run_memory_architecture().hidden_size
    assert part.parameters == pytest.approx(head + (whole.parameters - head) / 8, rel=1e-6)
    assert part.activations < whole.activations, "without rounded copies of all weights"
    trials = peak("trials", workers=8, fully_shard=True, **settings).memory
    assert trials.parameters == whole.parameters, "a trial is one worker here"


def test_every_setting_lowers_what_it_says():
    whole = peak("finalists")
    assert [phase.phase for phase in phases()] == ["cache", "align", "probe", "trials", "finalists"]
    halved = peak("finalists", micro_batch_tokens=20_000).memory
    assert halved.activations == pytest.approx(whole.memory.activations / 2, rel=0.01)
    assert peak("finalists", workers=4).tokens == 10_000
    assert peak("finalists", activation_checkpointing=True).memory.total < whole.memory.total / 5
    assert peak("finalists", loss_chunk_tokens=1024).memory.logits == 4 * whole.memory.logits
    assert peak("finalists", precision="bfloat16").memory.activations < 0.8 * whole.memory.activations
    assert peak("finalists", micro_batch_tokens=7).tokens == 300, "an utterance is not cut"
    # The paper's batch on one card: 40,000 tokens of 24 layers.
    assert 100e9 < whole.memory.total < 300e9
    assert "finalists" in memory_table(phases())


@pytest.mark.parametrize("is_card", [False, True])
def test_only_what_is_certain_not_to_fit_is_refused(is_card):
    whole = peak("finalists").memory.total
    check_memory(phases(), None)
    check_memory(phases(), Machine("this machine", whole, is_card))
    with pytest.raises(InputError, match=r"trials: one process needs 1.* GB for 40,000 tokens at once, this machine"):
        check_memory(phases(), Machine("this machine", int(0.4 * whole), is_card))
    for fits in ({"micro_batch_tokens": "auto"}, {"micro_batch_tokens": 400}):
        check_memory(phases(**fits), Machine("this machine", 24 * 10**9, is_card))
    with pytest.raises(InputError, match=r"lower distill.activation_checkpointing=true or .*distill.loss_chunk_tokens"):
        check_memory(phases(micro_batch_tokens="auto")[3:], Machine("this machine", 4 * 10**9, is_card))


def test_dry_runs_say_it_and_refuse_it(tmp_path, monkeypatch, capsys):
    commands = {
        search: ["--run", str(tmp_path / "a"), "--dry-run"],
        distill: ["--run", str(tmp_path / "a"), "--dry-run", "--layout", "AM" * 6],
    }
    for verb, command in commands.items():
        assert verb(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.endswith("peak GB") for line in lines)
        monkeypatch.setattr(run_memory, "_host_bytes", lambda: 10**7)
        monkeypatch.setattr(run_memory.shutil, "which", lambda _: None)
        assert verb([*command, "resources.gpus_per_worker=0"]) == 2
        error = capsys.readouterr().err
        assert "one process needs 0." in error and "this machine has 0.0 GB: lower" in error
        # Elsewhere there may be room.
        assert verb([*command, "--address", "10.0.0.1:6379", "resources.gpus_per_worker=0"]) == 0
        assert verb([*command, "resources.gpus_per_worker=1"]) == 0
        monkeypatch.undo()
        monkeypatch.setattr(run_memory.shutil, "which", lambda _: None)
        assert verb([*command, "resources.gpus_per_worker=0", "distill.compile=true"]) == 2
        assert "distill.compile=true needs a C++ compiler" in capsys.readouterr().err
        monkeypatch.undo()
        capsys.readouterr()


def test_a_card_says_how_large_it_is(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA T4, 15360'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    machine = run_memory.machine_of(Config(), None)
    assert machine == Machine("the NVIDIA H100 80GB HBM3", 81559 * 2**20, is_card=True)
    program.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert run_memory.machine_of(Config(), None) is None
    assert run_memory.machine_of(Config.model_validate({"resources": {"gpus_per_worker": 0}}), None).name == (
        "this machine"
    )
