"""The cache against plain concatenation and transformers' own, past several enlargements."""

import copy
import pickle

import pytest
import torch
from tiny_models import CACHE, VOCABULARY, transformers_model, write_folder
from transformers import DynamicCache

from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model())).model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_buffers_hold_what_concatenation_holds(dtype):
    cache, generator = DecoderCache(), torch.Generator().manual_seed(0)
    expected = torch.zeros(2, 3, 2, 0, 4, dtype=dtype)
    buffers = set()
    for step, length in enumerate([5, 1, 1, 70, 1, 200, 1, 1] + [1] * 90):
        if step == 4:
            kept = torch.tensor([2, 0])
            cache.keep_rows(kept)
            expected = expected[:, kept]
        new = torch.randn(2, expected.shape[1], 2, length, 4, generator=generator).to(dtype)
        expected = torch.cat([expected, new], 3)
        found = cache.append(7, *new.unbind())
        cache.length += length
        assert torch.equal(torch.stack(found), expected)
        assert cache.num_bytes == expected.numel() * expected.element_size()
        buffers.add(found[0].data_ptr())
    # Enlarged now and then, not at every step.
    assert 3 <= len(buffers) <= 8


def test_sizes_lengths_and_rows(teacher):
    student = make_student(teacher, "AMMA")
    cache = student.new_cache()
    assert cache.length == 0 and cache.num_bytes == 0
    with torch.no_grad():
        student(torch.zeros(3, 11, dtype=torch.int64), past_key_values=cache)
    assert cache.length == 11
    # 2 attention layers: K and V of 2 heads of 8; 2 Mamba layers: 4 states of 8 x 8 and 64 channels of 4 inputs.
    per_row = 2 * (2 * 2 * 8 * 11) + 2 * (4 * 8 * 8 + 64 * 4)
    assert cache.num_bytes == 3 * per_row * 4
    cache.keep_rows(torch.tensor([1]))
    assert cache.num_bytes == per_row * 4


def test_layers_without_attention_count_their_positions_too(teacher):
    student = make_student(teacher, "MMMM")
    cache, ids = student.new_cache(), torch.arange(6)[None]
    with torch.no_grad():
        student(ids, past_key_values=cache)
        assert cache.length == 6
        with pytest.raises(ValueError, match="6 past and 1 new"):
            student(ids[:, :1], torch.ones(1, 6), past_key_values=cache)


def test_long_decoding_equals_transformers_cache(teacher):
    """Our cache against DynamicCache in transformers' own model, over enough steps for several enlargements."""
    ids = torch.randint(VOCABULARY.size, (2, 160), generator=torch.Generator().manual_seed(3))
    model, teacher = transformers_model().double(), copy.deepcopy(teacher).double()
    ours = teacher.new_cache()
    theirs = DynamicCache(config=model.config)
    with torch.no_grad():
        for position in range(160):
            step = ids[:, position : position + 1]
            expected = model.model(step, **{CACHE: theirs}).last_hidden_state
            found = teacher.hidden_states(step, past_key_values=ours)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [5, 8, 32, 33])
def test_large_batches_decode_what_a_full_forward_gives(teacher, rows):
    """Decoding steps of many rows take another way through the linear layers, in float32 and without gradients."""
    ids = torch.randint(VOCABULARY.size, (rows, 12), generator=torch.Generator().manual_seed(rows))
    student = make_student(teacher, "AMMA")
    with torch.no_grad():
        expected, cache = student(ids), student.new_cache()
        for position in range(12):
            step = student(ids[:, position : position + 1], past_key_values=cache)
            torch.testing.assert_close(step[:, 0], expected[:, position], atol=1e-5, rtol=1e-5)
        # Strided queries would make attention take its slow form, which reads the cache several times over.
        assert student.body.layers[0].self_attn.q_proj(torch.ones(rows, 1, 32)).is_contiguous()


def test_models_can_be_sent_to_other_processes(teacher):
    student = make_student(teacher, "AMMA")
    received = pickle.loads(pickle.dumps(student))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(received(ids), student(ids))
    assert received.fingerprint() == student.fingerprint()


@pytest.mark.gpu
@pytest.mark.parametrize("letters", ["AAAA", "AMMA", "MMMM"])
def test_the_gpu_computes_what_the_cpu_does(teacher, letters):
    from mamtra_ray.losses import HiddenTargets, distillation_loss
    from mamtra_ray.speech_lm.generate import COSYVOICE2, generate

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
