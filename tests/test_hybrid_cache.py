"""The growing cache against transformers' own, past several enlargements."""

import pickle

import pytest
import torch
from tiny_models import VOCABULARY, transformers_model, write_folder
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mamtra_ray.models.cache import GrowingLayer, cache_bytes, drop_rows, past_length
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.base import make_student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model())).model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_layer_holds_what_dynamic_layer_holds(dtype):
    growing, dynamic = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    rows, buffers = 3, set()
    for step, length in enumerate([5, 1, 1, 70, 1, 200, 1, 1] + [1] * 90):
        if step == 4:
            kept = torch.tensor([2, 0])
            growing.select_rows(kept)
            dynamic.reorder_cache(kept)
            rows = 2
        keys, values = torch.randn(2, rows, 2, length, 4, generator=generator).to(dtype).unbind()
        found, expected = growing.update(keys, values), dynamic.update(keys, values)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert growing.get_seq_length() == dynamic.get_seq_length()
        buffers.add(found[0].data_ptr())
    # Enlarged now and then, not at every step.
    assert 3 <= len(buffers) <= 8


def test_sizes_lengths_and_rows(teacher):
    student = make_student(teacher, "AMMA")
    cache = student.new_cache()
    assert past_length(cache) == 0 and past_length(None) == 0 and cache_bytes(cache) == 0
    with torch.no_grad():
        student(torch.zeros(3, 11, dtype=torch.int64), past_key_values=cache)
    assert past_length(cache) == 11
    # 2 attention layers: K and V of 2 heads of 8; 2 Mamba layers: 4 states of 8 x 8 and 64 channels of 4 inputs.
    per_row = 2 * (2 * 2 * 8 * 11) + 2 * (4 * 8 * 8 + 64 * 4)
    assert cache_bytes(cache) == 3 * per_row * 4
    drop_rows(cache, torch.tensor([1]))
    assert cache_bytes(cache) == per_row * 4
    assert past_length(make_student(teacher, "MMMM").new_cache()) is None


def test_long_decoding_equals_transformers_cache(teacher):
    """Our cache against DynamicCache in transformers' own model, over enough steps for several enlargements."""
    ids = torch.randint(VOCABULARY.size, (2, 160), generator=torch.Generator().manual_seed(3))
    model, dynamic, growing = transformers_model(), None, teacher.new_cache()
    with torch.no_grad():
        for position in range(160):
            step = ids[:, position : position + 1]
            dynamic = dynamic or DynamicCache(config=model.config)
            expected = model.model(step, past_key_values=dynamic).last_hidden_state
            found = teacher.hidden_states(step, past_key_values=growing)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_models_can_be_sent_to_other_processes(teacher):
    student = make_student(teacher, "AMMA")
    copy = pickle.loads(pickle.dumps(student))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(copy(ids), student(ids))
    assert copy.fingerprint() == student.fingerprint()


@pytest.mark.gpu
@pytest.mark.parametrize("letters", ["AAAA", "AMMA", "MMMM"])
def test_the_gpu_computes_what_the_cpu_does(teacher, letters):
    from mamtra_ray.generate import COSYVOICE2, generate
    from mamtra_ray.losses import HiddenTargets, distillation_loss

    student = make_student(teacher, letters)
    ids = torch.randint(VOCABULARY.size, (2, 100), generator=torch.Generator().manual_seed(3))
    labels = torch.randint(VOCABULARY.speech_size, (200,), generator=torch.Generator().manual_seed(4))
    totals = []
    for device in ("cpu", "cuda"):
        student, targets = (
            student.to(device),
            HiddenTargets(teacher.hidden_states(ids).flatten(0, 1).detach().to(device)),
        )
        hidden_ND = student.hidden_states(ids.to(device)).flatten(0, 1)
        terms = distillation_loss(hidden_ND, student.head, labels.to(device), targets)
        student.zero_grad()
        terms.total.backward()
        totals.append((terms.total.item(), [p.grad.cpu() for p in student.parameters() if p.requires_grad]))
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-4)
    for ours, theirs in zip(totals[0][1], totals[1][1], strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-2)
    on_gpu = generate(student, [ids[0], ids[1, :30]], [(5, 20), (0, 20)], COSYVOICE2)
    assert generate(student.cpu(), [ids[0], ids[1, :30]], [(5, 20), (0, 20)], COSYVOICE2) == on_gpu
