"""The check of generation: sound models pass it in every dtype, each way of being broken is caught and named."""

import contextlib
import copy
import re
from importlib import metadata

import pytest
import ray
import torch
import transformers
from tiny_models import SEQUENCE, VOCABULARY, transformers_model, write_folder

from mamtra_ray.errors import InputError
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.rope import Rope
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.speech_lm import generate as generation
from mamtra_ray.speech_lm import generation_check
from mamtra_ray.speech_lm.generation_check import (
    GenerationCheckError,
    NonFiniteLogitsError,
    check_generation,
    compared,
    disturb,
    tolerance,
)
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import generation_check as teacher_check
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.generation_check import check_shared_teacher, check_teacher_and_hybrid
from mamtra_ray.teachers.shared import share_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model()))


@pytest.fixture(params=["AAAA", "AMMA", "MMMM"])
def model(teacher, request):
    student = make_student(teacher.model, request.param).eval()
    disturb(parameter for name, parameter in student.named_parameters() if name not in teacher.model.state_dict())
    return student


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sound_model_passes_with_room_to_spare(model, dtype):
    found = check_generation(model.to(dtype), SEQUENCE, "a model")
    assert found.relative < tolerance(dtype, torch.device("cpu")) / 4


def test_the_check_says_what_is_compared():
    """Against numbers by hand: differences of 0 and 2 around their mean, of logits that spread by 1."""
    expected = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    shifted = compared(expected + 5, expected, "here")
    assert (shifted.relative, shifted.largest, shifted.where) == (0.0, 0.0, "here"), "softmax does not see a shift"
    found = compared(expected + torch.tensor([0.2, -0.2, -0.2, 0.2]), expected, "here")
    assert found.relative == pytest.approx(0.2) and found.largest == pytest.approx(0.2)
    assert compared(expected * torch.nan, expected, "here").relative == torch.inf
    assert compared(expected, 0 * expected, "here").relative == torch.inf
    assert compared(0 * expected, 0 * expected, "here").relative == 0


def with_hidden_states(monkeypatch, change):
    """``SpeechLM.hidden_states`` called with what ``change`` makes of its keyword arguments."""
    sound = SpeechLM.hidden_states
    monkeypatch.setattr(SpeechLM, "hidden_states", lambda self, **arguments: sound(self, **change(self, arguments)))


def refused(model, where):
    with pytest.raises(GenerationCheckError, match=where) as error:
        check_generation(model, SEQUENCE, "the student")
    sentence = str(error.value)
    assert isinstance(error.value, InputError) and "\n" not in sentence
    assert sentence.startswith(f"the student (layout {model.layout}, float32 on cpu) does not generate")
    assert f"torch {metadata.version('torch')}, transformers {transformers.__version__}" in sentence
    assert re.search(r"by up to [\d.e+-]+, [\d.]+% of their spread", sentence)
    return sentence


def test_a_cache_that_forgets_is_caught(model, monkeypatch):
    """Every step begins with an empty cache: what transformers 5.24 did to the Mamba layers."""

    def forget(self, arguments):
        if arguments.get("past_key_values") is not None and arguments["inputs_embeds_BLD"].shape[1] == 1:
            return {**arguments, "past_key_values": self.new_cache(), "attention_mask_BL": None}
        return arguments

    with_hidden_states(monkeypatch, forget)
    refused(model, "decoding from the cache, step 1,")


@pytest.mark.parametrize("layout", ["AAAM", "MMMM"])
def test_a_mamba_state_that_is_not_kept_is_caught(teacher, monkeypatch, layout):
    monkeypatch.setattr(DecoderCache, "set_state", lambda *_: None)
    hybrid = make_student(teacher.model, layout).eval()
    refused(hybrid, "decoding from the cache, step 1,")


def test_padding_that_leaks_is_caught(model, monkeypatch):
    with_hidden_states(monkeypatch, lambda _, arguments: {**arguments, "attention_mask_BL": None})
    refused(model, "a batch padded on the left, step 0,")


@pytest.mark.parametrize("layout", ["AAAA", "AMMM"])
def test_a_position_that_is_off_by_one_is_caught(teacher, monkeypatch, layout):
    sound = Rope.cos_sin

    def shifted(self, position_BL, dtype):
        return sound(self, position_BL + 1 if position_BL.shape[-1] == 1 else position_BL, dtype)

    monkeypatch.setattr(Rope, "cos_sin", shifted)
    refused(make_student(teacher.model, layout).eval(), "decoding from the cache, step 1,")


def test_rows_that_leave_the_batch_wrongly_are_caught(model, monkeypatch):
    sound = DecoderCache.keep_rows
    monkeypatch.setattr(DecoderCache, "keep_rows", lambda cache, rows: sound(cache, 0 * rows))
    refused(model, f"a batch padded on the left, step {generation_check.STEPS // 2 + 1},")


def test_tokens_that_are_not_the_best_are_caught(model, monkeypatch):
    """``generate`` may decode in a way of its own (CUDA graphs, say): what it draws is checked as well."""
    worst = lambda logits, *_: logits.masked_fill(logits.isinf(), torch.inf).argmin(-1)  # noqa: E731
    monkeypatch.setattr(generation, "next_tokens", worst)
    refused(model, r"greedy generation, token \d,")


def test_a_near_tie_is_no_error(teacher):
    """All scores nearly equal: rounding decides which token is drawn, and that is nobody's fault."""
    model = copy.deepcopy(teacher.model)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[:1].expand_as(model.head.weight))
        model.head.weight.add_(1e-3 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    check_generation(model, SEQUENCE, "a model")


def test_logits_that_are_not_finite_have_an_error_of_their_own(model):
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(NonFiniteLogitsError, match=r"^the student \(layout .*\): the model.s logits are not finite"):
        check_generation(model, SEQUENCE, "the student")


@pytest.mark.parametrize("fails", [(), ("an untrained hybrid",), ("an untrained hybrid", "teacher")])
def test_before_a_search_a_hybrid_is_checked_and_the_teacher_where_that_fails(teacher, monkeypatch, fails):
    models, names = [], []

    def note(model, sequence, name):
        models.append(model)
        names.append(name)
        if name.startswith(fails):
            raise GenerationCheckError(name)
        return compared(torch.eye(2), torch.eye(2), name)

    monkeypatch.setattr(teacher_check, "check_generation", note)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    new = make_student(teacher.model, "AMMM", state_sharing="per_kv_head")
    with pytest.raises(GenerationCheckError, match=f"^{fails[-1]}") if fails else contextlib.nullcontext():
        check_teacher_and_hybrid(teacher, "1:3", "per_kv_head")
    assert [str(model.layout) for model in models] == ["AMMM", "AAAA"][: 1 + bool(fails)]
    assert "untrained hybrid" in names[0]
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the teacher must stay as it is"
    convolutions = [name for name in new.state_dict() if "conv1d" in name]
    assert len(convolutions) == 6
    for name in convolutions:
        assert not torch.equal(models[0].state_dict()[name], new.state_dict()[name]), "in a new one no error would show"


def test_the_check_of_a_search_as_a_ray_task(teacher, tmp_path, ray_cluster):
    """How a cluster with GPUs is checked: on a worker, whose errors keep their type."""
    task = ray.remote(check_shared_teacher)
    found = result_of(task.remote(share_teacher(teacher), "1:1", "per_query_head"))
    assert 0 < found.relative < tolerance(torch.float32, torch.device("cpu"))
    model = transformers_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    damaged = load_teacher("huggingface", write_folder(tmp_path, model))
    with pytest.raises(NonFiniteLogitsError, match=r"^teacher .* are not finite"):
        result_of(task.remote(share_teacher(damaged), "1:1", "per_query_head"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sound_model_passes_on_a_gpu(model, dtype):
    found = check_generation(model.to("cuda", dtype), SEQUENCE, "a model")
    assert found.relative < tolerance(dtype, torch.device("cuda"))


def test_examples_are_of_the_vocabulary_and_longer_than_a_chunk():
    prompts = [
        generation_check.random_example(SEQUENCE, text, speech, seed)
        for seed, (text, speech) in enumerate(generation_check._TEXT_AND_PROMPT_SPEECH)
    ]
    assert len(prompts[0]) > 32 and len({len(prompt) for prompt in prompts}) == 3
    assert all(int(prompt.min()) >= 0 and int(prompt.max()) < VOCABULARY.size for prompt in prompts)
