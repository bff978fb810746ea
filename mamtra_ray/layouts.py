"""Layouts: which decoder layers keep attention and which get a Mamba mixer (paper, section 2.2 and Table 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mamtra_ray.errors import InputError, nearest_name

PATTERNS = ("block_beginning", "block_end", "front", "middle", "back", "sandwich")
"""The paper's strategies that need nothing but the number of layers and the ratio."""
STRATEGIES = (*PATTERNS, "importance")


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

    @property
    def num_layers(self) -> int:
        return len(self.letters)

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
        attention, mamba = self.letters.count("A"), self.letters.count("M")
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


def from_strategy(name: str, num_layers: int, ratio: str, importance: Sequence[float] | None = None) -> Layout:
    """The paper's placement strategies (Table 1).

    The name says where the *attention* goes. The paper shows front, middle and back only as a drawing, which
    does not survive in its text. We read them like BlockBeginning and BlockEnd, whose kept layers are known
    (BlockBeginning 1:1 keeps 0, 2, ..., 22): in Fig. 4 every usable configuration keeps layer 0 as attention
    and Front is by far the best contiguous one at 1:1 (34.7 % WER, against 118.5 for Middle and 114.7 for
    Back), which fits attention at the front and contradicts Mamba there.

    - ``block_beginning`` / ``block_end``: the first / last layers of every repeating block.
    - ``front`` / ``middle`` / ``back``: one contiguous block of attention.
    - ``sandwich``: half of the attention at the front, half at the back (the front gets the odd one).
    - ``importance``: the layers with the highest ``importance`` (ties: the earlier layer).

    Args:
        name: one of :data:`STRATEGIES`.
        num_layers: decoder layers.
        ratio: attention to Mamba, e.g. ``"1:3"``.
        importance: one score per layer, higher = more important; only for ``importance``.

    Raises:
        InputError: unknown name, a ratio that does not fit, missing or misplaced ``importance``.
    """
    if name not in STRATEGIES:
        raise InputError(f"unknown strategy {name!r}: {nearest_name(name, STRATEGIES)}")
    kept = num_attention_layers(num_layers, ratio)
    if name == "importance":
        if importance is None or len(importance) != num_layers:
            given = "none" if importance is None else str(len(importance))
            raise InputError(f"strategy 'importance' needs one score per layer ({num_layers}), got {given}")
        ranked = sorted(range(num_layers), key=lambda layer: (-importance[layer], layer))
        return Layout.from_attention_layers(ranked[:kept], num_layers)
    attention_per_block, mamba_per_block = parse_ratio(ratio)
    block = attention_per_block + mamba_per_block
    first_of_middle = (num_layers - kept) // 2
    layers = {
        "block_beginning": [i for i in range(num_layers) if i % block < attention_per_block],
        "block_end": [i for i in range(num_layers) if i % block >= mamba_per_block],
        "front": range(kept),
        "middle": range(first_of_middle, first_of_middle + kept),
        "back": range(num_layers - kept, num_layers),
        "sandwich": [*range(kept - kept // 2), *range(num_layers - kept // 2, num_layers)],
    }
    return Layout.from_attention_layers(layers[name], num_layers)


def parse_ratio(ratio: str) -> tuple[int, int]:
    """``"1:3"`` -> (1, 3), attention and Mamba; raises :class:`InputError` for anything else."""
    attention, separator, mamba = str(ratio).partition(":")
    if not (separator and attention.isdigit() and mamba.isdigit() and int(attention) + int(mamba) > 0):
        raise InputError(f"a ratio is attention:mamba in whole numbers, such as 1:3, not {ratio!r}")
    return int(attention), int(mamba)
