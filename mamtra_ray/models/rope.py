"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the rescalings that Qwen2 and Llama checkpoints use.

Frequencies and angles follow transformers' ``modeling_rope_utils`` operation by operation, so that they are equal bit
for bit: a position is multiplied with a frequency thousands of times, and roundings there grow. The angles are
computed in float32 whatever the model's type is, and only cosine and sine are rounded to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamtra_ray.errors import InputError, nearest_name

_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # transformers' Qwen2 and Llama read no partial_rotary_factor with the default type: they rotate the whole head.
    "default": ((), ("partial_rotary_factor",)),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Keys of ``rope_parameters`` beside rope_type and rope_theta: those that a type needs, those that it may have."""


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings of one model.

    Attributes:
        parameters: transformers' ``rope_parameters``: ``rope_type``, ``rope_theta`` and the type's own.
        head_dim: P, even.
        max_position_embeddings: from where on the type ``dynamic`` stretches.

    Raises:
        InputError: an unknown type, or a key that is missing, unknown or no positive number.
    """

    parameters: Mapping[str, Any]
    head_dim: int
    max_position_embeddings: int

    def __post_init__(self) -> None:
        _check(self.parameters, self.head_dim)

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's angles change with the length of its sequence, beyond ``max_position_embeddings``."""
        return self.parameters["rope_type"] == "dynamic"

    def cos_sin(self, position_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, P] of every position's angles, both halves of a head alike."""
        length = int(position_BL.max()) + 1 if self.depends_on_length else None
        frequency_F, scale = self.frequencies(length)
        angle_BLF = position_BL[..., None].float() * frequency_F.to(position_BL.device, non_blocking=True)
        angle_BLP = torch.cat([angle_BLF, angle_BLF], -1)
        return (angle_BLP.cos() * scale).to(dtype), (angle_BLP.sin() * scale).to(dtype)

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        """The P / 2 angles (float32) that one position adds, and what cosine and sine are multiplied with.

        Only ``dynamic`` depends on the sequence's ``length``. It gives every position of a longer sequence other
        angles, so with it, beyond ``max_position_embeddings``, decoding with a cache is no longer a full forward pass.
        """
        kind, base = self.parameters["rope_type"], self.parameters["rope_theta"]
        if kind == "yarn":
            return _yarn(self.parameters, self.head_dim)
        if kind == "dynamic":
            longest, factor, P = self.max_position_embeddings, self.parameters["factor"], self.head_dim
            # A tensor, because transformers computes the stretched base in float32.
            reached = torch.tensor(length, device="cpu") if length is not None and length > longest else longest
            base = base * ((factor * reached / longest) - (factor - 1)) ** (P / (P - 2))
        frequency_F = 1.0 / _wave_numbers(base, self.head_dim)
        if kind == "linear":
            frequency_F /= self.parameters["factor"]
        if kind == "llama3":
            frequency_F = _llama3(self.parameters, frequency_F)
        return frequency_F, 1.0


def rotate(x_BHLP: Tensor, cos_BLP: Tensor, sin_BLP: Tensor) -> Tensor:
    """Turn every head by its position's angles; element i of a head is paired with element i + P / 2."""
    first, second = x_BHLP.chunk(2, -1)
    return x_BHLP * cos_BLP[:, None] + torch.cat([-second, first], -1) * sin_BLP[:, None]


def _wave_numbers(base: float | Tensor, head_dim: int) -> Tensor:
    # On the CPU also while a model is built on the meta device.
    exponent_F = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return base**exponent_F


def _llama3(parameters: Mapping[str, Any], frequency_F: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed down by ``factor``, short ones kept, those in between blended."""
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = parameters["original_max_position_embeddings"]
    wavelength_F = 2 * math.pi / frequency_F
    slowed_F = torch.where(wavelength_F > context / low, frequency_F / factor, frequency_F)
    share_F = (context / wavelength_F - low) / (high - low)
    blended_F = (1 - share_F) * slowed_F / factor + share_F * slowed_F
    between_F = ~(wavelength_F < context / high) * ~(wavelength_F > context / low)
    return torch.where(between_F, blended_F, slowed_F)


def _yarn(parameters: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): waves that turn often within the old context are kept, slow ones interpolated."""
    factor, base = parameters["factor"], parameters["rope_theta"]
    context = parameters["original_max_position_embeddings"]

    def index_of(rotations: float) -> float:
        return (head_dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = index_of(parameters.get("beta_fast") or 32), index_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp_F = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    kept_F = 1 - ramp_F
    wave_F = _wave_numbers(base, head_dim)
    frequency_F = 1.0 / (factor * wave_F) * (1 - kept_F) + 1.0 / wave_F * kept_F
    scale = parameters.get("attention_factor")
    if scale is None:
        both = [parameters.get(name) for name in ("mscale", "mscale_all_dim")]
        scale = _yarn_scale(factor, both[0]) / _yarn_scale(factor, both[1]) if all(both) else _yarn_scale(factor)
    return frequency_F, float(scale)


def _yarn_scale(factor: float, weight: float | None = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * (weight or 1.0) * math.log(factor) + 1.0


def _check(parameters: Mapping[str, Any], head_dim: int) -> None:
    if not isinstance(parameters, Mapping):
        raise InputError(f"rope_parameters must be a mapping with rope_type and rope_theta, not {parameters!r}")
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise InputError(f"RoPE type {kind!r} is not supported: {nearest_name(str(kind), _KEYS)}")
    needed, optional = _KEYS[kind]
    known = {"rope_type", "rope_theta", *needed, *optional}
    for problem, keys in (
        ("lacks", {"rope_theta", *needed} - set(parameters)),
        ("has the unknown key", set(parameters) - known),
    ):
        if keys:
            raise InputError(f"rope_parameters of type {kind!r} {problem} {', '.join(sorted(map(str, keys)))}")
    for key, value in parameters.items():
        if key in ("rope_type", "truncate") or (value is None and key in optional):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"rope_parameters: {key} = {value!r} is no positive number")
    if not isinstance(parameters.get("truncate", True), bool):
        raise InputError(f"rope_parameters: truncate = {parameters['truncate']!r} must be true or false")
    if kind == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise InputError("rope_parameters: low_freq_factor must be below high_freq_factor")
    smallest = 4 if kind == "dynamic" else 2
    if head_dim % 2 or head_dim < smallest:
        raise InputError(f"RoPE of type {kind!r} needs an even head dim of at least {smallest}, not {head_dim}")
