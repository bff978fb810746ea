"""The shape of a hybrid decoder: everything needed to build it but the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.models.mamba import MixerConfig, StateSharing
from mamtra_ray.models.rope import Rope

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
    "conv_kernel",
    "chunk_size",
)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder, checked when made.

    Attributes:
        layout: attention and Mamba layers; all attention for a teacher.
        vocab_size: rows of the (unified) embedding table.
        rms_norm_eps: of every RMSNorm.
        rope_parameters: transformers' ``rope_parameters`` (``rope_type``, ``rope_theta`` and scaling).
        max_position_embeddings: longest sequence of the pretraining, in positions.
        qkv_bias: q, k and v projections have biases (Qwen2).
        o_bias: so has the attention's output projection.
        qk_norm: every query and key head is normalized before it is rotated (Qwen3).
        state_sharing: whether query heads share a Mamba state, see :class:`~mamtra_ray.models.mamba.MixerConfig`.

    Raises:
        InputError: a value of another type, a size that is not positive, heads that do not divide, unknown RoPE.
    """

    layout: Layout
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    max_position_embeddings: int
    qkv_bias: bool
    o_bias: bool = False
    state_sharing: StateSharing = "per_query_head"
    conv_kernel: int = 4
    chunk_size: int = 32
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise InputError(f"the model config is not valid: {name} = {value!r} is no positive whole number")
        eps = self.rms_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise InputError(f"the model config is not valid: rms_norm_eps = {eps!r} is no positive number")
        for name in ("qkv_bias", "o_bias", "qk_norm"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"the model config is not valid: {name} = {value!r} is neither true nor false")
        try:
            self.mixer  # noqa: B018 (checks how heads and states fit)
            self.rope  # noqa: B018
        except (InputError, ValueError) as error:
            raise InputError(f"the model config is not valid: {error}") from None

    @property
    def num_layers(self) -> int:
        return self.layout.num_layers

    @property
    def rope(self) -> Rope:
        """The rotary embeddings of every attention layer."""
        return Rope(self.rope_parameters, self.head_dim, self.max_position_embeddings)

    @property
    def mixer(self) -> MixerConfig:
        """The shape of every Mamba mixer of this decoder."""
        return MixerConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            conv_kernel=self.conv_kernel,
            state_sharing=self.state_sharing,
            norm_eps=self.rms_norm_eps,
            chunk_size=self.chunk_size,
            out_bias=self.o_bias,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the layout becomes its letters."""
        content = dataclasses.asdict(self) | {
            "layout": str(self.layout),
            "rope_parameters": dict(self.rope_parameters),
        }
        if not self.qk_norm:
            # Younger than files and fingerprints of models without it, which stay as they are.
            del content["qk_norm"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of :meth:`to_dict`; raises :class:`InputError` for keys missing, unknown or not valid."""
        known = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        for problem, keys in (("lacks", required - set(content)), ("has the unknown key", set(content) - known)):
            if keys:
                raise InputError(f"the model config {problem} {', '.join(sorted(keys))}")
        if not isinstance(content["layout"], str):
            raise InputError(f"the model config is not valid: layout = {content['layout']!r} is no text of A and M")
        return cls(**{**content, "layout": Layout.from_string(content["layout"])})
