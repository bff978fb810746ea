"""Decoding with a cache of static shapes: tokens and logits of the growing one, and a step that a graph can replay."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from recorded_graph import RecordedGraph, recorded
from tiny_models import SEQUENCE, VOCABULARY, transformers_model, write_folder

from mamtra_ray.errors import InputError
from mamtra_ray.models import static_cache
from mamtra_ray.models.rope import Rope
from mamtra_ray.speech_lm import decoding_steps
from mamtra_ray.speech_lm.decoding_steps import GrowingSteps, StaticSteps
from mamtra_ray.speech_lm.generate import COSYVOICE2, GREEDY, generate, prefill
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

PROMPTS = [
    SEQUENCE.prompt([5, 6, 7, 8, 9]),
    SEQUENCE.prompt([1], [2, 3], [10, 11, 12]),
    SEQUENCE.prompt([4, 4]),
    SEQUENCE.prompt([3, 1, 2]),
]
BOUNDS = [(3, 25), (0, 12), (6, 40), (0, 33)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model())).model


@pytest.fixture(params=[("AAAA", "per_query_head"), ("AMMA", "per_query_head"), ("MMMM", "per_kv_head")], ids=str)
def student(request, teacher):
    layout, sharing = request.param
    student = make_student(teacher, layout, state_sharing=sharing)
    with torch.no_grad():
        # Stop ids that win now and then, so that rows end at different times.
        student.head.weight[list(VOCABULARY.stop_ids)] *= 2.5
        student.head.weight *= 4
    return student.eval()


@pytest.fixture
def few_columns(monkeypatch):
    """Buffers that are full after a few steps."""
    monkeypatch.setattr(static_cache, "COLUMNS", 8)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[2:3], [PROMPTS[0]] * 3], ids=["padded", "alone", "equal lengths"])
@pytest.mark.parametrize("sampling", [GREEDY, COSYVOICE2], ids=["greedy", "sampled"])
def test_tokens_are_those_of_the_growing_cache(student, few_columns, prompts, sampling):
    bounds = BOUNDS[: len(prompts)]
    expected = generate(student, prompts, bounds, sampling, static=False)
    assert generate(student, prompts, bounds, sampling, static=True) == expected
    if len(prompts) == len(PROMPTS):
        lengths = [len(result.tokens) for result in expected]
        assert len(set(lengths)) > 2, "rows should end at different times for this test to say anything"


@torch.inference_mode()
def test_logits_are_those_of_the_growing_cache(student, few_columns):
    """In float64, over several enlargements, with rows that leave one by one and a batch that becomes smaller."""
    student = copy.deepcopy(student).double()
    steps = [kind(student, prefill(student, PROMPTS)) for kind in (GrowingSteps, StaticSteps)]
    generator = torch.Generator().manual_seed(0)
    rows, static_rows = 4, []
    for step in range(60):
        growing, static = (one.logits() for one in steps)
        torch.testing.assert_close(static, growing, atol=1e-12, rtol=1e-12)
        assert steps[1].cache.num_bytes >= steps[0].start.cache.num_bytes
        if step in (10, 20, 40):
            kept = torch.randperm(rows, generator=generator)[: rows - 1].sort().values
            rows -= 1
            for one in steps:
                one.keep(kept)
        ids_B = torch.randint(VOCABULARY.speech_size, (rows,), generator=generator) + VOCABULARY.speech_offset
        for one in steps:
            one.step(ids_B)
        static_rows.append(len(steps[1]._ids_R1))
    # 4 rows until 2 of them are left.
    assert static_rows == [4] * 20 + [2] * 20 + [1] * 20
    assert steps[1].cache.capacity % 8 == 0 and steps[1].cache.capacity >= steps[1].cache.length


@torch.inference_mode()
def test_a_step_changes_no_address_until_the_buffers_are_full(student, few_columns):
    steps = StaticSteps(student, prefill(student, PROMPTS))
    cache = steps.cache

    def addresses():
        states = [(state.conv_BCK, state.ssm_BHPN) for state in cache._states.values()]
        tensors = [t for pair in [*cache._buffers.values(), *states] for t in pair]
        return [t.data_ptr() for t in [*tensors, cache._column_1, cache._position_B, cache._real_BT, steps._ids_R1]]

    changes = 0
    for _ in range(20):
        before, was_full = addresses(), cache.length == cache.capacity
        steps.step(torch.full((4,), VOCABULARY.speech_offset))
        if was_full:
            changes += 1
        else:
            assert addresses() == before
    assert changes >= 2


@pytest.fixture
def recording(monkeypatch):
    """The way of a GPU, with a recorded graph in place of CUDA's."""

    class Captured(StaticSteps):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._captures = True

    monkeypatch.setattr(decoding_steps, "StaticSteps", Captured)
    monkeypatch.setattr(decoding_steps, "_side_stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    RecordedGraph.made = RecordedGraph.replays = 0


def test_a_replayed_graph_decodes_the_same(student, few_columns, recording):
    """One ordinary step, one capture, then replays."""
    expected = generate(student, PROMPTS, BOUNDS, COSYVOICE2, static=False)
    assert generate(student, PROMPTS, BOUNDS, COSYVOICE2, static=True) == expected
    # Anew for longer buffers and fewer rows only.
    longest = max(len(result.tokens) for result in expected)
    assert 2 <= RecordedGraph.made < longest / 3 and RecordedGraph.replays > longest / 2


def test_a_step_that_cannot_be_captured_runs_without_a_graph(student, few_columns, recording, monkeypatch):
    expected = generate(student, PROMPTS, BOUNDS, COSYVOICE2, static=False)

    @contextlib.contextmanager
    def refused(graph, **settings):
        with recorded(graph):
            yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    with pytest.warns(UserWarning, match="no CUDA graph: operation not permitted") as warned:
        assert generate(student, PROMPTS, BOUNDS, COSYVOICE2, static=True) == expected
    assert len(warned) == 1 and RecordedGraph.made == 1 and RecordedGraph.replays == 0


def test_the_recorder_refuses_what_a_graph_cannot_capture():
    x = torch.arange(3.0)
    for forbidden in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor([1.0]) + x):
        with pytest.raises(AssertionError, match="cannot capture"), recorded(RecordedGraph()):
            forbidden()
    graph = RecordedGraph()
    with recorded(graph):
        y = x.add_(1) * 2
    assert x.tolist() == [0, 1, 2]
    graph.replay()
    assert x.tolist() == [1, 2, 3] and y.tolist() == [2, 4, 6]


def test_angles_that_depend_on_the_length(student):
    """Up to the length from which on positions turn anew; beyond it the growing cache does it, or it is refused."""
    student = copy.deepcopy(student)
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    longest = max(len(prompt) for prompt in PROMPTS) + max(most for _, most in BOUNDS)
    student.body.rope = Rope(parameters, 8, longest)
    expected = generate(student, PROMPTS, BOUNDS, static=False)
    assert generate(student, PROMPTS, BOUNDS, static=True) == expected
    student.body.rope = dataclasses.replace(student.body.rope, max_position_embeddings=longest - 1)
    with pytest.raises(InputError, match="no static cache"):
        generate(student, PROMPTS, BOUNDS, static=True)
    generate(student, PROMPTS, BOUNDS)


@torch.inference_mode()
def test_a_static_cache_takes_single_positions_only(student):
    start = prefill(student, PROMPTS[:1])
    steps = StaticSteps(student, start)
    assert start.cache is steps.cache
    ids_12 = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="one position at a time"):
        student(ids_12, past_key_values=steps.cache)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu_decode_what_eager_steps_do(student, few_columns, dtype):
    """Logits by logits, fed the same tokens; then, in float32, whole utterances."""
    student = copy.deepcopy(student).to("cuda", dtype)
    with torch.inference_mode():
        steps = [kind(student, prefill(student, PROMPTS)) for kind in (GrowingSteps, StaticSteps)]
        tolerance = 1e-4 if dtype == torch.float32 else 0.15
        for step in range(40):
            growing, static = (one.logits().float() for one in steps)
            torch.testing.assert_close(static, growing, atol=tolerance * float(growing.std()), rtol=0)
            kept = torch.arange(2 if step == 20 else len(growing), device="cuda")
            ids_B = growing[kept].argmax(-1) + VOCABULARY.speech_offset
            for one in steps:
                if step == 20:
                    one.keep(kept)
                one.step(ids_B)
    if dtype == torch.float32:
        expected = generate(student, PROMPTS, BOUNDS, COSYVOICE2, static=False)
        assert generate(student, PROMPTS, BOUNDS, COSYVOICE2) == expected
        assert generate(student.cpu(), PROMPTS, BOUNDS, COSYVOICE2) == expected
