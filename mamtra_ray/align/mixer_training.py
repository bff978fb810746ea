"""Training one Mamba mixer per layer to its attention's output, all layers at once, from one teacher pass.

Every layer is a problem of its own: its mixer reads what the teacher's attention reads and is compared with what the
attention writes. So a mixer's forward and backward pass run inside the teacher's forward pass, right where its layer
is computed: nothing is stored, and memory does not grow with the number of layers. With ``align.fully_shard`` a process
holds its part of every layer and mixer, and puts one of each together at a time.

Knows PyTorch but not Ray. Shapes: B batch, L length, D model width, I mixer channels before out_proj.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mamtra_ray.config import AlignConfig
from mamtra_ray.errors import DivergedError
from mamtra_ray.models.mamba import MambaMixer, StateSharing
from mamtra_ray.models.transfer import mixer_from_attention
from mamtra_ray.runtime.shard_files import read_shards, read_whole, remove_other_shards, write_shards
from mamtra_ray.runtime.sharding import is_sharded, part_like, whole
from mamtra_ray.runtime.training import (
    Position,
    autocast,
    learning_rate_factor,
    read_state,
    save_state,
    sum_over_workers,
)
from mamtra_ray.speech_lm.sharding import shard_speech_lm
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student

_WARMUP = 0.05
_MAX_GRAD_NORM = 1.0
_RIDGE = 1e-4


class Batch(Protocol):
    """What a step needs of ``shared_batches.DistillBatch``."""

    @property
    def input_ids_BL(self) -> Tensor:
        """Unified ids, padded right."""

    @property
    def attention_mask_BL(self) -> Tensor:
        """True for real tokens."""


def attention_of(teacher: SpeechLM, layer: int) -> Any:
    """The attention module of a layer (0-based)."""
    return teacher.body.layers[layer].self_attn


@contextmanager
def attention_taps(teacher: SpeechLM, seen: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, ``seen(layer, input_BLD, output_BLD)`` is called for every attention of a forward pass."""

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output_BLD: Tensor) -> None:
            seen(layer, args[0], output_BLD)

        return hook

    handles = [
        attention_of(teacher, layer).register_forward_hook(hook_of(layer)) for layer in teacher.layout.attention_layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class MixerTraining:
    """The mixers of all attention layers of a teacher in training.

    Args:
        teacher: computes on ``device``; with ``fully_shard`` on the CPU, and not changed.
        config: optimizer and batches.
        state_sharing: see :class:`~mamtra_ray.models.mamba.MixerConfig`.
        device: where it trains.
        world_size: processes that train together; above 1 a process group must be initialized.
        seed: of the random parts of the mixers, as in :func:`~mamtra_ray.speech_lm.speech_lm.make_student`.
    """

    def __init__(
        self,
        teacher: SpeechLM,
        config: AlignConfig,
        state_sharing: StateSharing,
        device: torch.device,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.config, self.device, self.world_size = config, device, world_size
        self.is_sharded = is_sharded(config.fully_shard, world_size)
        """Whether this process holds a part of teacher and mixers; then all of them must save and load together."""
        self.rank = torch.distributed.get_rank() if world_size > 1 else 0
        shape = dataclasses.replace(teacher.config.mixer, state_sharing=state_sharing)
        self.mixers: dict[int, MambaMixer] = {}
        for layer in teacher.layout.attention_layers:
            attention, layer_seed = attention_of(teacher, layer), seed * teacher.config.num_layers + layer
            mixer = mixer_from_attention(attention, shape, "transfer", layer_seed)
            if not self.is_sharded:
                mixer.to(device)
            # Weights are trained in float32 whatever the teacher is stored in.
            self.mixers[layer] = mixer.float().train().requires_grad_(True)
        self.teacher = (self._sharded(teacher) if self.is_sharded else teacher).eval()
        self.optimizer = torch.optim.AdamW(
            list(self._trained().values()), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.position = Position()

    def _sharded(self, teacher: SpeechLM) -> SpeechLM:
        """A model of this process's parts of the teacher's tensors. Cuts the mixers as well."""
        same = make_student(teacher, teacher.layout, state_sharing=teacher.config.state_sharing, share_weights=True)
        shard_speech_lm(same, "float32", self.device, self.world_size)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for mixer in self.mixers.values():
            # After a pass without gradients, too, a mixer is in parts.
            fully_shard(mixer, mesh=mesh, reshard_after_forward=True)
        return same

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{layer}.{name}": parameter
            for layer, mixer in self.mixers.items()
            for name, parameter in mixer.named_parameters()
        }

    def learning_rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then cosine to 0 at the last token."""
        done, step = self.position.tokens / self.config.tokens, self.config.tokens_per_batch / self.config.tokens
        return self.config.learning_rate * learning_rate_factor(done, step, _WARMUP, "cosine", final=0.0)

    def step(self, batch: Batch) -> dict[int, float]:
        """One optimizer step of every mixer; returns each layer's normalized error on the batch.

        Processes that share a batch take the step that one process takes on all of it, up to rounding.

        Raises:
            DivergedError: a gradient is not finite; no mixer is changed.
        """
        errors: dict[int, Tensor] = {}
        pending: list[tuple[int, Tensor, list[nn.Parameter], Any]] = []
        sums: list[Tensor] = []
        real_BL = batch.attention_mask_BL

        def learn(layer: int, hidden_BLD: Tensor, target_BLD: Tensor) -> None:
            with torch.enable_grad(), autocast(self.device, self.config.precision):
                error, power = _squares(self.mixers[layer](hidden_BLD.float()), target_BLD, real_BL)
                # By the power of this process's part; of several parts the sums are divided by the sum.
                loss = error / power if self.world_size == 1 else error
            loss.backward()
            errors[layer] = error.detach() / power
            parameters = list(self.mixers[layer].parameters())
            if self.is_sharded:
                sums.append(torch.stack([error.detach(), power]))
            elif self.world_size > 1:
                # Sent while the next layer computes.
                gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
                flat = torch.cat([*gradients, torch.stack([error.detach(), power])])
                pending.append((layer, flat, parameters, torch.distributed.all_reduce(flat, async_op=True)))

        with torch.no_grad(), attention_taps(self.teacher, learn):
            # Padded right and causal: no position sees padding, so no mask is needed.
            self.teacher.hidden_states(batch.input_ids_BL)
        if self.is_sharded:
            errors = self._divide_by_power(list(errors), sums)
        for layer, flat, parameters, work in pending:
            work.wait()
            *parts, last = (flat / flat[-1]).split([*(parameter.numel() for parameter in parameters), 2])
            errors[layer] = last[0]
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        norms = [whole(nn.utils.clip_grad_norm_(mixer.parameters(), _MAX_GRAD_NORM)) for mixer in self.mixers.values()]
        self._check_finite(torch.stack(norms))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position = self.position.after(sum_over_workers(int(real_BL.sum()), self.world_size, self.device))
        return {layer: float(error) for layer, error in errors.items()}

    def _divide_by_power(self, layers: Sequence[int], sums: Sequence[Tensor]) -> dict[int, Tensor]:
        """Gradients that FSDP has averaged over the processes become those of one process; the layers' errors.

        Args:
            layers: in the order in which they learned.
            sums: (2,) of each: this process's squared error and power.
        """
        sums_L2 = torch.stack(list(sums))
        torch.distributed.all_reduce(sums_L2)
        for layer, (_, power) in zip(layers, sums_L2, strict=True):
            for parameter in self.mixers[layer].parameters():
                if isinstance(parameter.grad, DTensor):
                    parameter.grad.to_local().mul_(self.world_size / power)
        return {layer: error / power for layer, (error, power) in zip(layers, sums_L2, strict=True)}

    def _check_finite(self, norms: Tensor) -> None:
        wrong = (~norms.isfinite()).nonzero()
        if len(wrong):
            index = int(wrong[0])
            raise DivergedError(
                f"the alignment of layer {list(self.mixers)[index]} has diverged at step {self.position.step}: its "
                f"gradient's norm is {float(norms[index])}; lower align.learning_rate, or use align.precision=float32"
            )

    def next_epoch(self) -> None:
        """Call when the batches of an epoch are used up."""
        self.position = self.position.next_epoch()

    @torch.no_grad()
    def fit_output_projections(self, batches: Iterable[Batch]) -> int:
        """Give every mixer the output projection that is best in the least-squares sense on ``batches``.

        Transferred mixers produce another scale than the attention did (their gated norm gives every head unit
        power), an error of several times the signal; a few thousand tokens of linear regression undo that before
        the first step. A ridge of 1e-4 of the mean power keeps it well-posed.

        Returns:
            Tokens used.
        """
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        tokens = 0
        real_BL = torch.empty(0)

        def add(layer: int, hidden_BLD: Tensor, target_BLD: Tensor) -> None:
            features = _before_output(self.mixers[layer], hidden_BLD.float())[real_BL]
            target = target_BLD[real_BL].float()
            if self.mixers[layer].out_proj.bias is not None:
                features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
            gram, cross = features.T @ features, features.T @ target
            before = sums.get(layer)
            sums[layer] = (gram, cross) if before is None else (before[0] + gram, before[1] + cross)

        with attention_taps(self.teacher, add):
            for batch in batches:
                real_BL = batch.attention_mask_BL
                tokens += int(real_BL.sum())
                self.teacher.hidden_states(batch.input_ids_BL)
        for layer, (gram, cross) in sums.items():
            if self.world_size > 1:
                torch.distributed.all_reduce(gram)
                torch.distributed.all_reduce(cross)
            gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
            solution = torch.linalg.solve(gram.double(), cross.double()).T.float()
            projection = self.mixers[layer].out_proj
            projection.weight.copy_(part_like(projection.weight, solution[:, : projection.in_features]))
            if projection.bias is not None:
                projection.bias.copy_(part_like(projection.bias, solution[:, -1]))
        return sum_over_workers(tokens, self.world_size, self.device)

    def errors(self, batches: Iterable[Batch]) -> dict[int, float]:
        """Normalized error of every layer over all ``batches`` (sums of squares before the division)."""
        sums = ErrorSums(self)
        for batch in batches:
            sums.add(batch)
        return sums.errors()

    def library(self) -> dict[int, dict[str, Tensor]]:
        """Tensors of every mixer, on the CPU: what :func:`~mamtra_ray.models.transfer.mixer_from_library` takes.

        Of a sharded training all processes must ask, and process 0 gets them.
        """
        library: dict[int, dict[str, Tensor]] = {}
        for layer, mixer in self.mixers.items():
            for name, tensor in mixer.state_dict().items():
                complete = whole(tensor).detach()
                if self.rank == 0 or not self.is_sharded:
                    library.setdefault(layer, {})[name] = complete.cpu().contiguous()
        return library

    def is_asked_by_first(self, wish: bool) -> bool:
        """What process 0 wishes: clocks differ, and a sharded training is saved by all processes or none."""
        if not self.is_sharded:
            return wish and self.rank == 0
        asked = torch.tensor(float(wish), device=self.device)
        torch.distributed.broadcast(asked, 0)
        return bool(asked)

    def save(self, folder: Path, made_by: Mapping[str, Any], **content: Any) -> None:
        """Write everything that the next step depends on, and ``content`` (JSON-ready), atomically.

        Of a sharded training every process writes its part, into the same folder.
        """
        if self.is_sharded:
            shards = write_shards(folder, self.position.step, self._trained(), self.optimizer)
            if self.rank == 0:
                save_state(folder, {}, self.position, made_by, shards=shards, **content)
            remove_other_shards(folder, self.position.step)
            return
        state = {
            "mixers": {str(layer): mixer.state_dict() for layer, mixer in self.mixers.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(folder, state, self.position, made_by, **content)

    def load(self, folder: Path, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """Take what :meth:`save` of any number of processes wrote, sharded or not; returns its ``content``.

        Raises:
            InputError: a state of another training, or a damaged one.
        """
        state, self.position, content = read_state(folder, made_by, "cpu" if self.is_sharded else self.device)
        trained = self._trained()
        if shards := content.get("shards"):
            read_shards(folder, self.position.step, shards, trained, self.optimizer, self.is_sharded)
        elif self.is_sharded:
            weights = {f"{layer}.{n}": t for layer, mixer in state["mixers"].items() for n, t in mixer.items()}
            read_whole(weights, state["optimizer"], trained, self.optimizer)
        else:
            for layer, mixer in self.mixers.items():
                mixer.load_state_dict(state["mixers"][str(layer)])
            self.optimizer.load_state_dict(state["optimizer"])
        return content


class ErrorSums:
    """Squared errors of every layer's mixer, batch by batch, so that a caller can tell how far the measuring is."""

    def __init__(self, training: MixerTraining) -> None:
        self.training = training
        self.tokens = 0
        """Real positions of the batches so far."""
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """One more batch."""
        training, real_BL = self.training, batch.attention_mask_BL

        def measure(layer: int, hidden_BLD: Tensor, target_BLD: Tensor) -> None:
            with autocast(training.device, training.config.precision):
                output_BLD = training.mixers[layer](hidden_BLD.float())
            pair = torch.stack(_squares(output_BLD, target_BLD, real_BL)).double()
            self._sums[layer] = self._sums.get(layer, 0) + pair

        with attention_taps(training.teacher, measure):
            training.teacher.hidden_states(batch.input_ids_BL)
        self.tokens += int(real_BL.sum())

    def errors(self) -> dict[int, float]:
        """By layer: the squared error over the target's squares."""
        return {layer: float(pair[0] / pair[1]) for layer, pair in self._sums.items()}


def _squares(output_BLD: Tensor, target_BLD: Tensor, real_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and the target's squares, both summed over real positions.

    Their ratio is the normalized error: 0 perfect, 1 as good as silence.
    """
    target_BLD = target_BLD.float()
    weight_BL1 = real_BL[..., None].float()
    error = ((output_BLD.float() - target_BLD).square() * weight_BL1).sum()
    return error, (target_BLD.square() * weight_BL1).sum().clamp_min(1e-12)


def _before_output(mixer: MambaMixer, hidden_BLD: Tensor) -> Tensor:
    """What the mixer's output projection reads, (B, L, I)."""
    seen: list[Tensor] = []
    handle = mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        mixer(hidden_BLD)
    finally:
        handle.remove()
    return seen[0].float()
