"""Free-running generation against a loop without cache or batch, and samplers against plain Python."""

import copy
import math

import pytest
import torch
from tiny_models import SEQUENCE, VOCABULARY, transformers_model, write_folder
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.generate import COSYVOICE2, GREEDY, Sampling, generate
from mamtra_ray.speech_lm.sampling import next_tokens, uniform_numbers
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

PROMPTS = [SEQUENCE.prompt([5, 6, 7, 8, 9]), SEQUENCE.prompt([1], [2, 3], [10, 11, 12]), SEQUENCE.prompt([4, 4])]
BOUNDS = [(3, 25), (0, 12), (6, 30)]


@pytest.fixture(scope="module", params=["AAAA", "AMMA", "MMMM"])
def student(request, tmp_path_factory):
    teacher = load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model())).model
    student = make_student(teacher, request.param)
    with torch.no_grad():
        # Stop ids that win now and then, so that rows end at different times.
        student.head.weight[list(VOCABULARY.stop_ids)] *= 2.5
        student.head.weight *= 4
    return student.eval()


def inverse_draw(weights, uniform):
    """The token at which the cumulative weight passes the uniform share of the total; plain Python."""
    target = uniform * math.fsum(weights)
    for token, weight in enumerate(weights):
        target -= weight
        if weight > 0 and target < 0:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


def plain_nucleus(probabilities, top_p, top_k, uniform):
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p or len(kept) >= top_k:
            break
        kept.append(token)
        mass += probabilities[token]
    return kept[inverse_draw([probabilities[token] for token in kept], uniform)]


def plain_repetition_aware(logits, recent, uniforms, top_p=0.8, top_k=25, window=10, threshold=0.1):
    """CosyVoice's algorithm for one row, token by token."""
    token = plain_nucleus(logits.double().softmax(-1).tolist(), top_p, top_k, uniforms[0])
    if recent[-window:].count(token) >= window * threshold:
        barred = logits.double().clone()
        barred[token] = -math.inf
        token = inverse_draw(barred.softmax(-1).tolist(), uniforms[1])
    return token


def plain_generate(model, prompt, bounds, choose):
    """One row, no cache: the whole sequence again for every token."""
    ids, tokens = prompt.tolist(), []
    while len(tokens) < bounds[1]:
        logits = model(torch.tensor([ids]))[0, -1].clone()
        if len(tokens) < bounds[0]:
            logits[list(VOCABULARY.stop_ids)] = -math.inf
        token = choose(logits, tokens)
        if token in VOCABULARY.stop_ids:
            return tokens, True
        tokens.append(token)
        ids.append(token + VOCABULARY.speech_offset)
    return tokens, False


@torch.no_grad()
def test_greedy_equals_the_plain_loop(student):
    results = generate(student, PROMPTS, BOUNDS)
    for prompt, bounds, result in zip(PROMPTS, BOUNDS, results, strict=True):
        expected = plain_generate(student, prompt, bounds, lambda logits, _: int(logits.argmax()))
        assert (list(result.tokens), result.stopped) == expected
        assert bounds[0] <= len(result.tokens) <= bounds[1]
        assert not set(result.tokens) & set(VOCABULARY.stop_ids)


@torch.no_grad()
def test_repetition_aware_sampling_equals_the_plain_loop(student):
    seeds = [11, 12, 13]
    results = generate(student, PROMPTS, BOUNDS, COSYVOICE2, seeds)
    for prompt, bounds, seed, result in zip(PROMPTS, BOUNDS, seeds, results, strict=True):
        uniforms = uniform_numbers(seed, 30).tolist()
        expected = plain_generate(
            student,
            prompt,
            bounds,
            lambda logits, tokens, u=uniforms: plain_repetition_aware(logits, tokens, u[len(tokens)]),
        )
        assert (list(result.tokens), result.stopped) == expected


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(student):
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=20)
    together = generate(student, PROMPTS, BOUNDS, sampling, [4, 5, 6])
    alone = [generate(student, [PROMPTS[i]], [BOUNDS[i]], sampling, [4 + i])[0] for i in range(3)]
    shuffled = generate(student, PROMPTS[::-1], BOUNDS[::-1], sampling, [6, 5, 4])[::-1]
    assert together == alone == shuffled
    assert generate(student, PROMPTS, BOUNDS, sampling, [7, 8, 9]) != together
    ended_at = {len(result.tokens) for result in together}
    assert len(ended_at) > 1, "rows should end at different times for this test to say anything"


@torch.no_grad()
def test_embedding_prompts_and_lengths(student):
    embeds = [student.embed(prompt) for prompt in PROMPTS]
    assert generate(student, embeds, BOUNDS) == generate(student, PROMPTS, BOUNDS)
    exact = generate(student, PROMPTS, [(7, 7), (0, 0), (3, 3)])
    assert [len(result.tokens) for result in exact] == [7, 0, 3]
    assert not any(result.stopped for result in exact)
    assert generate(student, [], []) == []


def test_impossible_requests(student):
    with pytest.raises(InputError, match="3 prompts"):
        generate(student, PROMPTS, BOUNDS[:2])
    with pytest.raises(InputError, match="fewest <= most"):
        generate(student, PROMPTS[:1], [(5, 4)])
    with pytest.raises(InputError, match="must not be empty"):
        generate(student, [PROMPTS[0][:0]], [(0, 4)])
    with pytest.raises(InputError, match="top_p cannot be 0"):
        Sampling(top_p=0)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.6), Sampling(0.9, 12, 0.5)],
    ids=str,
)
def test_samplers_keep_what_transformers_warpers_keep(sampling):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(64, 50, generator=generator)
    logits[:, 7] = -math.inf
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits) if sampling.temperature != 1 else logits
    warped = TopKLogitsWarper(sampling.top_k)(None, warped) if sampling.top_k else warped
    warped = TopPLogitsWarper(sampling.top_p)(None, warped) if sampling.top_p < 1 else warped
    uniforms = torch.rand(64, 2, generator=generator, dtype=torch.float64)
    drawn = next_tokens(logits, sampling, uniforms, torch.empty(64, 0, dtype=torch.int64))
    for row in range(64):
        assert drawn[row] == inverse_draw(warped[row].double().softmax(-1).tolist(), uniforms[row, 0].item())


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(20_000, 4)
    uniforms = uniform_numbers(3, 20_000)
    drawn = next_tokens(logits, Sampling(), uniforms, torch.empty(20_000, 0, dtype=torch.int64))
    frequency = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(frequency, logits[0].softmax(-1), atol=0.012, rtol=0)


def test_repetition_aware_sampling_row_by_row():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(200, 60, generator=generator)
    recent = torch.randint(60, (200, 10), generator=generator)
    recent[:, 3] = logits.argmax(-1)  # so that repetition happens often
    recent[100:150, :7] = -1
    uniforms = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    drawn = next_tokens(logits, COSYVOICE2, uniforms, recent)
    replaced = 0
    for row in range(200):
        window = [token for token in recent[row].tolist() if token >= 0]
        assert drawn[row] == plain_repetition_aware(logits[row], window, uniforms[row].tolist())
        replaced += int(plain_repetition_aware(logits[row], [], uniforms[row].tolist()) != drawn[row])
    assert replaced > 20


def test_extreme_rows():
    only_one = torch.full((2, 5), -math.inf)
    only_one[:, 3] = 1.0
    uniforms = torch.tensor([[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]], dtype=torch.float64)
    recent = torch.full((2, 10), 3)
    for sampling in (GREEDY, COSYVOICE2, Sampling(), Sampling(top_k=2, top_p=0.1)):
        assert next_tokens(only_one, sampling, uniforms, recent).tolist() == [3, 3]
    half = torch.randn(2, 5).bfloat16()
    assert next_tokens(half, Sampling(0.5), uniforms, recent).shape == (2,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(1.0, 5, 0.8), COSYVOICE2], ids=str)
def test_logits_that_are_not_finite_are_named(student, sampling, value):
    """A comparison with NaN is false: unchecked, the model would say token 0 for ever, or ids that do not exist."""
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.body.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(InputError, match=r"logits are not finite .* at speech token 0 of prompt 0"):
        generate(broken, PROMPTS, BOUNDS, sampling)
    late = copy.deepcopy(student)
    first = generate(student, PROMPTS, BOUNDS, sampling)[0].tokens
    with torch.no_grad():
        late.body.embed_tokens.weight[VOCABULARY.speech_offset + first[0]] = value
    with pytest.raises(InputError, match=r"logits are not finite .* at speech token 1"):
        generate(late, PROMPTS[:1], BOUNDS[:1], sampling)
