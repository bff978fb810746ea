"""How a teacher's rows are stored: its final hidden states in fp16 or quantised, or its top-k probabilities.

Final hidden states serve every loss, because the frozen head turns them into the teacher's exact logits. A
format encodes the rows of an utterance into one or more raw byte columns and decodes those of a whole batch
into loss targets. No Ray here.

Tensor letters: N labelled positions, D width, K kept classes, V speech vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from mamtra_ray.config import CacheConfig
from mamtra_ray.errors import InputError
from mamtra_ray.losses import HiddenTargets, TopKTargets

QUANTIZER_FILE = "quantizer.safetensors"
# Dimensions whose codes lie in one column: neighbours in variance, so one entropy coder's table suits them.
_GROUP = 16
# Calibration looks at no more rows than this.
CALIBRATION_ROWS = 20_000


class RowFormat(Protocol):
    """What :mod:`mamtra_ray.teacher_cache` writes and :mod:`mamtra_ray.shared_batches` reads."""

    columns: tuple[str, ...]
    """Byte columns of an utterance."""
    compression: str
    """Parquet's codec."""

    def encode(self, hidden_ND: Tensor, head: nn.Module, counts: Sequence[int]) -> list[dict[str, bytes]]:
        """Rows of several utterances, ``counts`` positions each, into their byte columns."""

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], counts: Sequence[int], device: torch.device
    ) -> HiddenTargets | TopKTargets:
        """Byte columns of several utterances (uint8 arrays) into loss targets on ``device``, in the same order."""


@dataclass(frozen=True)
class HiddenFormat:
    """Final hidden states in float16: 2 D bytes a position."""

    hidden_size: int
    columns: ClassVar[tuple[str, ...]] = ("hidden",)
    compression: ClassVar[str] = "none"

    def encode(self, hidden_ND: Tensor, head: nn.Module, counts: Sequence[int]) -> list[dict[str, bytes]]:
        hidden = checked_half(hidden_ND).cpu().numpy()
        return [{"hidden": part.tobytes()} for part in _split(hidden, counts)]

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], counts: Sequence[int], device: torch.device
    ) -> HiddenTargets:
        joined = np.concatenate(columns["hidden"]).view(np.float16)
        return HiddenTargets(_to_device(joined.reshape(sum(counts), self.hidden_size), device))


@dataclass(frozen=True)
class QuantizedHiddenFormat:
    """Final hidden states as integer codes: PCA basis, one uniform step, entropy coded by Parquet's zstd.

    With one step for all dimensions of a decorrelated vector the squared error is the same everywhere and each
    dimension costs what its variance demands (reverse water-filling), which is what an entropy coder then
    collects. Codes of a group of dimensions take one byte each, or two in an utterance where one does not fit.

    Attributes:
        basis_DD: orthonormal columns, by falling variance.
        mean_D: subtracted first.
        step: distance of neighbouring code points, in the units of the hidden states.
    """

    basis_DD: Tensor
    mean_D: Tensor
    step: float
    compression: ClassVar[str] = "zstd"

    @property
    def hidden_size(self) -> int:
        return len(self.mean_D)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"codes_{start:04}" for start in range(0, self.hidden_size, _GROUP))

    def codes(self, hidden_ND: Tensor) -> Tensor:
        """Codes of rows, int16 (N, D)."""
        centred_ND = hidden_ND.float() - self.mean_D.to(hidden_ND.device)
        return (centred_ND @ (self.basis_DD.to(hidden_ND.device) / self.step)).round().clamp(-32767, 32767).short()

    def reconstruct(self, codes_ND: Tensor) -> Tensor:
        """Rows of codes, float32 (N, D)."""
        basis_DD, mean_D = self.basis_DD.to(codes_ND.device), self.mean_D.to(codes_ND.device)
        return torch.addmm(mean_D, codes_ND.float(), basis_DD.T, alpha=self.step)

    def encode(self, hidden_ND: Tensor, head: nn.Module, counts: Sequence[int]) -> list[dict[str, bytes]]:
        checked_half(hidden_ND)
        codes = self.codes(hidden_ND).cpu().numpy()
        return [
            {name: _pack(part[:, i * _GROUP : (i + 1) * _GROUP]) for i, name in enumerate(self.columns)}
            for part in _split(codes, counts)
        ]

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], counts: Sequence[int], device: torch.device
    ) -> HiddenTargets:
        codes_ND = np.empty((sum(counts), self.hidden_size), np.int16)
        for i, name in enumerate(self.columns):
            group_NG = codes_ND[:, i * _GROUP : (i + 1) * _GROUP]
            for part, packed in zip(np.split(group_NG, np.cumsum(counts)[:-1]), columns[name], strict=True):
                _unpack_into(part, packed)
        return HiddenTargets(self.reconstruct(_to_device(codes_ND, device)))


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

    def encode(self, hidden_ND: Tensor, head: nn.Module, counts: Sequence[int]) -> list[dict[str, bytes]]:
        log_probs_NV = head(hidden_ND).float().log_softmax(-1)
        kept_NK, ids_NK = log_probs_NV.topk(self.top_k, dim=-1)
        tail_N = log_probs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        ids = ids_NK.cpu().numpy().astype(np.uint16)
        codes = _log_prob_codes(kept_NK)
        # Sorted, so the difference to the next more probable one is small and cheap to store.
        codes[:, 1:] -= codes[:, :-1].copy()
        tail = _log_prob_codes(tail_N)
        planes = {"ids_low": (ids & 255).astype(np.uint8), "ids_high": (ids >> 8).astype(np.uint8)}
        columns = {**planes, "log_probs": codes, "tail": tail[:, None]}
        parts = {name: _split(values, counts) for name, values in columns.items()}
        # Rank by rank: bytes of one kind lie together.
        return [{name: parts[name][i].T.tobytes() for name in parts} for i in range(len(counts))]

    def decode(
        self, columns: Mapping[str, Sequence[np.ndarray]], counts: Sequence[int], device: torch.device
    ) -> TopKTargets:
        joined = {
            name: np.concatenate([part.reshape(-1, n).T for part, n in zip(columns[name], counts, strict=True)])
            for name in self.columns
        }
        ids_NK = joined["ids_low"].astype(np.int64) | joined["ids_high"].astype(np.int64) << 8
        codes_NK = np.cumsum(joined["log_probs"], axis=1, dtype=np.uint8)
        return TopKTargets(
            _to_device(ids_NK, device),
            _to_device(_log_probs(codes_NK), device),
            _to_device(_log_probs(joined["tail"][:, 0]), device),
        )


def format_settings(cache: CacheConfig) -> dict[str, Any]:
    """What of the configuration determines the bytes of a cache, for its manifest."""
    settings: dict[str, Any] = {"kind": cache.format}
    if cache.format == "topk":
        settings["top_k"] = cache.top_k
    if cache.format == "hidden_quantized":
        settings["bits"] = cache.bits
    return settings


def row_format(
    settings: Mapping[str, Any], hidden_size: int, speech_size: int, quantizer: bytes | None = None
) -> RowFormat:
    """The format of a manifest's ``settings``; ``quantizer`` is the content of :data:`QUANTIZER_FILE`.

    Raises:
        InputError: more classes than the head has, or a damaged quantizer.
    """
    if settings["kind"] == "hidden":
        return HiddenFormat(hidden_size)
    if settings["kind"] == "topk":
        if not settings["top_k"] < speech_size <= 1 << 16:
            raise InputError(
                f"cache.top_k = {settings['top_k']} must be below the {speech_size} speech ids (at most 65,536)"
            )
        return TopKFormat(settings["top_k"], speech_size)
    assert quantizer is not None, "a quantised cache has a quantizer"
    return read_quantizer(quantizer)


def calibrate(hidden_ND: Tensor, bits: float) -> QuantizedHiddenFormat:
    """The quantiser whose codes have an entropy of ``bits`` a dimension on these rows.

    Args:
        hidden_ND: rows of the teacher, at least a few times D of them.
        bits: mean over the dimensions of the entropy of a dimension's codes.
    """
    if len(hidden_ND) < 2 * hidden_ND.shape[1]:
        raise InputError(
            f"quantising {hidden_ND.shape[1]} dimensions needs at least {2 * hidden_ND.shape[1]} positions to learn "
            f"from, the training split has {len(hidden_ND)}: use cache.format=hidden"
        )
    rows_ND = hidden_ND.double().cpu()
    mean_D = rows_ND.mean(0)
    _, basis_DD = torch.linalg.eigh((rows_ND - mean_D).T @ (rows_ND - mean_D))
    basis_DD = basis_DD.flip(1)
    # An eigenvector's sign is arbitrary; fixed, so that a repeated calibration gives the same bytes.
    basis_DD = basis_DD * basis_DD.gather(0, basis_DD.abs().argmax(0, keepdim=True)).sign()
    coefficients_ND = ((rows_ND - mean_D) @ basis_DD).numpy()
    high = float(np.abs(coefficients_ND).max())
    low = 1e-6 * high
    for _ in range(30):
        step = float(np.sqrt(low * high))
        if _entropy(np.rint(coefficients_ND / step).astype(np.int64)) > bits:
            low = step
        else:
            high = step
    return QuantizedHiddenFormat(basis_DD.float(), mean_D.float(), high)


def quantizer_bytes(quantizer: QuantizedHiddenFormat) -> bytes:
    """Content of :data:`QUANTIZER_FILE`."""
    tensors = {
        "basis": quantizer.basis_DD.contiguous(),
        "mean": quantizer.mean_D.contiguous(),
        "step": torch.tensor(quantizer.step, dtype=torch.float64),
    }
    return save_safetensors(tensors)


def read_quantizer(content: bytes) -> QuantizedHiddenFormat:
    """The quantiser of :func:`quantizer_bytes`."""
    try:
        tensors = load_safetensors(content)
        return QuantizedHiddenFormat(tensors["basis"], tensors["mean"], tensors["step"].item())
    except Exception as error:  # safetensors raises its own exception type for every kind of damage
        raise InputError(f"{QUANTIZER_FILE} of the teacher cache is damaged: {error}") from None


def checked_half(hidden_ND: Tensor) -> Tensor:
    """Rows in float16.

    Raises:
        InputError: a value float16 cannot hold; such a teacher (or its precision) is broken.
    """
    half_ND = hidden_ND.half()
    if not torch.isfinite(half_ND).all():
        raise InputError(
            f"the teacher's hidden states reach {hidden_ND.abs().max().item():.3g}, beyond float16 (or are not finite)"
        )
    return half_ND


def _entropy(codes_ND: np.ndarray) -> float:
    """Mean over dimensions of the empirical entropy, bits."""
    bits = 0.0
    for column in codes_ND.T:
        counts = np.unique(column, return_counts=True)[1] / len(column)
        bits -= float((counts * np.log2(counts)).sum())
    return bits / codes_ND.shape[1]


def _pack(codes_NG: np.ndarray) -> bytes:
    """Dimension by dimension, one byte a code if all fit, else all low bytes and then all high bytes."""
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


# 8 bits for log-probabilities down to -16 nats (1e-7), finer near 0 where an error moves more probability.
_LOWEST_LOG_PROB = -16.0


def _log_prob_codes(log_probs: Tensor) -> np.ndarray:
    scaled = (log_probs.clamp(_LOWEST_LOG_PROB, 0) / _LOWEST_LOG_PROB).sqrt() * 255
    return scaled.round().to(torch.uint8).cpu().numpy()


def _log_probs(codes: np.ndarray) -> np.ndarray:
    return np.float32(_LOWEST_LOG_PROB) * np.square(codes.astype(np.float32) / np.float32(255))


def _split(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(counts)[:-1])


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    # Pinned memory lets the copy to a GPU overlap with the step before.
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
