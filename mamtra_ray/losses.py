"""Distillation losses: the paper's Eq. 5, L = CE + skew KL + embedding MSE, and each of its terms.

The reference functions (:func:`cross_entropy`, :func:`skewed_forward_kl`, :func:`skewed_forward_kl_top_k`,
:func:`hidden_mse`) take logits or hidden states and are differentiated by autograd.
:func:`distillation_loss` is what training calls: it starts from final hidden states, applies the frozen head
in chunks of tokens and writes the gradient down by hand, so the (tokens x vocabulary) logits of a batch never
exist at once.

Tensor letters: B batch, L length, N labeled tokens of a batch (B and L flattened), D model width,
V speech vocabulary, K kept classes of a top-k row. All losses are float32 (float64 stays float64), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamtra_ray.errors import InputError

IGNORE = -100
"""Label of a position that no loss counts (PyTorch's and Hugging Face's value)."""

HiddenLayer = int | Literal["final"]
"""Where the embedding loss compares: a decoder layer's output (0-based), or the final, normed hidden state."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of Eq. 5's terms; the paper uses 1, 1, 1 and its Table 4 sets one of them to 0."""

    ce: float = 1.0
    kl: float = 1.0
    hidden: float = 1.0


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's final hidden states at the labeled positions; the frozen head makes its exact logits.

    Attributes:
        hidden_ND: post-norm hidden states, any float dtype.
        layers_ND: outputs of decoder layers by index, only for an embedding loss on these.
    """

    hidden_ND: Tensor
    layers_ND: Mapping[int, Tensor] = field(default_factory=dict)

    def rows(self, rows: slice) -> HiddenTargets:
        """Those of consecutive labeled positions, as views."""
        return HiddenTargets(self.hidden_ND[rows], {layer: x_ND[rows] for layer, x_ND in self.layers_ND.items()})


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's K most probable classes per labeled position and the mass of all others.

    Attributes:
        ids_NK: distinct speech ids, integer.
        log_probs_NK: natural log-probabilities of these ids.
        tail_log_mass_N: natural log of the remaining probability (``-inf`` if there is none).

    Rows need not be normalized exactly (they may have been quantized): the losses normalize them.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_log_mass_N: Tensor

    def rows(self, rows: slice) -> TopKTargets:
        """Those of consecutive labeled positions, as views."""
        return TopKTargets(self.ids_NK[rows], self.log_probs_NK[rows], self.tail_log_mass_N[rows])


@dataclass(frozen=True)
class LossTerms:
    """Scalars of one batch. ``total`` carries the gradient; the unweighted terms are for the log (detached).

    A term whose weight is 0 is not computed and is NaN.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    hidden: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labeled tokens, in nats (the paper's L_CE).

    Args:
        logits: (..., V), any float dtype.
        labels: (...), class ids or :data:`IGNORE`.

    Returns:
        Scalar; 0 if no token is labeled.
    """
    logits = _wide(logits)
    loss_sum = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE, reduction="sum"
    )
    return loss_sum / (labels != IGNORE).sum().clamp_min(1)


def skewed_forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, alpha: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    """Skew KL divergence KL(p || alpha p + (1 - alpha) q), the mean over valid tokens, in nats.

    p is the teacher's and q the student's distribution (DistiLLM, arXiv 2402.03898, Eq. 3; the paper's
    L_logits). Both are kept as logarithms, so classes whose probability underflows add 0 and not NaN; with
    alpha > 0 a token adds at most -log(alpha). Includes the teacher's entropy: the value is a true divergence,
    0 if and only if p = q.

    Args:
        teacher_logits: (..., V).
        student_logits: (..., V).
        alpha: share of the teacher in the mixture, in [0, 1); 0 is the ordinary forward KL.
        mask: (...), true (or non-zero) where a token counts; every token if None.

    Returns:
        Scalar; 0 if no token counts.
    """
    _check_alpha(alpha)
    teacher_logits, student_logits = _counted(teacher_logits, mask), _counted(student_logits, mask)
    kl = _skewed_kl_rows(_log_softmax(teacher_logits), _log_softmax(student_logits), alpha)
    return _masked_mean(kl, mask)


def skewed_forward_kl_top_k(
    targets: TopKTargets, student_logits_NV: Tensor, alpha: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    """:func:`skewed_forward_kl` over K + 1 events: the teacher's top K classes and one bucket for all others.

    A lower bound of the divergence over all classes (merging events cannot raise it), with equality when the
    two agree inside the tail.

    Args:
        targets: teacher rows for N tokens.
        student_logits_NV: (N, V).
        alpha: as in :func:`skewed_forward_kl`.
        mask: (N,), true where a token counts.
    """
    _check_alpha(alpha)
    log_q_NV = _log_softmax(_counted(student_logits_NV, mask))
    kl_N = _skewed_kl_rows(_bucket_log_p(targets), _bucket_log_q(log_q_NV, targets.ids_NK), alpha)
    return _masked_mean(kl_N, mask)


def hidden_mse(teacher_hidden: Tensor, student_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states over valid tokens and features (the paper's L_emb).

    The paper says "a mean-squared error constraint on the token embeddings per input sequence", which leaves
    the level open. Input embeddings cannot be meant (teacher and student share them); we read it as the final
    hidden states, the last embedding of each token. :func:`distillation_loss` offers layer outputs as well.

    Args:
        teacher_hidden: (..., D).
        student_hidden: (..., D).
        mask: (...), true where a token counts; every token if None.
    """
    difference = _counted(_wide(student_hidden) - _wide(teacher_hidden), mask)
    return _masked_mean(difference.square().mean(-1), mask)


def distillation_loss(
    student_hidden_ND: Tensor,
    head: nn.Linear,
    labels_N: Tensor,
    teacher_targets: HiddenTargets | TopKTargets,
    weights: LossWeights | None = None,
    alpha: float = 0.1,
    chunk_tokens: int = 256,
    num_tokens: Tensor | float | None = None,
    hidden_layers: Sequence[HiddenLayer] = ("final",),
    student_layers_ND: Mapping[int, Tensor] | None = None,
) -> LossTerms:
    """Eq. 5 on the labeled positions of a batch, from final hidden states through the frozen head.

    Args:
        student_hidden_ND: the student's post-norm hidden states at the N positions.
        head: the head shared by teacher and student; must be frozen with :class:`HiddenTargets`, because the
            teacher's logits are recomputed with it.
        labels_N: speech ids; :data:`IGNORE` rows (padding) count in no term.
        teacher_targets: what the teacher said about the same N positions.
        weights: 1, 1, 1 if None.
        alpha: skew of the KL, see :func:`skewed_forward_kl`.
        chunk_tokens: tokens whose logits exist at a time; more is faster up to the cache size, and bigger.
        num_tokens: what sums over tokens are divided by; the labeled tokens of this batch if None. With
            gradient accumulation or several workers, pass the whole step's count (times what the averaging
            over workers divides by), so that every token weighs the same.
        hidden_layers: where the embedding loss compares, the mean over these.
        student_layers_ND: outputs of decoder layers at the N positions, for layer indices.

    Raises:
        InputError: an embedding loss is asked for that the targets do not carry, or a trainable head is
            combined with hidden-state targets.
    """
    weights = LossWeights() if weights is None else weights
    _check_alpha(alpha)
    if isinstance(teacher_targets, HiddenTargets) and head.weight.requires_grad and weights.kl:
        raise InputError("hidden-state targets need a frozen head: the teacher's logits are made with it")
    valid_N = labels_N != IGNORE
    count = valid_N.sum().clamp_min(1) if num_tokens is None else num_tokens
    missing = _wide(student_hidden_ND.new_full((), math.nan))
    total, ce, kl, hidden = torch.zeros_like(missing), missing, missing, missing
    if weights.ce or weights.kl:
        weighted, ce_sum, kl_sum = _HeadLosses.apply(
            student_hidden_ND, head.weight, head.bias, labels_N, teacher_targets, weights, alpha, chunk_tokens
        )
        total = total + weighted / count
        ce = ce_sum / count if weights.ce else missing
        kl = kl_sum / count if weights.kl else missing
    if weights.hidden:
        pairs = _hidden_pairs(teacher_targets, student_hidden_ND, hidden_layers, student_layers_ND)
        errors = [_counted(_wide(student) - _wide(teacher), valid_N).square().mean(-1) for teacher, student in pairs]
        hidden = torch.stack([_masked_mean(error_N, valid_N, count) for error_N in errors]).mean()
        total = total + weights.hidden * hidden
    return LossTerms(total, ce.detach(), kl.detach(), hidden.detach())


class _HeadLosses(torch.autograd.Function):
    """Weighted sum of CE and skew KL over tokens, from hidden states; forward computes the gradient too.

    Per token, with r_j = p_j (1 - alpha) q_j / m_j (m the mixture), the gradients with respect to the logits
    are q - onehot(label) for CE and q sum(r) - r for the KL. Only (chunk_tokens, V) of either exists at a
    time; what is kept for the backward pass is (N, D), as large as the input.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, targets, weights, alpha, chunk_tokens):  # type: ignore[no-untyped-def]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_any = wants_hidden or wants_weight or wants_bias
        ce_sum = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        kl_sum = torch.zeros_like(ce_sum)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if wants_bias else None
        for start in range(0, len(labels_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            labels_n = labels_N[rows]
            ce, kl, grad_nV = _chunk_losses(
                F.linear(hidden_ND[rows], weight_VD, bias_V),
                labels_n,
                _teacher_rows(targets, rows, weight_VD, bias_V) if weights.kl else None,
                weights,
                alpha,
                wants_any,
            )
            ce_sum += ce
            kl_sum += kl
            if grad_nV is None:
                continue
            grad_nV = grad_nV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = grad_nV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_nV.T, _counted(hidden_ND[rows], labels_n != IGNORE).to(grad_nV.dtype))
            if grad_bias_V is not None:
                grad_bias_V += grad_nV.sum(0)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        weighted = weights.ce * ce_sum + weights.kl * kl_sum
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return weighted, ce_sum, kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weighted, _grad_ce, _grad_kl):  # type: ignore[no-untyped-def]
        gradients = [None if gradient is None else gradient * grad_weighted for gradient in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None)


def _chunk_losses(
    student_logits_NV: Tensor,
    labels_N: Tensor,
    teacher: tuple[Tensor, Tensor | None] | None,
    weights: LossWeights,
    alpha: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of CE and KL over one chunk's tokens and the gradient of their weighted sum w.r.t. the logits.

    ``teacher`` is (log p over all classes, None) or (log p over K + 1 buckets, the K ids).
    """
    log_q_NV = _log_softmax(student_logits_NV)
    valid_N = labels_N != IGNORE
    label_N1 = labels_N.clamp_min(0)[:, None]
    ce_sum = -log_q_NV.gather(1, label_N1)[:, 0].where(valid_N, 0).sum()
    kl_sum = torch.zeros_like(ce_sum)
    q_scale_N = torch.full_like(log_q_NV[:, 0], weights.ce)
    minus_NV: Tensor | None = None
    if teacher is not None:
        log_p, ids_NK = teacher
        log_q = log_q_NV if ids_NK is None else _bucket_log_q(log_q_NV, ids_NK)
        log_m = _log_mixture(log_p, log_q, alpha)
        p = log_p.exp()
        kl_sum = (p * (log_p - log_m)).sum(-1).where(valid_N, 0).sum()
        if wants_gradient:
            # c = log(p (1 - alpha) / m) of every event, r = q exp(c); at most log((1 - alpha) / alpha).
            log_c = log_p + math.log1p(-alpha) - log_m
            r = (log_c + log_q).exp()
            q_scale_N = q_scale_N + weights.kl * r.sum(-1)
            minus_NV = r if ids_NK is None else (log_q_NV + log_c[:, -1:]).exp().scatter(1, ids_NK, r[:, :-1])
    if not wants_gradient:
        return ce_sum, kl_sum, None
    grad_NV = log_q_NV.exp_().mul_(q_scale_N[:, None])
    grad_NV.scatter_add_(1, label_N1, torch.full_like(grad_NV[:, :1], -weights.ce))
    if minus_NV is not None:
        grad_NV.sub_(minus_NV, alpha=weights.kl)
    return ce_sum, kl_sum, grad_NV.masked_fill_(~valid_N[:, None], 0)


def _teacher_rows(
    targets: HiddenTargets | TopKTargets, rows: slice, weight_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if isinstance(targets, HiddenTargets):
        hidden_ND = targets.hidden_ND[rows].to(weight_VD.dtype)
        return _log_softmax(F.linear(hidden_ND, weight_VD, bias_V)), None
    chunk = targets.rows(rows)
    return _bucket_log_p(chunk), chunk.ids_NK.long()


def _hidden_pairs(
    targets: HiddenTargets | TopKTargets,
    student_hidden_ND: Tensor,
    hidden_layers: Sequence[HiddenLayer],
    student_layers_ND: Mapping[int, Tensor] | None,
) -> list[tuple[Tensor, Tensor]]:
    if not isinstance(targets, HiddenTargets):
        raise InputError(
            "top-k teacher rows hold no hidden states for the embedding loss: set its weight to 0 or cache hidden"
        )
    pairs = []
    for layer in hidden_layers:
        if layer == "final":
            pairs.append((targets.hidden_ND, student_hidden_ND))
        elif student_layers_ND is not None and layer in student_layers_ND and layer in targets.layers_ND:
            pairs.append((targets.layers_ND[layer], student_layers_ND[layer]))
        else:
            raise InputError(f"the embedding loss on layer {layer} needs that layer's output of teacher and student")
    return pairs


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _log_softmax(logits: Tensor) -> Tensor:
    # Clamped because logits more than 3.4e38 apart give -inf, and 0 * -inf would be NaN.
    log_p = _wide(logits).log_softmax(-1)
    return log_p.clamp_min(torch.finfo(log_p.dtype).min / 4)


def _log_mixture(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return log_q
    return torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))


def _skewed_kl_rows(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_q, alpha))).sum(-1)


def _bucket_log_p(targets: TopKTargets) -> Tensor:
    """(N, K + 1): the teacher's log-probabilities with the tail as the last event, normalized."""
    log_p = torch.cat([_wide(targets.log_probs_NK), _wide(targets.tail_log_mass_N)[:, None]], 1)
    return _log_softmax(log_p)


def _bucket_log_q(log_q_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """(N, K + 1): the student's log-probabilities of the ids and of all other classes together."""
    ids_NK = ids_NK.long()
    tail_N1 = log_q_NV.scatter(1, ids_NK, -math.inf).logsumexp(1, keepdim=True)
    floor = torch.finfo(log_q_NV.dtype).min / 4
    return torch.cat([log_q_NV.gather(1, ids_NK), tail_N1.clamp_min(floor)], 1)


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """0 in rows that do not count: nothing of them, not even a NaN, reaches a sum or a gradient."""
    return values if mask is None else values.where(mask.bool()[..., None], 0)


def _masked_mean(values: Tensor, mask: Tensor | None, count: Tensor | float | None = None) -> Tensor:
    if mask is None:
        return values.mean() if count is None else values.sum() / count
    mask = mask.bool()
    return values.where(mask, 0).sum() / (mask.sum().clamp_min(1) if count is None else count)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise InputError(f"the skew alpha must be in [0, 1), not {alpha}")
