"""What a user allows: which layers may be replaced, how many, and at which cost.

Dimension letters: L decoder layers. A layout is also a row of zeros and ones here, 1 = Mamba.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import comb

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.layouts.layout import Layout, num_attention_layers


@dataclass(frozen=True)
class LinearCost:
    """A cost that adds up over layers: ``all_attention + sum of change_L over the Mamba layers``.

    Cache bytes at a context length, decode FLOPs and parameters are all of this kind, whatever the layers' sizes.
    """

    name: str
    all_attention: float
    change_L: tuple[float, ...]

    @classmethod
    def from_function(cls, name: str, cost_of: Callable[[Layout], float], num_layers: int) -> LinearCost:
        """Read the per-layer changes off any function of a layout; refuses one that does not add up.

        Raises:
            InputError: the cost of the pure Mamba layout is not the sum of the single changes.
        """
        all_attention = float(cost_of(Layout.all_attention(num_layers)))
        change = [
            float(cost_of(Layout.from_attention_layers(set(range(num_layers)) - {i}, num_layers))) - all_attention
            for i in range(num_layers)
        ]
        pure_mamba = float(cost_of(Layout.all_mamba(num_layers)))
        if not np.isclose(all_attention + sum(change), pure_mamba, rtol=1e-9, atol=1e-9 * abs(all_attention)):
            raise InputError(f"cost {name} does not add up over layers, so no bound on it can be solved exactly")
        return cls(name, all_attention, tuple(change))

    def of(self, layout: Layout) -> float:
        return self.all_attention + sum(self.change_L[layer] for layer in layout.mamba_layers)


@dataclass(frozen=True)
class Constraints:
    """The layouts that a user accepts.

    Args:
        num_layers: decoder layers of the model.
        keep_attention: layers (0-based) that must not be replaced.
        always_mamba: layers that must be replaced.
        min_attention, max_attention: bounds, both included, on the number of attention layers.
        cost, max_cost: an upper bound on an additive cost.

    Raises:
        InputError: no layout meets them; the sentence names the first contradiction.
    """

    num_layers: int
    keep_attention: tuple[int, ...] = ()
    always_mamba: tuple[int, ...] = ()
    min_attention: int = 0
    max_attention: int | None = None
    cost: LinearCost | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for name, layers in (("keep_attention", self.keep_attention), ("always_mamba", self.always_mamba)):
            for layer in layers:
                if not 0 <= layer < self.num_layers:
                    raise InputError(f"{name} names layer {layer}, but layers go from 0 to {self.num_layers - 1}")
        both = sorted(set(self.keep_attention) & set(self.always_mamba))
        if both:
            raise InputError(f"layer {both[0]} cannot both keep attention and always be Mamba")
        if not self.attention_counts:
            wanted = f"{self.min_attention} to {self.num_layers if self.max_attention is None else self.max_attention}"
            raise InputError(
                f"no layout has {wanted} attention layers of {self.num_layers} while {len(set(self.keep_attention))}"
                f" must keep attention and {len(set(self.always_mamba))} must be Mamba"
            )
        if self.max_cost is not None:
            if self.cost is None:
                raise InputError("max_cost needs the cost that it bounds")
            cheapest = self._smallest_cost(self.cost)
            if cheapest > self.max_cost:
                raise InputError(
                    f"no layout meets {self.cost.name} <= {self.max_cost:g}: the cheapest allowed one has {cheapest:g}"
                )

    @classmethod
    def from_ratio(
        cls, num_layers: int, ratio: str, keep_attention: Iterable[int] = (), always_mamba: Iterable[int] = ()
    ) -> Constraints:
        """Exactly the attention layers that ``ratio`` ("1:3" = 1 attention to 3 Mamba) leaves."""
        kept = num_attention_layers(num_layers, ratio)
        return cls(num_layers, tuple(keep_attention), tuple(always_mamba), kept, kept)

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Layers that may be either."""
        fixed = {*self.keep_attention, *self.always_mamba}
        return tuple(layer for layer in range(self.num_layers) if layer not in fixed)

    @property
    def attention_counts(self) -> range:
        """Possible numbers of attention layers (before the cost bound)."""
        most = self.num_layers if self.max_attention is None else self.max_attention
        most = min(most, self.num_layers - len(set(self.always_mamba)))
        return range(max(self.min_attention, len(set(self.keep_attention))), most + 1)

    @property
    def num_layouts(self) -> int:
        """How many layouts there are before the cost bound."""
        kept, free = len(set(self.keep_attention)), len(self.free_layers)
        return sum(comb(free, count - kept) for count in self.attention_counts)

    def allows(self, layout: Layout) -> bool:
        """Whether ``layout`` meets all of them; a layout of another length is an :class:`InputError`."""
        if layout.num_layers != self.num_layers:
            raise InputError(f"layout {layout} has {layout.num_layers} layers, the model has {self.num_layers}")
        return (
            layout.num_attention in self.attention_counts
            and set(self.keep_attention) <= set(layout.attention_layers)
            and set(self.always_mamba) <= set(layout.mamba_layers)
            and (self.max_cost is None or self.cost is None or self.cost.of(layout) <= self.max_cost)
        )

    def _smallest_cost(self, cost: LinearCost) -> float:
        fixed = cost.all_attention + sum(cost.change_L[layer] for layer in set(self.always_mamba))
        saving_first = sorted(cost.change_L[layer] for layer in self.free_layers)
        sums = np.concatenate([[0.0], np.cumsum(saving_first)])
        always = len(set(self.always_mamba))
        return fixed + min(float(sums[self.num_layers - count - always]) for count in self.attention_counts)


def layouts_to_matrix(layouts: Iterable[Layout], num_layers: int) -> np.ndarray:
    """Float rows (B, L), 1 = Mamba; a layout of another length is an :class:`InputError`."""
    rows = []
    for layout in layouts:
        if layout.num_layers != num_layers:
            raise InputError(f"layout {layout} has {layout.num_layers} layers, the model has {num_layers}")
        mamba = set(layout.mamba_layers)
        rows.append([layer in mamba for layer in range(num_layers)])
    return np.array(rows, dtype=np.float64).reshape(len(rows), num_layers)


def layout_from_row(mamba_L: np.ndarray) -> Layout:
    """The layout of a row of zeros and ones (1 = Mamba)."""
    return Layout.from_attention_layers(np.flatnonzero(np.asarray(mamba_L) == 0).tolist(), len(mamba_L))


def sample_layouts(
    constraints: Constraints, count: int, rng: np.random.Generator, exclude: Collection[Layout] = ()
) -> list[Layout]:
    """Up to ``count`` new allowed layouts: uniform in the number of attention layers, then in the placement.

    Coin flips per layer would nearly never visit the extreme ratios. Fewer than ``count`` come back only when
    (nearly) no others are left.
    """
    kept, free = sorted(set(constraints.keep_attention)), constraints.free_layers
    counts = list(constraints.attention_counts)
    seen, misses = set(exclude), 0
    found: list[Layout] = []
    while len(found) < count and misses < 200 + 20 * count:
        num_attention = counts[rng.integers(len(counts))]
        chosen = rng.choice(len(free), size=num_attention - len(kept), replace=False)
        layout = Layout.from_attention_layers([*kept, *(free[index] for index in chosen)], constraints.num_layers)
        if layout in seen or not constraints.allows(layout):
            misses += 1
            continue
        seen.add(layout)
        found.append(layout)
    return found
