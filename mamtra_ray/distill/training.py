"""One student's distillation with Eq. 5, on one process or one of several: steps, validation, checkpoints.

Knows PyTorch but not Ray: ``workers.py`` runs it in Ray Train workers and in Tune trials.

Shapes: B batch, L length, D model width, N labeled positions of a batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamtra_ray.config import DistillConfig
from mamtra_ray.distill.accumulation import Accumulation
from mamtra_ray.distill.compilation import compile_layers
from mamtra_ray.distill.curve import HostCopy, StepTerms
from mamtra_ray.distill.micro_batches import Batch, micro_batches
from mamtra_ray.errors import DivergedError, InputError
from mamtra_ray.losses import LossWeights, distillation_loss
from mamtra_ray.models.mamba import MambaMixer
from mamtra_ray.runtime.shard_files import read_shards, read_whole, remove_other_shards, write_shards
from mamtra_ray.runtime.sharding import is_sharded, whole
from mamtra_ray.runtime.training import Position, autocast, learning_rate_factor, read_state, save_state
from mamtra_ray.speech_lm.sharding import shard_speech_lm, whole_student
from mamtra_ray.speech_lm.speech_lm import SpeechLM

_LOG = logging.getLogger(__name__)
VALIDATION_PARTS = 4
"""Held-out scores take this many micro batches at once: nothing is kept for a backward pass."""


@dataclass(frozen=True)
class HeldOut:
    """Scores on the validation split, per token, in nats."""

    ce: float
    """Cross-entropy with the corpus tokens."""
    kl: float
    """KL(teacher || student), not skewed."""
    tokens: int


class Distillation:
    """A student in training: optimizer, schedule and position.

    Args:
        student: starts from this; moved to ``device``. With ``fully_shard`` it may share tensors with a teacher.
        config: optimizer, schedule and loss weights.
        total_tokens: the schedule ends here.
        device: where it trains.
        world_size: processes that train together; above 1 a process group must be initialized.
        made_by: what the training depends on; a saved state of another training is refused.
        say: told in a sentence when a step is done again in smaller micro batches.
    """

    def __init__(
        self,
        student: SpeechLM,
        config: DistillConfig,
        total_tokens: int,
        device: torch.device,
        world_size: int = 1,
        made_by: Mapping[str, str] | None = None,
        say: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self.config, self.total_tokens, self.device = config, total_tokens, device
        self.is_sharded = is_sharded(config.fully_shard, world_size)
        """Whether this process holds a part of the student; then all of them must validate, save and load together."""
        if self.is_sharded:
            shard_speech_lm(student, config.precision, device, world_size)
        self.student = (student if self.is_sharded else student.to(device)).train()
        if config.compile:
            compile_layers(self.student)
        self.accumulation = Accumulation(self.student, config, device, world_size, say)
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
        self.checks_one_step_later = device.type == "cuda"
        """Whether a step's gradient is looked at when the next one is queued, so that a GPU waits for nobody."""
        self._unchecked: StepTerms | None = None
        self.seconds = 0.0
        """Of training, over all sessions; kept by whoever holds the stopwatch."""
        self.report: dict[str, Any] | None = None
        """The scores at this position, kept beside the weights until somebody has noted them; None between reports."""

    def learning_rate(self) -> float:
        """Of the mixers in the next step: linear warm-up, then cosine to a tenth, or constant."""
        done, step = self.position.tokens / self.total_tokens, self.config.tokens_per_batch / self.total_tokens
        factor = learning_rate_factor(done, step, self.config.warmup_fraction, self.config.schedule)
        return self.peak_learning_rate * factor

    def step(self, batch: Batch) -> StepTerms:
        """One optimizer step on ``batch``.

        Raises:
            DivergedError: the gradient is not finite. On a CPU the student is not changed; on a GPU the gradient is
                that of the step before, and the student is spoiled. Neither can be saved.
            InputError: out of memory, see :class:`~mamtra_ray.distill.accumulation.Accumulation`.
        """
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_factor"]
        terms_T = self.accumulation.add_gradients(batch)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        norm = whole(nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm))
        position = self.position.after(batch.step_tokens)
        numbers = HostCopy(torch.cat([terms_T, norm[None].to(terms_T.dtype)]))
        terms = StepTerms(position.step, position.tokens, learning_rate, numbers)
        if self.checks_one_step_later:
            self.check_finite()
        self._unchecked = terms
        if not self.checks_one_step_later:
            self.check_finite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position, self.report = position, None
        return terms

    def check_finite(self) -> None:
        """Look at the gradient of the last step, if nobody has.

        Raises:
            DivergedError: it is not finite.
        """
        terms, self._unchecked = self._unchecked, None
        if terms is None:
            return
        numbers = terms.read()
        if not math.isfinite(numbers["grad_norm"]):
            raise DivergedError(
                f"the training of {self.student.layout} has diverged: its gradient's norm is {numbers['grad_norm']} at "
                f"step {terms.step - 1} (loss {numbers['total']}); lower distill.learning_rate, or use "
                "distill.precision=float32"
            )

    def validate(self, batches: Callable[[], Iterable[Batch]]) -> HeldOut:
        """:func:`validate` of the student, in parts of :data:`VALIDATION_PARTS` micro batches.

        Args:
            batches: makes the validation split's batches anew; with ``micro_batch_tokens: auto`` the parts are halved
                until they fit.

        Raises:
            DivergedError: as :meth:`check_finite`.
            InputError: out of memory, and the parts may not or cannot be smaller.
        """
        self.check_finite()
        of_process = -(-self.config.tokens_per_batch // self.accumulation.world_size)
        # With activation checkpointing a step keeps little more than a pass without gradients needs.
        parts = 1 if self.config.activation_checkpointing else VALIDATION_PARTS
        most = parts * (self.accumulation.most_tokens or of_process)
        while most:
            try:
                # The matrices of a sharded student are there in this precision alone.
                with autocast(self.device, self.config.precision if self.is_sharded else "float32"):
                    return validate(self.student, batches(), most, self.config.loss_chunk_tokens)
            except torch.OutOfMemoryError:
                most = most // 2 if self.accumulation.is_auto else 0
            self.student.train()
        raise InputError(
            f"the held-out scores of {self.student.layout} do not fit in memory: try a smaller "
            "distill.micro_batch_tokens (or auto)"
        )

    def next_epoch(self) -> None:
        """Call when the batches of an epoch are used up."""
        self.position = self.position.next_epoch()

    def save(self, folder: Path) -> None:
        """Write student, optimizer and position; :meth:`load` goes on with the next step bit for bit.

        Of a sharded student every process writes its part, into one folder for all or a folder for each; the whole
        student is written at the training's end only.

        Raises:
            DivergedError: as :meth:`check_finite`.
        """
        self.check_finite()
        state = {"report": self.report, "micro_batch_tokens": self.accumulation.most_tokens}
        if self.is_sharded:
            self._save_shards(folder, state)
            return
        self.student.save(folder / "student")
        state["optimizer"] = self.optimizer.state_dict()
        save_state(folder, state, self.position, self.made_by, seconds=self.seconds)

    def _save_shards(self, folder: Path, state: Mapping[str, Any]) -> None:
        rank, step = torch.distributed.get_rank(), self.position.step
        shards = write_shards(folder, step, self._trained(), self.optimizer)
        if self.position.tokens >= self.total_tokens:
            student = whole_student(self.student, rank)
            if student is not None:
                student.save(folder / "student")
        if rank == 0:
            save_state(folder, state, self.position, self.made_by, seconds=self.seconds, shards=shards)
        remove_other_shards(folder, step)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def load(self, folder: Path) -> None:
        """Take student weights, optimizer and position from :meth:`save`'s folder, of any number of processes, sharded
        or not.

        Raises:
            InputError: a state of another training (the first difference is named), or a damaged one.
        """
        state, position, content = read_state(folder, self.made_by, "cpu" if self.is_sharded else self.device)
        if shards := content.get("shards"):
            read_shards(folder, position.step, shards, self._trained(), self.optimizer, self.is_sharded)
        elif self.is_sharded:
            weights = SpeechLM.load(folder / "student").state_dict()
            read_whole(weights, state["optimizer"], self.student.state_dict(), self.optimizer)
        else:
            self.student.load_state_dict(SpeechLM.load(folder / "student").state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        self.position, self.seconds, self.report = position, float(content["seconds"]), state["report"]
        if self.accumulation.is_auto:
            # What has not fitted once is not tried again. (States of older versions do not say.)
            self.accumulation.most_tokens = state.get("micro_batch_tokens")


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
def validate(
    student: SpeechLM, batches: Iterable[Batch], most_tokens: int | None = None, chunk_tokens: int = 256
) -> HeldOut:
    """CE with the corpus and KL to the teacher over all ``batches`` (every token counts the same).

    Args:
        student: is in its former mode afterward.
        batches: of the validation split.
        most_tokens: padded tokens at once; None: a batch.
        chunk_tokens: tokens whose logits exist at a time.
    """
    was_training = student.training
    student.eval()
    weights = LossWeights(ce=1.0, kl=1.0, hidden=0.0)
    sums_2 = torch.zeros(2, dtype=torch.float64, device=student.device)
    tokens = 0
    for batch in batches:
        tokens += batch.num_tokens
        for part in micro_batches(batch, most_tokens):
            hidden_nD = student.hidden_states(part.input_ids_bl).flatten(0, 1).index_select(0, part.labeled_n)
            # alpha = 0 turns the skewed KL into KL(teacher || student).
            terms = distillation_loss(
                hidden_nD,
                student.head,
                part.labels_n,
                part.teacher_targets,
                weights,
                alpha=0.0,
                chunk_tokens=chunk_tokens,
                num_tokens=1.0,
            )
            sums_2 += torch.stack([terms.ce, terms.kl]).double()
    student.train(was_training)
    ce, kl = sums_2.tolist()
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
