"""Alignment against plain transformers, plain least squares, plain autograd, and a stopped and resumed run."""

import gc
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import cache_without_ray, tiny_config
from tiny_models import SEQUENCE, transformers_model, write_folder

from mamtra_ray.align import alignment as align_module
from mamtra_ray.align.alignment import AlignJob, align, align_mixers, library_made_by
from mamtra_ray.align.mixer_library import MANIFEST, WEIGHTS, load_library, read_library_manifest
from mamtra_ray.align.mixer_training import MixerTraining, Position, attention_taps
from mamtra_ray.align.phase import one_writer
from mamtra_ray.config import AlignConfig, Config
from mamtra_ray.errors import DivergedError, InputError
from mamtra_ray.models.transfer import mixer_from_attention
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.shared import share_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model()))


def batch_of(lengths, seed=0):
    """Right-padded random utterances of these many speech tokens."""
    random = np.random.default_rng(seed)
    rows = [SEQUENCE.training_example([1, 2, 3], random.integers(0, 38, length).tolist()) for length in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    return SimpleNamespace(
        input_ids_BL=pad([ids for ids, _ in rows], batch_first=True),
        attention_mask_BL=pad([torch.ones(len(ids), dtype=torch.bool) for ids, _ in rows], batch_first=True),
    )


def recorded(teacher, batch):
    taps = {}
    with torch.no_grad(), attention_taps(teacher.model, lambda layer, x, y: taps.__setitem__(layer, (x, y))):
        teacher.model.hidden_states(batch.input_ids_BL)
    return taps


def test_taps_see_what_transformers_attention_reads_and_writes(teacher):
    batch, expected = batch_of([9]), {}
    model = transformers_model()
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _module, _args, kwargs, output, index=index: expected.update(
                {index: (kwargs["hidden_states"], output[0])}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(batch.input_ids_BL)
    taps = recorded(teacher, batch)
    assert set(taps) == set(expected) == {0, 1, 2, 3}
    for layer, pair in expected.items():
        for found, wanted in zip(taps[layer], pair, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_step_of_all_layers_is_one_step_of_each(teacher):
    batch, config = batch_of([9, 5, 7]), AlignConfig(tokens=1000, tokens_per_batch=30)
    training = MixerTraining(teacher.model, config, "per_query_head", CPU)
    rate = training.learning_rate()
    training.step(batch)
    weight = batch.attention_mask_BL[..., None]
    for layer, (x, y) in recorded(teacher, batch).items():
        attention = teacher.model.body.layers[layer].self_attn
        mixer = mixer_from_attention(attention, teacher.model.config.mixer, "transfer", layer)
        optimizer = torch.optim.AdamW(mixer.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        loss = ((mixer(x) - y).square() * weight).sum() / (y.square() * weight).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimizer.step()
        for name, parameter in training.mixers[layer].named_parameters():
            wanted = dict(mixer.named_parameters())[name]
            torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def part_of(batch, rank):
    """One of three processes' part; that of the last batch is empty for two of them."""
    rows = slice(rank, None, 3)
    ids_BL, mask_BL = batch.input_ids_BL[rows], batch.attention_mask_BL[rows]
    if not len(ids_BL):
        return SimpleNamespace(
            input_ids_BL=batch.input_ids_BL[:1], attention_mask_BL=batch.attention_mask_BL[:1] & False
        )
    length = int(mask_BL.sum(1).max())
    return SimpleNamespace(input_ids_BL=ids_BL[:, :length], attention_mask_BL=mask_BL[:, :length])


STEPS = [
    batch_of(lengths, seed) for seed, lengths in enumerate([(30, 4, 9, 17), (12, 25, 7), (3, 40, 8, 8, 21), (16,)])
]
TOGETHER = AlignConfig(tokens=400, tokens_per_batch=100, learning_rate=6e-3)


SHARDED = TOGETHER.model_copy(update={"workers": 3, "fully_shard": True})


def together(teacher, world_size=1, config=TOGETHER):
    return MixerTraining(teacher.model, config, "per_query_head", CPU, world_size, seed=5)


def trained_together(teacher, rank=0, world_size=1, config=TOGETHER, state=None):
    """All steps; before the last one the state is kept in a folder."""
    training = together(teacher, world_size, config)
    parts = STEPS if world_size == 1 else [part_of(batch, rank) for batch in STEPS]
    training.fit_output_projections(parts)
    errors = [training.step(part) for part in parts[:-1]]
    if state is not None:
        training.save(state, {}, note="half")
    errors.append(training.step(parts[-1]))
    return training, errors


def _one_of_three(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    teacher = load_teacher("huggingface", f"{folder}/teacher")
    before = teacher.model.fingerprint()
    sharded, sharded_errors = trained_together(teacher, rank, 3, SHARDED, Path(folder) / "half of three")
    held = sum(p.to_local().numel() for p in (*sharded.teacher.body.parameters(), *sharded._trained().values()))
    scores = sharded.errors(STEPS)  # passes without gradients leave the parts as they are
    resumed = {}
    for start in ("half of three", "half of one"):
        again = together(teacher, 3, SHARDED)
        assert again.load(Path(folder) / start, {})["note"] == "half"
        again.step(part_of(STEPS[-1], rank))
        resumed[start] = again.library()
    libraries = {"sharded": sharded.library(), **resumed}
    assert teacher.model.fingerprint() == before, "the teacher was changed"
    training, errors = trained_together(teacher, rank, 3)
    if rank == 0:
        libraries["together"] = training.library()
        found = (libraries, {"together": errors, "sharded": sharded_errors}, training.position.tokens, scores, held)
        torch.save(found, f"{folder}/together.pt")
    else:
        assert not libraries["sharded"]
    gc.collect()  # what holds the process group goes first
    torch.distributed.destroy_process_group()


def assert_same_library(found, expected):
    for layer, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[layer][name], tensor, rtol=0, atol=3e-4, msg=f"{layer}.{name}")


def test_several_workers_are_one_worker(tmp_path):
    """Same seed, same batches: the same mixers up to rounding, however unequal the parts are, sharded or not; and
    sharded ones go on with what one worker has written, and the other way round."""
    write_folder(tmp_path / "teacher", transformers_model())
    teacher = load_teacher("huggingface", tmp_path / "teacher")
    alone, alone_errors = trained_together(teacher, state=tmp_path / "half of one")
    torch.multiprocessing.spawn(_one_of_three, args=(str(tmp_path),), nprocs=3)
    libraries, errors, tokens, scores, held = torch.load(tmp_path / "together.pt", weights_only=True)
    assert tokens == alone.position.tokens
    for name, library in libraries.items():
        assert set(library) == {0, 1, 2, 3}, name
        assert_same_library(library, alone.library())
    assert scores == pytest.approx(alone.errors(STEPS), rel=1e-3)
    everything = sum(p.numel() for p in (*teacher.model.body.parameters(), *alone._trained().values()))
    assert held < 0.4 * everything, "a process holds more than its part"
    of_one = together(teacher)
    of_one.load(tmp_path / "half of three", {})
    of_one.step(STEPS[-1])
    assert_same_library(of_one.library(), alone.library())
    for steps in errors.values():
        for layer in range(4):
            # By the sums of all parts, not by the mean of their ratios.
            assert [step[layer] for step in steps] == pytest.approx([step[layer] for step in alone_errors], rel=1e-3)
    library = libraries["together"]
    start = MixerTraining(load_teacher("huggingface", tmp_path / "teacher").model, TOGETHER, "per_query_head", CPU)
    moved = [(library[0][name] - tensor).abs().max() for name, tensor in start.library()[0].items()]
    assert max(moved) > 1e-2


def test_an_alignment_that_diverges_is_named_before_it_spoils_the_mixers(teacher):
    training = MixerTraining(teacher.model, TOGETHER, "per_query_head", CPU)
    before = training.library()
    with torch.no_grad():
        norm = training.mixers[2].norm.weight
        norm[0] = torch.inf
        before[2]["norm.weight"] = norm.clone()
    with pytest.raises(DivergedError, match=r"the alignment of layer 2 has diverged at step 0: .*align\.learning_rate"):
        training.step(STEPS[0])
    for layer, tensors in training.library().items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, before[layer][name], rtol=0, atol=0)


def test_output_projections_are_the_least_squares_solution(teacher):
    sample = [batch_of([30, 25, 28], seed) for seed in range(4)]
    training = MixerTraining(teacher.model, AlignConfig(), "per_query_head", CPU)
    before = training.errors(sample)
    assert training.fit_output_projections(sample) == sum(int(batch.attention_mask_BL.sum()) for batch in sample)
    after = training.errors(sample)
    for layer in range(4):
        features, targets = [], []
        handle = training.mixers[layer].out_proj.register_forward_pre_hook(
            lambda _module, args, features=features: features.append(args[0].detach())
        )
        for batch in sample:
            x, y = recorded(teacher, batch)[layer]
            training.mixers[layer](x)
            features[-1], target = features[-1][batch.attention_mask_BL], y[batch.attention_mask_BL]
            targets.append(target)
        handle.remove()
        inputs, outputs = torch.cat(features).double().numpy(), torch.cat(targets).double().numpy()
        solution, *_ = np.linalg.lstsq(inputs, outputs, rcond=None)
        best = np.square(inputs @ solution - outputs).sum() / np.square(outputs).sum()
        # The ridge costs a little; the errors are sums in float32.
        assert best - 1e-6 <= after[layer] < best + 2e-3
        assert after[layer] < before[layer]


def test_padding_changes_no_error(teacher):
    training = MixerTraining(teacher.model, AlignConfig(), "per_query_head", CPU)
    together = batch_of([9, 17])
    alone = [
        SimpleNamespace(input_ids_BL=ids[mask][None], attention_mask_BL=mask[mask][None])
        for ids, mask in zip(together.input_ids_BL, together.attention_mask_BL, strict=True)
    ]
    for layer, error in training.errors([together]).items():
        assert error == pytest.approx(training.errors(alone)[layer], rel=1e-4)


def test_a_saved_training_goes_on_bit_for_bit(teacher, tmp_path):
    config = AlignConfig(tokens=400, tokens_per_batch=40)
    whole, first, second = (MixerTraining(teacher.model, config, "per_query_head", CPU) for _ in range(3))
    for seed in range(6):
        whole.step(batch_of([9, 12], seed))
    for seed in range(3):
        first.step(batch_of([9, 12], seed))
    first.next_epoch()
    first.save(tmp_path, made_by={"a": "b"})
    with pytest.raises(InputError, match="made with another a"):
        second.load(tmp_path, {"a": "c"})
    assert second.load(tmp_path, {"a": "b"})["made_by"] == {"a": "b"}
    assert second.position == Position(first.position.tokens, 3, 1, 0)
    for seed in range(3, 6):
        second.step(batch_of([9, 12], seed))
    for layer, tensors in whole.library().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.library()[layer][name]), (layer, name)


@pytest.fixture(scope="module")
def setup(tmp_path_factory, ray_cluster):
    """Configuration, teacher and shared cache of the tiny teacher."""
    from mamtra_ray.corpus.table import corpus_identity, read_corpus
    from mamtra_ray.teacher_cache.shared import share_cache

    folder = tmp_path_factory.mktemp("align")
    config = tiny_config(folder)
    config = Config.model_validate(
        config.model_dump() | {"align": {"tokens": 4000, "tokens_per_batch": 150, "learning_rate": 0.01}}
    )
    cache_without_ray(config, folder / "cache")
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    corpus_hash = corpus_identity(read_corpus(config.corpus.path)).corpus_hash
    train, validation = (
        share_cache(folder / "cache", teacher_fingerprint=teacher.fingerprint, corpus_hash=corpus_hash, split=split)
        for split in ("train", "validation")
    )
    shared = {"teacher": share_teacher(teacher), "train": train, "validation": validation}
    return SimpleNamespace(config=config.align, teacher=teacher, data=shared)


def aligned(setup, folder, config=None, **options):
    return align_mixers(
        config or setup.config, "per_query_head", folder, **setup.data, worker=WorkerResources(), **options
    )


def test_library_has_lower_errors_and_is_not_trained_twice(setup, tmp_path):
    seen = []
    manifest = aligned(setup, tmp_path, on_progress=lambda *count: seen.append(count))
    assert seen[-1] == (4000, 4000) and manifest.tokens >= 4000
    for layer in range(4):
        assert manifest.errors[layer] < manifest.errors_start[layer] < manifest.errors_transferred[layer]
    library = load_library(tmp_path, teacher_fingerprint=setup.teacher.fingerprint)
    student = make_student(setup.teacher.model, "MMMM", "aligned", library)
    torch.testing.assert_close(student.body.layers[2].mamba.in_proj.weight, library[2]["in_proj.weight"])

    written = (tmp_path / WEIGHTS).stat().st_mtime_ns
    assert aligned(setup, tmp_path) == manifest
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == written

    for different in ({"config": AlignConfig(tokens=5000)}, {"seed": 1}):
        with pytest.raises(InputError, match="made with another settings"):
            aligned(setup, tmp_path, **different)
    with pytest.raises(InputError, match="made with another teacher"):
        load_library(tmp_path, teacher_fingerprint="f" * 64)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(InputError, match="changed or cut off"):
        load_library(tmp_path, teacher_fingerprint=setup.teacher.fingerprint)
    with pytest.raises(InputError, match="does not exist"):
        load_library(tmp_path / "nowhere", teacher_fingerprint=setup.teacher.fingerprint)


def test_stopped_alignment_goes_on_where_it_was(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(align_module, "_SECONDS_PER_CHECKPOINT", 0.0)
    monkeypatch.setattr(align_module, "_SECONDS_PER_REPORT", 0.0)
    made_by = library_made_by(setup.config, "per_query_head", setup.teacher.fingerprint, setup.data["train"], 0)

    def job(folder):
        folder.mkdir(exist_ok=True)
        return AlignJob(setup.config, "per_query_head", 0, str(folder), made_by, **setup.data)

    def trained(steps):
        return [step.tokens for step in steps if not step.doing]

    whole_steps = [*align(job(tmp_path / "whole"), CPU)]
    steps = trained(whole_steps)
    stopped = align(job(tmp_path / "stopped"), CPU)
    reached = []
    while len(reached) < 7:
        reached += trained([next(stopped)])
    stopped.close()
    assert reached == steps[:7] and not (tmp_path / "stopped" / MANIFEST).exists()
    rest = trained(align(job(tmp_path / "stopped"), CPU))
    assert rest == [reached[-1], *steps[7:]], "it says where it goes on, and goes on there"
    # What is no training is named, with the part of the held-out tokens that is measured.
    measured = [step for step in whole_steps if step.doing.startswith("measuring")]
    assert len({step.doing for step in measured}) == 3 and {step.part for step in measured} > {0.0}
    assert all(0 <= step.part <= 1 for step in measured)
    assert [step.doing for step in whole_steps if step.doing][-1] == "saving the mixers"
    whole, resumed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    errors = [read_library_manifest(tmp_path / name).errors_start for name in ("whole", "stopped")]
    assert errors[0] == errors[1]
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {WEIGHTS, MANIFEST}, "a state was left behind"


@pytest.mark.slow
def test_two_ray_train_workers_learn_as_much_as_one(setup, tmp_path):
    one = aligned(setup, tmp_path / "one")
    for name, changes in {"two": {}, "sharded": {"fully_shard": True}}.items():
        both = aligned(setup, tmp_path / name, setup.config.model_copy(update={"workers": 2, **changes}))
        assert both.workers == 2
        for layer in range(4):
            assert both.errors[layer] == pytest.approx(one.errors[layer], rel=0.2)
        assert not list((tmp_path / name).glob("shards-*")), "a state was left behind"


def test_two_searches_do_not_train_one_library_at_once(tmp_path):
    folder, said, held = tmp_path / "mixers", [], threading.Event()

    def wait_for_it():
        with one_writer(folder, lambda line: said.append(line) or held.set()):
            said.append("second")

    with one_writer(folder, said.append):
        other = threading.Thread(target=wait_for_it)
        other.start()
        assert held.wait(60)
        said.append("first is ready")
    other.join(60)
    assert said == ["    another process trains these mixers: waiting for it", "first is ready", "second"]
    (folder / MANIFEST).touch()
    with one_writer(folder, said.append), one_writer(folder, said.append):  # a finished one is only read
        assert len(said) == 3
