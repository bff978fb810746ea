"""Ways to choose layers that train something, on the same aligned mixers as all others, for ``search_quality.py``.

``gates``: one scalar per layer between the frozen attention and the frozen aligned mixer, all trained together with a
penalty on the budget (FlashMorph, arXiv 2606.30562). ``restore one``: from Mamba everywhere, one layer gets its
attention back and the student is distilled shortly, for each layer; the lowest KL keeps attention (KL-guided, arXiv
2512.20569).
Both are written from their descriptions, not from their code.

Tensor letters: B batch, L length, D model width, N labeled positions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
import torch
from layout_scores import made_batches
from torch import Tensor, nn

from mamtra_ray.distill.job import DistillJob, distill_data
from mamtra_ray.distill.workers import distill
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints
from mamtra_ray.losses import IGNORE, HiddenTargets, skewed_forward_kl
from mamtra_ray.probe.layout_scoring import LayoutScorer
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.teacher_cache.batches import DistillBatch
from mamtra_ray.teacher_cache.shared import SharedCache

PENALTY = 10.0
"""Weight of the squared difference between the mean gate and the budget, beside a KL in nats."""
RATE = 0.1
GATE_STEPS = 50
"""For each budget."""
RESTORE_TOKENS = 4_000
"""For each layer."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a method says about the layers, and what it took."""

    importance: list[float]
    """One value a layer: attention stays where it is highest."""
    tokens: int
    """Training tokens, over all trainings."""
    cpu_seconds: float


def trained_gates(
    scorer: LayoutScorer, batches: Sequence[DistillBatch], num_attention: int, steps: int, seed: int
) -> Selection:
    """Gates of one budget; the batches are gone through as often as the steps need."""
    num_layers = len(scorer.attention_layers)
    torch.manual_seed(seed)
    # All layers begin near the budget; noise, so that no tie is broken by the order of layers.
    budget = num_attention / num_layers
    logits_L = nn.Parameter(torch.logit(torch.tensor(budget)) + 0.01 * torch.randn(num_layers))
    optimizer = torch.optim.Adam([logits_L], lr=RATE)
    for layer in (*scorer.attention_layers, *scorer.mamba_layers):
        layer.requires_grad_(False)
    began, tokens = time.process_time(), 0
    for step in range(steps):
        batch = batches[step % len(batches)]
        gates_L = torch.sigmoid(logits_L)
        labels_N = batch.labels_BL[batch.labels_BL != IGNORE]
        assert isinstance(batch.teacher_targets, HiddenTargets)
        normed_BLD = mixed_hidden(scorer, batch.input_ids_BL, gates_L)
        head = scorer.teacher.head
        teacher_logits = head(batch.teacher_targets.hidden_ND.to(normed_BLD.dtype))
        kl = skewed_forward_kl(teacher_logits, head(normed_BLD[batch.labels_BL != IGNORE]), 0.0)
        optimizer.zero_grad()
        (kl + PENALTY * (gates_L.mean() - budget) ** 2).backward()
        optimizer.step()
        tokens += len(labels_N)
    return Selection(logits_L.tolist(), tokens, time.process_time() - began)


def mixed_hidden(scorer: LayoutScorer, ids_BL: Tensor, gates_L: Tensor) -> Tensor:
    """Hidden states [B, L, D] of a decoder whose layers write gate * attention + (1 - gate) * mixer."""
    hidden_BLD = scorer.teacher.embed(ids_BL)
    inputs = scorer.teacher.body.inputs(hidden_BLD)
    for attention, mamba, gate in zip(scorer.attention_layers, scorer.mamba_layers, gates_L, strict=True):
        normed_BLD = attention.input_layernorm(hidden_BLD)
        by_attention_BLD = attention.self_attn(normed_BLD, inputs)
        by_mixer_BLD = mamba.mamba(normed_BLD, inputs.real_BL)
        hidden_BLD = hidden_BLD + gate * by_attention_BLD + (1 - gate) * by_mixer_BLD
        hidden_BLD = hidden_BLD + attention.mlp(attention.post_attention_layernorm(hidden_BLD))
    return scorer.teacher.body.norm(hidden_BLD)


@ray.remote(max_retries=1)
def _restored(job: DistillJob) -> tuple[float, float]:
    began = time.process_time()
    *_, (report, _) = distill(job, device_of_this_process())
    return report.kl, time.process_time() - began


def restored_one_by_one(job: DistillJob, tokens: int) -> Selection:
    """KL after distilling each layout with one attention layer for so many tokens; ``job`` gives all else."""
    num_layers = job.layout.num_layers
    running = [
        _restored.remote(
            dataclasses.replace(job, layout=Layout.from_attention_layers({layer}, num_layers), report_at=(tokens,))
        )
        for layer in range(num_layers)
    ]
    results = ray.get(running)
    return Selection([-kl for kl, _ in results], tokens * num_layers, sum(seconds for _, seconds in results))


def trained_selections(
    session: Session,
    scorer: LayoutScorer,
    train: SharedCache,
    validation: SharedCache,
    library: Path,
    budgets: Mapping[str, Constraints],
) -> dict[str, dict[str, Selection]]:
    """What the methods that train say about the layers, by method and ratio."""
    config, num_layers = session.config, session.num_layers
    batch_tokens = max(500, config.distill.tokens_per_batch // 2)
    training = made_batches(train, session, GATE_STEPS * batch_tokens, batch_tokens)
    gates = {
        ratio: trained_gates(scorer, training, budget.attention_counts[0], GATE_STEPS, config.seed)
        for ratio, budget in budgets.items()
    }
    data = distill_data(config, session.shared_teacher, train, validation, str(library.resolve()))
    restored = restored_one_by_one(
        DistillJob(Layout.all_mamba(num_layers), config.distill, config.student, data, (), config.seed),
        min(RESTORE_TOKENS, config.search.rung_tokens[0]),
    )
    return {"gates": gates, "restore one, distilled": dict.fromkeys(budgets, restored)}
