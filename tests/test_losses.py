"""Losses against float64 formulas written out in probabilities, and against autograd through them."""

import math

import pytest
import torch
from torch import nn

from mamtra_ray.errors import InputError
from mamtra_ray.losses import (
    IGNORE,
    HiddenTargets,
    LossWeights,
    TopKTargets,
    cross_entropy,
    distillation_loss,
    hidden_mse,
    skewed_forward_kl,
    skewed_forward_kl_top_k,
)

N, D, V, K = 23, 8, 41, 6


def plain_kl(teacher_logits, student_logits, alpha):
    """KL(p || a p + (1 - a) q) per row, in float64 probabilities."""
    p = teacher_logits.double().softmax(-1)
    mixture = alpha * p + (1 - alpha) * student_logits.double().softmax(-1)
    return torch.special.xlogy(p, p / mixture).sum(-1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def problem(generator):
    head = nn.Linear(D, V)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    head.requires_grad_(False)
    teacher = torch.randn(N, D, generator=generator)
    student = teacher + 0.5 * torch.randn(N, D, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[[3, 7, 22]] = IGNORE
    return head, teacher, student, labels


def top_k_targets(head, teacher):
    log_p = head(teacher).log_softmax(-1)
    top = log_p.topk(K, -1)
    tail = torch.log1p(-top.values.exp().sum(-1))
    return TopKTargets(top.indices.int(), top.values, tail)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_skewed_kl_value_and_gradient(generator, alpha):
    teacher = 3 * torch.randn(2, 5, V, generator=generator)
    student = (3 * torch.randn(2, 5, V, generator=generator)).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    value = skewed_forward_kl(teacher, student, alpha, mask)
    value.backward()
    reference_student = student.detach().double().requires_grad_()
    expected = (plain_kl(teacher, reference_student, alpha) * mask).sum() / 8
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), reference_student.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_skewed_kl_is_finite_where_probabilities_underflow(dtype):
    teacher = torch.tensor([[120.0, 0, -120], [0, 0, 0], [-120, 120, 0]], dtype=dtype)
    student = torch.tensor([[-120.0, 0, 120], [120, 0, -120], [-120, 120, 0]], dtype=dtype, requires_grad=True)
    value = skewed_forward_kl(teacher, student, 0.1)
    value.backward()
    expected = plain_kl(teacher, student.detach(), 0.1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad.isfinite().all()
    # With alpha > 0 the divergence is bounded, even for the largest finite logits.
    edge = torch.finfo(dtype).max
    extreme = skewed_forward_kl(
        torch.tensor([[edge, -edge]], dtype=dtype), torch.tensor([[-edge, edge]], dtype=dtype), 0.1
    )
    assert extreme.item() == pytest.approx(-math.log(0.1), rel=1e-5)


def test_skewed_kl_is_zero_only_for_equal_distributions(generator):
    logits = 10 * torch.randn(4, V, generator=generator)
    assert abs(skewed_forward_kl(logits, logits + 5.0).item()) < 1e-6
    assert skewed_forward_kl(logits, logits.flip(-1)).item() > 0.1
    assert skewed_forward_kl(logits, logits.flip(-1), mask=torch.zeros(4)).item() == 0.0


def test_plain_forward_kl_is_torchs(generator):
    teacher, student = torch.randn(2, 7, V, generator=generator).unbind()
    expected = nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert skewed_forward_kl(teacher, student, 0.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_skew_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        skewed_forward_kl(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_top_k_rows_are_the_divergence_of_merged_events(problem, alpha):
    head, teacher, student, _ = problem
    targets = top_k_targets(head, teacher)
    p, q = head(teacher).double().softmax(-1), head(student).double().softmax(-1)
    expected = []
    for row in range(N):
        kept = targets.ids_NK[row].long()
        merged_p = torch.cat([p[row, kept], 1 - p[row, kept].sum()[None]])
        merged_q = torch.cat([q[row, kept], 1 - q[row, kept].sum()[None]])
        expected.append((merged_p * (merged_p / (alpha * merged_p + (1 - alpha) * merged_q)).log()).sum())
    value = skewed_forward_kl_top_k(targets, head(student), alpha)
    assert value.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert value < skewed_forward_kl(head(teacher), head(student), alpha)


def test_top_k_rows_normalise_quantised_rows_and_bear_an_empty_tail(problem):
    head, teacher, student, _ = problem
    exact = top_k_targets(head, teacher)
    shifted = TopKTargets(exact.ids_NK, exact.log_probs_NK + 0.3, exact.tail_log_mass_N + 0.3)
    torch.testing.assert_close(
        skewed_forward_kl_top_k(shifted, head(student)), skewed_forward_kl_top_k(exact, head(student))
    )
    empty = TopKTargets(exact.ids_NK, exact.log_probs_NK, torch.full((N,), -math.inf))
    logits = head(student).requires_grad_()
    skewed_forward_kl_top_k(empty, logits).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0, 1, 1), LossWeights(1, 0, 1), LossWeights(1, 1, 0)])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_distillation_loss_equals_its_terms(problem, weights, alpha, kind):
    head, teacher, student, labels = problem
    if kind == "top_k":
        if weights.hidden:
            weights = LossWeights(weights.ce, weights.kl, 0.0)
        targets = top_k_targets(head, teacher)
    else:
        targets = HiddenTargets(teacher)
    student = student.requires_grad_()
    terms = distillation_loss(student, head, labels, targets, weights, alpha, chunk_tokens=7)
    terms.total.backward()

    wide_student = student.detach().double().requires_grad_()
    wide_head = nn.Linear(D, V, dtype=torch.float64)
    wide_head.load_state_dict(head.state_dict())
    wide_head.requires_grad_(False)
    mask = labels != IGNORE
    logits = wide_head(wide_student)
    if kind == "top_k":
        wide = TopKTargets(targets.ids_NK, targets.log_probs_NK.double(), targets.tail_log_mass_N.double())
        kl = skewed_forward_kl_top_k(wide, logits, alpha, mask)
    else:
        kl = plain_kl(wide_head(teacher.double()), logits, alpha)[mask].mean()
    ce = nn.functional.cross_entropy(logits[mask], labels[mask])
    hidden = (wide_student - teacher.double())[mask].square().mean()
    expected = weights.ce * ce + weights.kl * kl + weights.hidden * hidden
    expected.backward()
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for value, reference, weight in [(terms.ce, ce, weights.ce), (terms.kl, kl, weights.kl)]:
        assert value.isnan() if weight == 0 else value.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), wide_student.grad, atol=1e-7, rtol=1e-4)


def test_gradient_by_finite_differences_and_of_a_trainable_head(problem):
    head, teacher, student, labels = problem
    head = head.double().requires_grad_()
    targets = top_k_targets(head, teacher.double())
    targets = TopKTargets(targets.ids_NK, targets.log_probs_NK.detach(), targets.tail_log_mass_N.detach())

    def total(hidden, weight, bias):
        layer = nn.Linear(D, V, dtype=torch.float64)
        layer.weight, layer.bias = weight, bias
        return distillation_loss(hidden, layer, labels, targets, LossWeights(1, 1, 0), chunk_tokens=10).total

    assert torch.autograd.gradcheck(total, (student.double().requires_grad_(), head.weight, head.bias), atol=1e-6)
    with pytest.raises(InputError, match="frozen head"):
        distillation_loss(student, head, labels, HiddenTargets(teacher))


def test_chunks_and_gradient_accumulation_do_not_change_the_loss(problem):
    head, teacher, student, labels = problem
    whole = distillation_loss(student.requires_grad_(), head, labels, HiddenTargets(teacher), chunk_tokens=1000)
    (expected,) = torch.autograd.grad(whole.total, student)
    for start, stop in ((0, 9), (9, N)):
        part = slice(start, stop)
        terms = distillation_loss(
            student[part], head, labels[part], HiddenTargets(teacher[part]), chunk_tokens=4, num_tokens=20
        )
        terms.total.backward()
    torch.testing.assert_close(student.grad, expected)


def test_never_more_than_a_chunk_of_logits(problem):
    """No tensor of a forward and backward pass has more than chunk_tokens rows of V columns."""
    head, teacher, student, labels = problem
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal biggest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] >= V:
                biggest = max(biggest, result.shape[0] if result.data_ptr() != head.weight.data_ptr() else 0)
            return result

    with Watch():
        distillation_loss(
            student.requires_grad_(), head, labels, HiddenTargets(teacher), chunk_tokens=5
        ).total.backward()
    assert biggest == 5


def test_batch_without_labels_and_half_precision(problem):
    head, teacher, student, labels = problem
    nothing = distillation_loss(student.requires_grad_(), head, torch.full_like(labels, IGNORE), HiddenTargets(teacher))
    nothing.total.backward()
    assert nothing.total.item() == 0.0 and student.grad.abs().max() == 0
    full = distillation_loss(student, head, labels, HiddenTargets(teacher))
    half = distillation_loss(
        student.detach().bfloat16().requires_grad_(), head.bfloat16(), labels, HiddenTargets(teacher.half())
    )
    half.total.backward()
    assert half.total.dtype == torch.float32
    assert half.total.item() == pytest.approx(full.total.item(), rel=0.03)


def test_autocast_and_a_scaled_loss(problem):
    head, teacher, student, labels = problem
    full = distillation_loss(student.requires_grad_(), head, labels, HiddenTargets(teacher))
    (expected,) = torch.autograd.grad(full.total, student)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distillation_loss(student, head, labels, HiddenTargets(teacher))
    (found,) = torch.autograd.grad(4 * mixed.total, student)
    assert mixed.total.dtype == torch.float32 and found.dtype == torch.float32
    assert mixed.total.item() == pytest.approx(full.total.item(), rel=0.02)
    torch.testing.assert_close(found, 4 * expected, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("form", ["hidden", "top-k"])
def test_what_is_ignored_cannot_spoil_a_gradient(problem, form):
    """An activation that overflowed at a position of padding."""
    head, teacher, student, labels = problem
    targets = HiddenTargets(teacher) if form == "hidden" else top_k_targets(head, teacher)
    weights = LossWeights(1, 1, 1 if form == "hidden" else 0)

    def gradient(values):
        values = values.clone().requires_grad_()
        distillation_loss(values, head, labels, targets, weights).total.backward()
        return values.grad

    spoiled = student.detach().clone()
    spoiled[labels == IGNORE] = torch.nan
    found, expected = gradient(spoiled), gradient(student.detach())
    assert torch.equal(found[labels != IGNORE], expected[labels != IGNORE])
    assert not found[labels == IGNORE].any()
    mask = labels != IGNORE
    for loss in (
        lambda x: skewed_forward_kl(head(teacher), head(x), 0.1, mask),
        lambda x: hidden_mse(teacher, x, mask),
    ):
        values = spoiled.clone().requires_grad_()
        loss(values).backward()
        assert values.grad.isfinite().all()


def test_no_gradient_is_made_for_evaluation(problem):
    head, teacher, student, labels = problem
    with torch.no_grad():
        value = distillation_loss(student.requires_grad_(), head, labels, HiddenTargets(teacher))
    assert not value.total.requires_grad
    torch.testing.assert_close(value.total, distillation_loss(student, head, labels, HiddenTargets(teacher)).total)


def test_embedding_loss_levels(problem):
    head, teacher, student, labels = problem
    layers = {2: (teacher + 1, student), 5: (teacher, student - 1)}
    targets = HiddenTargets(teacher, {layer: pair[0] for layer, pair in layers.items()})
    students = {layer: pair[1] for layer, pair in layers.items()}
    mask = labels != IGNORE
    terms = distillation_loss(
        student, head, labels, targets, LossWeights(0, 0, 1), hidden_layers=("final", 2, 5), student_layers_ND=students
    )
    expected = [hidden_mse(teacher, student, mask)] + [hidden_mse(*layers[layer], mask) for layer in (2, 5)]
    torch.testing.assert_close(terms.hidden, torch.stack(expected).mean())
    torch.testing.assert_close(expected[0], (teacher - student)[mask].square().mean())
    with pytest.raises(InputError, match="layer 3"):
        distillation_loss(student, head, labels, targets, hidden_layers=(3,))
    with pytest.raises(InputError, match="top-k"):
        distillation_loss(student, head, labels, top_k_targets(head, teacher))


def test_cross_entropy_is_the_mean_over_labeled_tokens(problem):
    head, _, student, labels = problem
    expected = nn.functional.cross_entropy(head(student), labels, ignore_index=IGNORE)
    torch.testing.assert_close(cross_entropy(head(student), labels), expected)
    assert cross_entropy(head(student), torch.full_like(labels, IGNORE)).item() == 0.0
