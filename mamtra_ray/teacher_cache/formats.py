"""How a teacher's rows are stored: its final hidden states in fp16 or quantized, or its top-k probabilities.

Final hidden states serve every loss, because the frozen head turns them into the teacher's exact logits. A
format encodes the rows of an utterance into one or more raw byte columns and decodes those of a whole batch
into loss targets. No Ray here.

Tensor letters: N labeled positions, D model width, G dimensions of a group, K kept classes, V speech vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mamtra_ray.config import CacheConfig
from mamtra_ray.errors import InputError
from mamtra_ray.losses import HiddenTargets, TopKTargets
from mamtra_ray.teacher_cache.quantizer import HiddenQuantizer, read_quantizer, token_context

# Dimensions whose codes lie in one column: neighbors in variance, so one entropy coder's table suits them.
_GROUP = 16
# 8 bits for log-probabilities down to this many nats, finer near 0 where an error moves more probability.
_LOWEST_LOG_PROB = -16.0


class RowFormat(Protocol):
    """What :mod:`mamtra_ray.teacher_cache.worker` writes and :mod:`mamtra_ray.teacher_cache.batches` reads.

    An utterance with the speech tokens s has ``len(s) + 1`` rows.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of an utterance's byte columns."""

    @property
    def compression(self) -> str:
        """Parquet's codec."""

    def encode(self, hidden_ND: Tensor, head: nn.Module, speech_tokens: Sequence[np.ndarray]) -> list[dict[str, bytes]]:
        """Rows of several utterances, one after another, into the byte columns of each."""

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], speech_tokens: Sequence[np.ndarray], device: torch.device
    ) -> HiddenTargets | TopKTargets:
        """Byte columns of several utterances (uint8 arrays) into loss targets on ``device``, in the same order."""


@dataclass(frozen=True)
class HiddenFormat:
    """Final hidden states in float16, 2 D bytes per position, and after them the outputs of ``layers``, as much each.

    What is encoded is of that width too, :func:`~mamtra_ray.teacher_cache.worker.labeled_hidden_states` with layers.
    """

    hidden_size: int
    layers: tuple[int, ...] = ()
    columns: ClassVar[tuple[str, ...]] = ("hidden",)
    compression: ClassVar[str] = "none"

    def encode(self, hidden_ND: Tensor, head: nn.Module, speech_tokens: Sequence[np.ndarray]) -> list[dict[str, bytes]]:
        hidden = checked_half(hidden_ND).cpu().numpy()
        return [{"hidden": part.tobytes()} for part in _split(hidden, speech_tokens)]

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], speech_tokens: Sequence[np.ndarray], device: torch.device
    ) -> HiddenTargets:
        joined = np.concatenate(columns["hidden"]).view(np.float16)
        parts_ND = to_device(joined.reshape(-1, 1 + len(self.layers), self.hidden_size), device).unbind(1)
        return HiddenTargets(parts_ND[0], dict(zip(self.layers, parts_ND[1:], strict=True)))


class QuantizedHiddenFormat:
    """Final hidden states as the integer codes of a :class:`HiddenQuantizer`.

    Codes of a group of dimensions take one byte each, or two in an utterance where one does not fit.
    """

    compression = "zstd"

    def __init__(self, quantizer: HiddenQuantizer) -> None:
        self.quantizer = quantizer
        self.speech_size = len(quantizer.label_table) - 1
        self.columns = tuple(f"codes_{start:04}" for start in range(0, quantizer.hidden_size, _GROUP))

    def encode(self, hidden_ND: Tensor, head: nn.Module, speech_tokens: Sequence[np.ndarray]) -> list[dict[str, bytes]]:
        checked_half(hidden_ND)
        self._move_to(hidden_ND.device)
        codes = self.quantizer.codes(hidden_ND, *self._context(speech_tokens)).cpu().numpy()
        return [
            {name: _pack(part[:, i * _GROUP : (i + 1) * _GROUP]) for i, name in enumerate(self.columns)}
            for part in _split(codes, speech_tokens)
        ]

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], speech_tokens: Sequence[np.ndarray], device: torch.device
    ) -> HiddenTargets:
        self._move_to(device)
        num_rows = sum(len(tokens) + 1 for tokens in speech_tokens)
        codes_ND = np.empty((num_rows, self.quantizer.hidden_size), np.int16)
        for utterance, part_ND in enumerate(_split(codes_ND, speech_tokens)):
            for i, name in enumerate(self.columns):
                _unpack_into(part_ND[:, i * _GROUP : (i + 1) * _GROUP], columns[name][utterance])
        context = self._context(speech_tokens)
        return HiddenTargets(self.quantizer.reconstruct(to_device(codes_ND, device), *context))

    def _context(self, speech_tokens: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        device = self.quantizer.basis_DD.device
        inputs_N, labels_N = token_context(speech_tokens, self.speech_size)
        return to_device(inputs_N, device), to_device(labels_N, device)

    def _move_to(self, device: torch.device) -> None:
        if self.quantizer.basis_DD.device != device:
            self.quantizer = self.quantizer.to(device)


@dataclass(frozen=True)
class TopKFormat:
    """The K most probable speech ids, their log-probabilities in 8 bits and the mass of all others.

    Attributes:
        top_k: K.
        speech_size: V.
    """

    top_k: int
    speech_size: int
    columns: ClassVar[tuple[str, ...]] = ("ids_low", "ids_high", "log_probs", "tail")
    compression: ClassVar[str] = "zstd"

    def encode(self, hidden_ND: Tensor, head: nn.Module, speech_tokens: Sequence[np.ndarray]) -> list[dict[str, bytes]]:
        checked_half(hidden_ND)
        log_probs_NV = head(hidden_ND).float().log_softmax(-1)
        kept_NK, ids_NK = log_probs_NV.topk(self.top_k, dim=-1)
        tail_N = log_probs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        ids = ids_NK.cpu().numpy().astype(np.uint16)
        codes = _log_prob_codes(kept_NK)
        # Sorted, so the difference to the next more probable one is small and cheap to store.
        codes[:, 1:] -= codes[:, :-1].copy()
        columns = {
            "ids_low": (ids & 255).astype(np.uint8),
            "ids_high": (ids >> 8).astype(np.uint8),
            "log_probs": codes,
            "tail": _log_prob_codes(tail_N)[:, None],
        }
        parts = {name: _split(values, speech_tokens) for name, values in columns.items()}
        # Rank by rank: bytes of one kind lie together.
        return [{name: parts[name][i].T.tobytes() for name in parts} for i in range(len(speech_tokens))]

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], speech_tokens: Sequence[np.ndarray], device: torch.device
    ) -> TopKTargets:
        joined = {
            name: np.concatenate(
                [part.reshape(-1, len(s) + 1).T for part, s in zip(columns[name], speech_tokens, strict=True)]
            )
            for name in self.columns
        }
        ids_NK = joined["ids_low"].astype(np.int64) | joined["ids_high"].astype(np.int64) << 8
        codes_NK = np.cumsum(joined["log_probs"], axis=1, dtype=np.uint8)
        return TopKTargets(
            to_device(ids_NK, device),
            to_device(_log_probs(codes_NK), device),
            to_device(_log_probs(joined["tail"][:, 0]), device),
        )


def format_settings(cache: CacheConfig) -> dict[str, Any]:
    """What of the configuration determines the bytes of a cache, for its manifest."""
    settings: dict[str, Any] = {"kind": cache.format}
    if cache.layers:
        settings["layers"] = list(cache.layers)
    if cache.format == "topk":
        settings["top_k"] = cache.top_k
    if cache.format == "hidden_quantized":
        settings["bits"] = cache.bits
    return settings


def row_format(
    settings: Mapping[str, Any], hidden_size: int, speech_size: int, quantizer: bytes | None = None
) -> RowFormat:
    """The format of a manifest's ``settings``; ``quantizer`` is the content of its file, if it has one.

    Raises:
        InputError: more classes than the head has, or a damaged quantizer.
    """
    if settings["kind"] == "hidden":
        return HiddenFormat(hidden_size, tuple(settings.get("layers", ())))
    if settings["kind"] == "topk":
        if not settings["top_k"] < speech_size <= 1 << 16:
            raise InputError(
                f"cache.top_k = {settings['top_k']} must be below the {speech_size} speech ids (at most 65,536)"
            )
        return TopKFormat(settings["top_k"], speech_size)
    assert quantizer is not None, "a quantized cache has a quantizer"
    return QuantizedHiddenFormat(read_quantizer(quantizer))


def checked_half(hidden_ND: Tensor) -> Tensor:
    """Rows in float16.

    Raises:
        InputError: a value that float16 cannot hold; such a teacher (or its precision) is broken.
    """
    half_ND = hidden_ND.half()
    if not torch.isfinite(half_ND).all():
        raise InputError(
            f"the teacher's hidden states reach {hidden_ND.abs().max().item():.3g}, beyond float16 (or are not finite)"
        )
    return half_ND


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array; pinned on the way to a GPU, so that the copy overlaps with computing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _pack(codes_NG: np.ndarray) -> bytes:
    """Dimension by dimension, one byte per code if all fit, else all low bytes and then all high bytes."""
    if codes_NG.min(initial=0) >= -128 and codes_NG.max(initial=0) <= 127:
        return codes_NG.astype(np.int8).T.tobytes()
    planes = codes_NG.astype("<i2").T.copy().view(np.uint8).reshape(-1, 2)
    return planes.T.tobytes()


def _unpack_into(codes_NG: np.ndarray, packed: np.ndarray) -> None:
    dimensions_first = codes_NG.shape[::-1]
    if packed.size == codes_NG.size:
        codes_NG[:] = packed.view(np.int8).reshape(dimensions_first).T
    else:
        low, high = packed.reshape(2, *dimensions_first).astype(np.uint16)
        codes_NG[:] = (low | high << 8).view(np.int16).T


def _log_prob_codes(log_probs: Tensor) -> np.ndarray:
    scaled = (log_probs.clamp(_LOWEST_LOG_PROB, 0) / _LOWEST_LOG_PROB).sqrt() * 255
    return scaled.round().to(torch.uint8).cpu().numpy()


def _log_probs(codes: np.ndarray) -> np.ndarray:
    return np.float32(_LOWEST_LOG_PROB) * np.square(codes.astype(np.float32) / np.float32(255))


def _split(values: np.ndarray, speech_tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Views of the rows of each utterance."""
    return np.split(values, np.cumsum([len(tokens) + 1 for tokens in speech_tokens])[:-1])
