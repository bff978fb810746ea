"""The gradient of one optimizer step, a micro batch at a time, on one process or one of several.

The terms of Eq. 5 are sums over tokens divided by the step's tokens, over all micro batches and processes. So the sum
of the micro batches' gradients, averaged over the processes, is the gradient of the whole batch up to rounding.

Knows PyTorch but not Ray. Shapes: D model width, n labeled positions of a micro batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mamtra_ray.config import DistillConfig
from mamtra_ray.distill.micro_batches import Batch, MicroBatch, empty_part, micro_batches
from mamtra_ray.errors import InputError
from mamtra_ray.losses import LossWeights, distillation_loss
from mamtra_ray.runtime.sharding import is_sharded
from mamtra_ray.runtime.training import autocast
from mamtra_ray.speech_lm.speech_lm import SpeechLM

_LOG = logging.getLogger(__name__)

TERMS = ("total", "ce", "kl", "hidden")
_BUCKET_BYTES = 25 * 2**20
_DONE, _TOO_LARGE, _CANNOT_SPLIT = range(3)


class Objective(nn.Module):
    """Student and Eq. 5 as one module, so that DistributedDataParallel sees a single forward pass."""

    def __init__(self, student: SpeechLM, config: DistillConfig) -> None:
        super().__init__()
        self.student = student
        self.weights = LossWeights(ce=config.ce_weight, kl=config.kl_weight, hidden=config.hidden_weight)
        self.skew = config.kl_skew
        self.hidden_layers = config.hidden_layers
        self.chunk_tokens = config.loss_chunk_tokens

    def forward(self, part: MicroBatch, num_tokens: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The :data:`TERMS` as sums over this part divided by ``num_tokens``; a tuple, as DDP wants it."""
        # Padded right, so no position sees padding: without a mask attention takes its faster causal path.
        layers = [layer for layer in self.hidden_layers if layer != "final"] if self.weights.hidden else []
        hidden_blD = self.student.hidden_states(part.input_ids_bl, return_layers=bool(layers))
        layers_nD: dict[int, Tensor] = {}
        if layers:
            hidden_blD, outputs = hidden_blD
            layers_nD = {layer: outputs[layer].flatten(0, 1).index_select(0, part.labeled_n) for layer in layers}
        terms = distillation_loss(
            hidden_blD.flatten(0, 1).index_select(0, part.labeled_n),
            self.student.head,
            part.labels_n,
            part.teacher_targets,
            self.weights,
            alpha=self.skew,
            chunk_tokens=self.chunk_tokens,
            num_tokens=num_tokens,
            hidden_layers=self.hidden_layers,
            student_layers_ND=layers_nD,
        )
        return terms.total, terms.ce, terms.kl, terms.hidden


class Accumulation:
    """Adds up the gradients of a step's micro batches in the student's ``grad``.

    Args:
        student: on ``device``.
        config: ``micro_batch_tokens`` and the loss.
        device: where it trains.
        world_size: processes that train together; above 1 a process group must be initialized.
        say: told in a sentence when a step did not fit and is done again in smaller parts.
    """

    def __init__(
        self,
        student: SpeechLM,
        config: DistillConfig,
        device: torch.device,
        world_size: int = 1,
        say: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self.student, self.device, self.world_size, self.say = student, device, world_size, say
        self.precision = config.precision
        student.body.activation_checkpointing = config.activation_checkpointing
        self.is_auto = config.micro_batch_tokens == "auto"
        self.most_tokens = config.micro_batch_tokens if isinstance(config.micro_batch_tokens, int) else None
        """Padded tokens of a micro batch; None: the whole batch. With ``auto`` it shrinks."""
        self.objective: nn.Module = Objective(student, config)
        # With auto any process may run out of memory in the middle of a backward pass, where DDP would have the others
        # wait for its gradients for ever: there the processes agree first and average afterward.
        self.averages_afterward = self.is_auto and world_size > 1
        self.is_sharded = is_sharded(config.fully_shard, world_size)
        if world_size > 1 and not self.is_auto and not self.is_sharded:
            # All trained tensors take part in every step, so no search for unused ones is needed.
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective,
                device_ids=[device] if device.type == "cuda" else None,
                # Otherwise every gradient exists twice.
                gradient_as_bucket_view=True,
            )
        # Made before memory is short.
        self._verdict_2 = torch.zeros(2, dtype=torch.int64, device=device)

    def add_gradients(self, batch: Batch) -> Tensor:
        """Put the gradient of the whole step on ``batch`` into ``grad``, which must be None everywhere.

        With ``micro_batch_tokens: auto`` a step that runs out of memory on any process is begun anew by all, in parts
        half as large. Until it is complete nothing but ``grad`` changes.

        Returns:
            [4], the :data:`TERMS` of this process's part, on the device.

        Raises:
            InputError: out of memory, and the parts may not or cannot be smaller.
        """
        while True:
            parts = self._parts(batch)
            random_state = _random_state(self.device) if self.is_auto else None
            terms_T: Tensor | None = None
            try:
                # DDP and FSDP average gradients over the processes, so each divides by its share of all tokens.
                terms_T = self._accumulate(parts, batch.step_tokens / self.world_size)
            except torch.OutOfMemoryError:
                if not self.is_auto:
                    raise InputError(self._does_not_fit(max(part.num_padded for part in parts))) from None
            # Outside of the handler, whose traceback holds what the step had made.
            smaller = self._smaller_parts(parts, is_done=terms_T is not None)
            if smaller is None and terms_T is not None:
                if self.averages_afterward:
                    average_gradients(self.student.parameters(), self.world_size)
                return terms_T
            for parameter in self.student.parameters():
                parameter.grad = None
            _set_random_state(random_state, self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            assert smaller is not None
            self.most_tokens = smaller
            self.say(f"a step did not fit in memory: from now on in micro batches of {smaller:,} padded tokens")

    def _parts(self, batch: Batch) -> list[MicroBatch]:
        parts = micro_batches(batch, self.most_tokens)
        if self.is_sharded and self.most_tokens is not None:
            # Layers are put together by all processes at once, so all take as many passes.
            most = torch.tensor(len(parts), device=self.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            parts += [empty_part(batch) for _ in range(int(most) - len(parts))]
        return parts

    def _accumulate(self, parts: list[MicroBatch], num_tokens: float) -> Tensor:
        sum_T: Tensor | None = None
        for index, part in enumerate(parts):
            with self._sends_gradients(is_last=index == len(parts) - 1):
                with autocast(self.device, self.precision):
                    terms = self.objective(part, num_tokens)
                terms[0].backward()
            terms_T = torch.stack([term.detach() for term in terms])
            sum_T = terms_T if sum_T is None else sum_T + terms_T
        assert sum_T is not None
        return sum_T

    def _sends_gradients(self, is_last: bool) -> AbstractContextManager[Any]:
        if is_last or not isinstance(self.objective, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.objective.no_sync()

    def _smaller_parts(self, parts: list[MicroBatch], is_done: bool) -> int | None:
        """How large parts are from now on, if the step did not fit on some process; all processes get one answer."""
        splittable = [part.num_padded for part in parts if part.num_utterances > 1]
        verdict, smaller = (_DONE, 0) if is_done else (_TOO_LARGE if splittable else _CANNOT_SPLIT, 0)
        if verdict == _TOO_LARGE:
            smaller = max(max(splittable) // 2, 1)
        if self.averages_afterward:
            self._verdict_2[0], self._verdict_2[1] = verdict, smaller
            torch.distributed.all_reduce(self._verdict_2, torch.distributed.ReduceOp.MAX)
            verdict, smaller = self._verdict_2.tolist()
        if verdict == _CANNOT_SPLIT:
            raise InputError(self._does_not_fit(max(part.num_padded for part in parts)))
        return smaller if verdict == _TOO_LARGE else None

    def _does_not_fit(self, tokens: int) -> str:
        ways = ["distill.activation_checkpointing=true", "a smaller distill.loss_chunk_tokens"]
        if not self.is_auto:
            ways.insert(0, "a smaller distill.micro_batch_tokens (or auto)")
        return (
            f"a training step of {self.student.layout} with {tokens:,} padded tokens at once does not fit in memory: "
            f"try {', '.join(ways)}, or a corpus with shorter utterances"
        )


def average_gradients(parameters: Iterator[nn.Parameter], world_size: int) -> None:
    """Average ``grad`` over the processes, as DDP does; every process must have gradients of the same parameters."""
    bucket: list[Tensor] = []

    def send() -> None:
        if bucket:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            flat /= world_size
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        bucket.clear()

    for parameter in parameters:
        if parameter.grad is None:
            continue
        if bucket and parameter.grad.dtype != bucket[0].dtype:
            send()
        bucket.append(parameter.grad)
        if sum(gradient.nbytes for gradient in bucket) >= _BUCKET_BYTES:
            send()
    send()


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
