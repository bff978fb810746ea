"""Scores of many layouts by forward passes: teacher layers and aligned mixers are held once, layouts only choose.

Layouts that agree in their first layers share that work: sorted as strings they are the leaves of a prefix tree, and a
batch walks it depth first, keeping the hidden states along the current path. Knows PyTorch but not Ray.

Tensor letters: B batch, L length, D model width, N labeled positions, V speech vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mamtra_ray.layouts import Layout
from mamtra_ray.losses import (
    IGNORE,
    HiddenTargets,
    TopKTargets,
    cross_entropy,
    skewed_forward_kl,
    skewed_forward_kl_top_k,
)
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.run.memory import PROBE_LOGITS_TOKENS
from mamtra_ray.run.rows import ProbeRow
from mamtra_ray.speech_lm.offloading import bring_when_needed
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student


class ScoredBatch(Protocol):
    """What scoring needs of ``teacher_cache.batches.DistillBatch``."""

    @property
    def input_ids_BL(self) -> Tensor:
        """Unified ids, padded right."""

    @property
    def labels_BL(self) -> Tensor:
        """Speech ids, or IGNORE."""

    @property
    def teacher_targets(self) -> HiddenTargets | TopKTargets:
        """The teacher's rows, in the order of ``labels_BL[labels_BL != IGNORE]``."""


class LayoutScorer:
    """Teacher and mixer library on a device.

    Args:
        teacher: all attention, computing on ``device``; its tensors are shared, not copied.
        library: layer -> tensors of its aligned mixer.
        state_sharing: that of the library.
        device: where to score.
        cpu_offload: whether the teacher's layers stay on the CPU; then so do those with mixers.

    Raises:
        InputError: a library that does not fit the teacher.
    """

    def __init__(
        self,
        teacher: SpeechLM,
        library: Mapping[int, Mapping[str, Tensor]],
        state_sharing: StateSharing,
        device: torch.device,
        cpu_offload: bool = False,
    ) -> None:
        self.teacher = teacher.eval()
        pure_mamba = make_student(
            self.teacher,
            Layout.all_mamba(teacher.config.num_layers),
            "aligned",
            library,
            state_sharing,
            share_weights=True,
        ).eval()
        if cpu_offload:
            bring_when_needed(pure_mamba.body.layers, device)
        else:
            pure_mamba.to(device)
        self.attention_layers, self.mamba_layers = list(teacher.body.layers), list(pure_mamba.body.layers)

    @torch.no_grad()
    def score(
        self, layouts: Sequence[Layout], batches: Iterable[ScoredBatch], share_prefixes: bool = True
    ) -> list[ProbeRow]:
        """Scores in the order of ``layouts``; every layout sees the same tokens."""
        began = time.perf_counter()
        sums = {layout: torch.zeros(2, dtype=torch.float64) for layout in layouts}
        ordered = sorted(sums)
        tokens = 0
        for batch in batches:
            labels_N = batch.labels_BL[batch.labels_BL != IGNORE]
            tokens += len(labels_N)
            loss = _losses(self.teacher.head, labels_N, batch.teacher_targets)
            hidden_BLD = self.teacher.embed(batch.input_ids_BL)
            # Padded right and without a cache: neither kind of layer needs a mask.
            inputs = self.teacher.body.inputs(hidden_BLD)
            path: list[Tensor] = [hidden_BLD]
            before: list[nn.Module] = []
            for layout in ordered:
                layers = self._layers(layout)
                shared = _common_prefix(before, layers) if share_prefixes else 0
                del path[shared + 1 :]
                for layer in layers[shared:]:
                    path.append(layer(path[-1], inputs))
                normed_BLD = self.teacher.body.norm(path[-1])
                sums[layout] += loss(normed_BLD[batch.labels_BL != IGNORE])
                before = layers
        seconds = (time.perf_counter() - began) / max(len(sums), 1)
        return [
            ProbeRow(layout, float(sums[layout][0]) / tokens, float(sums[layout][1]) / tokens, tokens, seconds)
            for layout in layouts
        ]

    def _layers(self, layout: Layout) -> list[nn.Module]:
        """The decoder layers of ``layout``, first layer first."""
        mamba = set(layout.mamba_layers)
        return [
            self.mamba_layers[index] if index in mamba else self.attention_layers[index]
            for index in range(layout.num_layers)
        ]


class LayerBatch(Protocol):
    """What :func:`cosine_importance` needs of ``teacher_cache.batches.DistillBatch``."""

    @property
    def input_ids_BL(self) -> Tensor:
        """Unified ids, padded right."""

    @property
    def attention_mask_BL(self) -> Tensor:
        """True for real tokens."""


@torch.no_grad()
def cosine_importance(teacher: SpeechLM, batches: Iterable[LayerBatch]) -> list[float]:
    """1 - mean cosine of every decoder layer's input and output over all tokens: a layer that hardly turns its input
    matters little (Block Influence of ShortGPT, arXiv 2403.03853; the paper's "cosine" criterion)."""
    sums = torch.zeros(teacher.config.num_layers, dtype=torch.float64)
    tokens = 0
    for batch in batches:
        before_BLD = teacher.embed(batch.input_ids_BL)
        _, outputs = teacher.hidden_states(batch.input_ids_BL, return_layers=True)
        for layer, after_BLD in enumerate(outputs):
            cosine_BL = torch.cosine_similarity(before_BLD.float(), after_BLD.float(), dim=-1)
            sums[layer] += cosine_BL[batch.attention_mask_BL].double().sum().cpu()
            before_BLD = after_BLD
        tokens += int(batch.attention_mask_BL.sum())
    return (1 - sums / tokens).tolist()


def _common_prefix(first: Sequence[nn.Module], second: Sequence[nn.Module]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a is not b:
            break
        length += 1
    return length


def _losses(head: nn.Linear, labels_N: Tensor, targets: HiddenTargets | TopKTargets) -> Callable[[Tensor], Tensor]:
    """A function from student hidden states (N, D) to the sums of cross-entropy and KL over the N positions."""

    def sums(hidden_ND: Tensor) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(labels_N), PROBE_LOGITS_TOKENS):
            rows = slice(first, first + PROBE_LOGITS_TOKENS)
            logits = head(hidden_ND[rows])
            if isinstance(targets, HiddenTargets):
                teacher_logits = head(targets.hidden_ND[rows].to(logits.dtype))
                kl = skewed_forward_kl(teacher_logits, logits, alpha=0.0)
            else:
                kept = TopKTargets(targets.ids_NK[rows], targets.log_probs_NK[rows], targets.tail_log_mass_N[rows])
                kl = skewed_forward_kl_top_k(kept, logits, alpha=0.0)
            count = len(logits)
            total += torch.stack([cross_entropy(logits, labels_N[rows]), kl]).double().cpu() * count
        return total

    return sums
