"""A layout: which decoder layers keep attention and which get a Mamba mixer (paper, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mamtra_ray.errors import InputError


@dataclass(frozen=True, order=True)
class Layout:
    """One letter per decoder layer, first layer first: ``A`` attention, ``M`` Mamba mixer."""

    letters: str

    def __post_init__(self) -> None:
        if not self.letters or set(self.letters) - {"A", "M"}:
            raise InputError(f"a layout is a non-empty string of A (attention) and M (mamba), not {self.letters!r}")

    def __str__(self) -> str:
        return self.letters

    @classmethod
    def from_string(cls, letters: str) -> Layout:
        """``Layout.from_string("AMAM")``; raises :class:`InputError` for any other letter."""
        return cls(letters)

    @classmethod
    def from_attention_layers(cls, attention_layers: Iterable[int], num_layers: int) -> Layout:
        """The layout whose 0-based ``attention_layers`` keep attention; all others are Mamba."""
        kept = set(attention_layers)
        outside = sorted(layer for layer in kept if not 0 <= layer < num_layers)
        if outside:
            raise InputError(f"layer {outside[0]} does not exist: layers go from 0 to {num_layers - 1}")
        return cls("".join("A" if layer in kept else "M" for layer in range(num_layers)))

    @classmethod
    def all_attention(cls, num_layers: int) -> Layout:
        """The teacher's own layout."""
        return cls("A" * num_layers)

    @classmethod
    def all_mamba(cls, num_layers: int) -> Layout:
        """Every layer replaced."""
        return cls("M" * num_layers)

    @classmethod
    def attention_first(cls, num_attention: int, num_layers: int) -> Layout:
        """Some layout of ``num_attention``, for what depends on that number only, such as costs."""
        return cls.from_attention_layers(range(num_attention), num_layers)

    @property
    def num_layers(self) -> int:
        return len(self.letters)

    @property
    def num_attention(self) -> int:
        """How many layers keep attention."""
        return self.letters.count("A")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """0-based indices of the layers that keep attention."""
        return tuple(layer for layer, letter in enumerate(self.letters) if letter == "A")

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """0-based indices of the layers with a Mamba mixer."""
        return tuple(layer for layer, letter in enumerate(self.letters) if letter == "M")

    @property
    def ratio(self) -> str:
        """Attention to Mamba in lowest terms: ``1:3``; ``1:0`` is the teacher, ``0:1`` pure Mamba."""
        attention, mamba = self.num_attention, self.num_layers - self.num_attention
        divisor = math.gcd(attention, mamba)
        return f"{attention // divisor}:{mamba // divisor}"


def num_attention_layers(num_layers: int, ratio: str) -> int:
    """How many of ``num_layers`` keep attention at ``ratio`` ("1:3" = 1 attention to 3 Mamba).

    Raises:
        InputError: the ratio is malformed, or ``num_layers`` cannot be divided that way.
    """
    attention, mamba = parse_ratio(ratio)
    if num_layers % (attention + mamba):
        possible = [f"1:{n}" for n in range(1, num_layers) if num_layers % (1 + n) == 0]
        raise InputError(
            f"ratio {ratio} does not fit {num_layers} layers: {attention + mamba} must divide {num_layers}"
            f" (for example {', '.join(possible) or '1:0'})"
        )
    return num_layers // (attention + mamba) * attention


def parse_ratio(ratio: str) -> tuple[int, int]:
    """``"1:3"`` -> (1, 3), attention and Mamba; raises :class:`InputError` for anything else."""
    attention, separator, mamba = str(ratio).partition(":")
    digits = f"{attention}{mamba}".isascii() and attention.isdigit() and mamba.isdigit()
    if not (separator and digits and int(attention) + int(mamba) > 0):
        raise InputError(f"a ratio is attention:mamba in whole numbers, such as 1:3, not {ratio!r}")
    return int(attention), int(mamba)
