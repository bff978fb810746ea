"""A score of layouts with a term per layer and per pair of layers.

Dimension letters: L decoder layers, B layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints


@dataclass(frozen=True)
class Quadratic:
    """``f(x) = constant + linear_L . x + sum over i < j of pairs_LL[i, j] x_i x_j``, x_i = 1 for Mamba.

    ``pairs_LL`` is strictly upper triangular.
    """

    constant: float
    linear_L: np.ndarray
    pairs_LL: np.ndarray

    @property
    def num_layers(self) -> int:
        return len(self.linear_L)

    def __call__(self, mamba_BL: np.ndarray) -> np.ndarray:
        """Values (B,) of rows (B, L) of zeros and ones."""
        return self.constant + mamba_BL @ self.linear_L + np.einsum("bi,bi->b", mamba_BL @ self.pairs_LL, mamba_BL)

    def plus(self, change_L: np.ndarray, weight: float) -> Quadratic:
        """With ``weight * change_L`` added per Mamba layer: a weighted trade-off against an additive cost."""
        return Quadratic(self.constant, self.linear_L + weight * np.asarray(change_L), self.pairs_LL)


@dataclass(frozen=True)
class Optimum:
    """A layout, its value, and a proven lower bound of every allowed layout of the same number of attention layers.

    ``bound == value`` means proven optimal (for the second best and later ones of an exact enumeration the bound
    is their own value too: nothing between them was left out).
    """

    layout: Layout
    value: float
    bound: float

    @property
    def gap(self) -> float:
        return self.value - self.bound


def fix_layers(
    quadratic: Quadratic, constraints: Constraints, free: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The same function of the free layers only."""
    one = np.array(sorted(set(constraints.always_mamba)), dtype=int)
    both = quadratic.pairs_LL + quadratic.pairs_LL.T
    constant = quadratic.constant + quadratic.linear_L[one].sum() + quadratic.pairs_LL[np.ix_(one, one)].sum()
    linear = quadratic.linear_L[free] + both[np.ix_(free, one)].sum(axis=1)
    return float(constant), linear, quadratic.pairs_LL[np.ix_(free, free)]
