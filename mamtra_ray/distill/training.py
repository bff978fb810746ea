"""One student's distillation with Eq. 5, on one process or one of several: steps, validation, checkpoints.

Knows PyTorch but not Ray: ``workers.py`` runs it in Ray Train workers and in Tune trials.

Shapes: B batch, L length, D model width, N labeled positions of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mamtra_ray.config import DistillConfig
from mamtra_ray.errors import DivergedError
from mamtra_ray.losses import IGNORE, LossWeights, distillation_loss
from mamtra_ray.models.mamba import MambaMixer
from mamtra_ray.runtime.training import (
    Position,
    autocast,
    learning_rate_factor,
    read_state,
    save_state,
    sum_over_workers,
)
from mamtra_ray.speech_lm.speech_lm import SpeechLM


class Batch(Protocol):
    """What a step needs; ``teacher_cache.batches.DistillBatch`` is one."""

    @property
    def input_ids_BL(self) -> Tensor:
        """Unified ids, padded right."""

    @property
    def labels_BL(self) -> Tensor:
        """Speech ids, or IGNORE."""

    @property
    def teacher_targets(self) -> Any:
        """The teacher's rows for the labeled positions, in the order of ``labels_BL[labels_BL != IGNORE]``."""

    @property
    def num_tokens(self) -> int:
        """Labeled positions."""


@dataclass(frozen=True)
class HeldOut:
    """Scores on the validation split, per token, in nats."""

    ce: float
    """Cross-entropy with the corpus tokens."""
    kl: float
    """KL(teacher || student), not skewed."""
    tokens: int


class _Objective(nn.Module):
    """Student and Eq. 5 as one module, so that DistributedDataParallel sees a single forward pass."""

    def __init__(self, student: SpeechLM, config: DistillConfig) -> None:
        super().__init__()
        self.student = student
        self.weights = LossWeights(ce=config.ce_weight, kl=config.kl_weight, hidden=config.hidden_weight)
        self.skew = config.kl_skew
        self.hidden_layers = config.hidden_layers

    def forward(self, batch: Batch, num_tokens: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The terms of Eq. 5 as sums over this batch divided by ``num_tokens``; a tuple, as DDP wants it."""
        # Padded right, so no position sees padding: without a mask attention takes its faster causal path.
        labeled_BL = batch.labels_BL != IGNORE
        layers = [layer for layer in self.hidden_layers if layer != "final"] if self.weights.hidden else []
        hidden_BLD = self.student.hidden_states(batch.input_ids_BL, return_layers=bool(layers))
        layers_ND: dict[int, Tensor] = {}
        if layers:
            hidden_BLD, outputs = hidden_BLD
            layers_ND = {layer: outputs[layer][labeled_BL] for layer in layers}
        terms = distillation_loss(
            hidden_BLD[labeled_BL],
            self.student.head,
            batch.labels_BL[labeled_BL],
            batch.teacher_targets,
            self.weights,
            alpha=self.skew,
            num_tokens=num_tokens,
            hidden_layers=self.hidden_layers,
            student_layers_ND=layers_ND,
        )
        return terms.total, terms.ce, terms.kl, terms.hidden


class Distillation:
    """A student in training: optimizer, schedule and position.

    Args:
        student: starts from this; moved to ``device``.
        config: optimizer, schedule and loss weights.
        total_tokens: the schedule ends here.
        device: where it trains.
        world_size: processes that train together; above 1 a process group must be initialized.
        made_by: what the training depends on; a saved state of another training is refused.
    """

    def __init__(
        self,
        student: SpeechLM,
        config: DistillConfig,
        total_tokens: int,
        device: torch.device,
        world_size: int = 1,
        made_by: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.total_tokens, self.device, self.world_size = config, total_tokens, device, world_size
        self.student = student.to(device).train()
        objective = _Objective(self.student, config)
        self.objective: nn.Module = objective
        if world_size > 1:
            # All trained tensors take part in every step, so no search for unused ones is needed.
            self.objective = nn.parallel.DistributedDataParallel(
                objective, device_ids=[device] if device.type == "cuda" else None
            )
        if isinstance(config.learning_rate, str):
            raise ValueError("distill.learning_rate=auto must be a number before a training begins")
        self.peak_learning_rate = config.learning_rate
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, config),
            lr=self.peak_learning_rate,
            betas=(0.9, 0.98),
            fused=True,  # on the CPU too: benchmarks/train_step.py
        )
        self.made_by = dict(made_by or {}) | {"layout": str(student.layout), "total_tokens": str(total_tokens)}
        self.position = Position()
        self.seconds = 0.0
        """Of training, over all sessions; kept by whoever holds the stopwatch."""
        self.report: dict[str, Any] | None = None
        """The scores at this position, kept beside the weights until somebody has noted them; None between reports."""

    def learning_rate(self) -> float:
        """Of the mixers in the next step: linear warm-up, then cosine to a tenth, or constant."""
        done, step = self.position.tokens / self.total_tokens, self.config.tokens_per_batch / self.total_tokens
        factor = learning_rate_factor(done, step, self.config.warmup_fraction, self.config.schedule)
        return self.peak_learning_rate * factor

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on ``batch``; returns the loss terms (this process's batch), in nats per token, and the
        ``learning_rate`` and ``grad_norm`` (before clipping) of the step.

        Raises:
            DivergedError: the gradient is not finite; the student is not changed.
        """
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_factor"]
        tokens = sum_over_workers(batch.num_tokens, self.world_size, self.device)
        with autocast(self.device, self.config.precision):
            # DDP averages gradients over the processes, so each divides by its share of all tokens.
            total, ce, kl, hidden = self.objective(batch, tokens / self.world_size)
        total.backward()
        norm = nn.utils.clip_grad_norm_(
            [p for p in self.student.parameters() if p.requires_grad], self.config.max_grad_norm
        )
        if not torch.isfinite(norm):
            raise DivergedError(
                f"the training of {self.student.layout} has diverged: its gradient's norm is {norm.item()} at step "
                f"{self.position.step} (loss {float(total.detach())}); lower distill.learning_rate, or use "
                "distill.precision=float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position, self.report = self.position.after(tokens), None
        terms = {"total": float(total.detach()), "ce": float(ce), "kl": float(kl), "hidden": float(hidden)}
        return terms | {"learning_rate": learning_rate, "grad_norm": float(norm)}

    def next_epoch(self) -> None:
        """Call when the batches of an epoch are used up."""
        self.position = self.position.next_epoch()

    def save(self, folder: Path) -> None:
        """Write student, optimizer and position; :meth:`load` goes on with the next step bit for bit."""
        self.student.save(folder / "student")
        state = {"optimizer": self.optimizer.state_dict(), "report": self.report}
        save_state(folder, state, self.position, self.made_by, seconds=self.seconds)

    def load(self, folder: Path) -> None:
        """Take student weights, optimizer and position from :meth:`save`'s folder.

        Raises:
            InputError: a state of another training (the first difference is named), or a damaged one.
        """
        state, position, content = read_state(folder, self.made_by, self.device)
        self.student.load_state_dict(SpeechLM.load(folder / "student").state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.position, self.seconds, self.report = position, float(content["seconds"]), state["report"]


def parameter_groups(student: SpeechLM, config: DistillConfig) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer: mixers and what comes from the teacher, each matrices and others.

    ``learning_rate_factor`` is relative to the mixers' rate; only matrices decay.
    """
    mixers = {id(p) for m in student.modules() if isinstance(m, MambaMixer) for p in m.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = []
    for is_mixer, factor in ((True, 1.0), (False, config.pretrained_learning_rate_factor)):
        for is_matrix, weight_decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [p for p in trained if (id(p) in mixers) == is_mixer and (p.ndim >= 2) == is_matrix]
            groups.append({"params": chosen, "weight_decay": weight_decay, "learning_rate_factor": factor})
    # A student without Mamba layers has no mixers to train.
    return [group for group in groups if group["params"]]


@torch.no_grad()
def validate(student: SpeechLM, batches: Iterator[Batch]) -> HeldOut:
    """CE with the corpus and KL to the teacher over all ``batches`` (every token counts the same)."""
    was_training = student.training
    student.eval()
    weights = LossWeights(ce=1.0, kl=1.0, hidden=0.0)
    ce = kl = 0.0
    tokens = 0
    for batch in batches:
        labeled_BL = batch.labels_BL != IGNORE
        hidden_ND = student.hidden_states(batch.input_ids_BL)[labeled_BL]
        labels_N = batch.labels_BL[labeled_BL]
        # alpha = 0 turns the skewed KL into KL(teacher || student).
        terms = distillation_loss(hidden_ND, student.head, labels_N, batch.teacher_targets, weights, alpha=0.0)
        ce += float(terms.ce) * len(labels_N)
        kl += float(terms.kl) * len(labels_N)
        tokens += len(labels_N)
    student.train(was_training)
    return HeldOut(ce / tokens, kl / tokens, tokens)


class Stopwatch:
    """Seconds spent waiting for data and in all, for the share of time a training waits."""

    def __init__(self) -> None:
        self.started = self.last_tick = time.perf_counter()
        self.waited = 0.0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass ``batches`` through, adding up how long each one took to arrive."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def a_second_passed(self) -> bool:
        """True at most once a second."""
        now = time.perf_counter()
        if now - self.last_tick < 1.0:
            return False
        self.last_tick = now
        return True

    @property
    def seconds(self) -> float:
        """Since the stopwatch was made."""
        return time.perf_counter() - self.started
