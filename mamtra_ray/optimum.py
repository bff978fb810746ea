"""The best layouts under a quadratic score: exact by enumeration, or with a stated gap by HiGHS.

Dimension letters: L decoder layers, H and W the halves into which the free layers are split, K layouts kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from mamtra_ray.constraints import Constraints, layout_from_row
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout

# Enumeration visits about 2e8 layouts a second on one core; beyond this HiGHS takes over.
ENUMERATION_LIMIT = 2**28
# Rows of one half that are held at once (with 24 layers a half has 4,096).
_HALF_LIMIT = 2**20
_BLOCK_BYTES = 16 * 2**20


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


def best_layouts(
    quadratic: Quadratic, constraints: Constraints, count: int = 1, time_limit: float = 30.0
) -> dict[int, list[Optimum]]:
    """The ``count`` best layouts of every allowed number of attention layers, best first.

    Exact where enumeration is possible (all layouts up to 28 layers, extreme budgets of larger models); otherwise
    one HiGHS run of at most ``time_limit`` seconds for each budget returns one layout with its proven gap.

    Returns:
        number of attention layers -> optima. Budgets that a cost bound empties are left out.
    """
    if _can_enumerate(constraints):
        return enumerate_layouts(quadratic, constraints, count)
    result: dict[int, list[Optimum]] = {}
    for budget in constraints.attention_counts:
        try:
            single = replace(constraints, min_attention=budget, max_attention=budget)
        except InputError:
            continue  # the cost bound leaves no layout of this budget
        if _can_enumerate(single):
            result |= enumerate_layouts(quadratic, single, count)
        else:
            optimum = solve_with_milp(quadratic, single, budget, time_limit)
            result |= {budget: [optimum]} if optimum else {}
    return result


def enumerate_layouts(quadratic: Quadratic, constraints: Constraints, count: int = 1) -> dict[int, list[Optimum]]:
    """Every allowed layout, in blocks: the free layers are split into two halves whose rows are sorted by their
    number of Mamba layers, so a block is one matrix product and a budget is a contiguous slice of its columns."""
    free = np.array(constraints.free_layers, dtype=int)
    constant, linear, pairs = _fix_layers(quadratic, constraints, free)
    always = len(set(constraints.always_mamba))
    mamba_counts = [constraints.num_layers - budget - always for budget in constraints.attention_counts]
    fewest, most = min(mamba_counts), max(mamba_counts)
    split = len(free) // 2
    rows_H, starts_H = _sorted_rows(split, most)
    rows_W, starts_W = _sorted_rows(len(free) - split, most)
    reduced = Quadratic(constant, linear, pairs)
    value_H = _part(reduced, slice(0, split))(rows_H) + constant
    value_W = _part(reduced, slice(split, None))(rows_W)
    cross_HW = pairs[:split, split:]
    cost_H = cost_W = cost_limit = None
    if constraints.max_cost is not None and constraints.cost is not None:
        change = np.array(constraints.cost.change_L)
        cost_H, cost_W = rows_H @ change[free[:split]], rows_W @ change[free[split:]]
        fixed = constraints.cost.all_attention + change[list(set(constraints.always_mamba))].sum()
        # Sums in another order differ in the last bits; a layout exactly at the limit is allowed.
        cost_limit = constraints.max_cost - fixed + 1e-12 * abs(constraints.max_cost)

    best = {mamba: _Best(count) for mamba in mamba_counts}
    for mamba_H in range(len(starts_H) - 1):
        low, high = max(fewest - mamba_H, 0), min(most - mamba_H, len(starts_W) - 2)
        if low > high:
            continue
        columns = slice(starts_W[low], starts_W[high + 1])
        width = columns.stop - columns.start
        step = max(1, _BLOCK_BYTES // (8 * width))
        block = np.empty((step, width))
        for first in range(starts_H[mamba_H], starts_H[mamba_H + 1], step):
            rows = slice(first, min(first + step, starts_H[mamba_H + 1]))
            values = block[: rows.stop - rows.start]
            np.matmul(rows_H[rows] @ cross_HW, rows_W[columns].T, out=values)
            values += value_W[columns]
            values += value_H[rows, None]
            if cost_H is not None and cost_W is not None:
                values[cost_H[rows, None] + cost_W[columns] > cost_limit] = np.inf
            edges = np.array(starts_W[low : high + 1]) - columns.start
            # One pass for the minima of all budgets; only a budget that improved is looked at again.
            minima = np.minimum.reduceat(values, edges, axis=1).min(axis=0)
            for index, mamba_W in enumerate(range(low, high + 1)):
                kept = best[mamba_H + mamba_W]
                if minima[index] < kept.worst:
                    end = edges[index + 1] if index + 1 < len(edges) else width
                    kept.add(values[:, edges[index] : end], rows.start, columns.start + edges[index])

    result: dict[int, list[Optimum]] = {}
    for mamba, kept in best.items():
        optima = []
        for value, row, column in kept.sorted():
            mamba_L = np.zeros(constraints.num_layers)
            mamba_L[list(constraints.always_mamba)] = 1
            mamba_L[free] = np.concatenate([rows_H[row], rows_W[column]])
            optima.append(Optimum(layout_from_row(mamba_L), value, value))
        if optima:
            result[constraints.num_layers - mamba - always] = optima
    return result


def solve_with_milp(
    quadratic: Quadratic, constraints: Constraints, attention: int, time_limit: float = 30.0
) -> Optimum | None:
    """The best layout with exactly ``attention`` attention layers, by mixed-integer programming (HiGHS).

    Products are linearised (z_ij = x_i x_j) and tied to the budget by ``sum over j of z_ij = (m - 1) x_i``, which
    makes the relaxation far tighter than the four McCormick inequalities alone. A descent by swaps supplies a
    layout in any case, so the time limit costs proof, not a result.

    Returns:
        The layout and the proven bound; None if the cost bound leaves no layout of this budget.
    """
    free = np.array(constraints.free_layers, dtype=int)
    constant, linear, pairs = _fix_layers(quadratic, constraints, free)
    always = len(set(constraints.always_mamba))
    size, mamba = len(free), constraints.num_layers - attention - always
    index = list(combinations(range(size), 2))
    num_variables = size + len(index)
    objective = np.concatenate([linear, [pairs[i, j] for i, j in index]])
    upper = np.array([[i, size + z, j] for z, (i, j) in enumerate(index)], dtype=int).reshape(-1, 3)
    at = np.arange(len(index))
    ones = np.ones(len(index))

    def inequality(columns: list[np.ndarray], signs: list[float]) -> sparse.csr_array:
        rows, values = np.tile(at, len(columns)), np.concatenate([sign * ones for sign in signs])
        return sparse.csr_array((values, (rows, np.concatenate(columns))), shape=(len(index), num_variables))

    below_i = inequality([upper[:, 1], upper[:, 0]], [1, -1])
    below_j = inequality([upper[:, 1], upper[:, 2]], [1, -1])
    above = inequality([upper[:, 1], upper[:, 0], upper[:, 2]], [1, -1, -1])
    degree = sparse.lil_array((size, num_variables))
    for z, (i, j) in enumerate(index):
        degree[i, size + z] = degree[j, size + z] = 1
    degree.setdiag(-(mamba - 1))
    total = sparse.csr_array(np.concatenate([np.ones(size), np.zeros(len(index))])[None])
    conditions = [
        LinearConstraint(below_i, -np.inf, 0),
        LinearConstraint(below_j, -np.inf, 0),
        LinearConstraint(above, -1, np.inf),
        LinearConstraint(degree.tocsr(), 0, 0),
        LinearConstraint(total, mamba, mamba),
    ]
    cost_L, cost_limit = np.zeros(size), np.inf
    if constraints.max_cost is not None and constraints.cost is not None:
        change = np.array(constraints.cost.change_L)
        cost_L = change[free]
        cost_limit = (
            constraints.max_cost - constraints.cost.all_attention - change[list(constraints.always_mamba)].sum()
        )
        conditions.append(LinearConstraint(np.concatenate([cost_L, np.zeros(len(index))])[None], -np.inf, cost_limit))
    solution = milp(
        objective,
        integrality=np.concatenate([np.ones(size), np.zeros(len(index))]),
        bounds=Bounds(0, 1),
        constraints=conditions,
        options={"time_limit": time_limit, "mip_rel_gap": 1e-9},
    )
    if solution.status == 2:  # infeasible
        return None
    starts = [_swap_descent(linear, pairs, mamba, cost_L, cost_limit, seed) for seed in range(20)]
    if solution.x is not None:
        starts.append(np.round(solution.x[:size]))
    found = [start for start in starts if start is not None]
    if not found:
        return None
    reduced = Quadratic(constant, linear, pairs)
    values = reduced(np.array(found))
    best = int(np.argmin(values))
    mamba_L = np.zeros(constraints.num_layers)
    mamba_L[list(constraints.always_mamba)] = 1
    mamba_L[free] = found[best]
    value = float(values[best])
    bound = solution.mip_dual_bound
    bound = -np.inf if bound is None else min(float(bound) + constant, value)
    # HiGHS proves to a tolerance: a difference below it is rounding, not a gap.
    return Optimum(layout_from_row(mamba_L), value, value if value - bound < 1e-7 * (1 + abs(value)) else bound)


class _Best:
    """The K smallest values seen, with the row and column where they stood."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.items: list[tuple[float, int, int]] = []

    @property
    def worst(self) -> float:
        return self.items[-1][0] if len(self.items) == self.count else np.inf

    def add(self, values: np.ndarray, first_row: int, first_column: int) -> None:
        flat = values.ravel() if self.count < values.size else values.flatten()
        chosen = np.argpartition(flat, self.count - 1)[: self.count] if self.count < flat.size else range(flat.size)
        width = values.shape[1]
        for position in chosen:
            if np.isfinite(flat[position]):
                self.items.append(
                    (float(flat[position]), first_row + int(position) // width, first_column + int(position) % width)
                )
        self.items = sorted(self.items)[: self.count]

    def sorted(self) -> list[tuple[float, int, int]]:
        return self.items


def _fix_layers(
    quadratic: Quadratic, constraints: Constraints, free: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The same function of the free layers only."""
    one = np.array(sorted(set(constraints.always_mamba)), dtype=int)
    both = quadratic.pairs_LL + quadratic.pairs_LL.T
    constant = quadratic.constant + quadratic.linear_L[one].sum() + quadratic.pairs_LL[np.ix_(one, one)].sum()
    linear = quadratic.linear_L[free] + both[np.ix_(free, one)].sum(axis=1)
    return float(constant), linear, quadratic.pairs_LL[np.ix_(free, free)]


def _part(quadratic: Quadratic, layers: slice) -> Quadratic:
    return Quadratic(0.0, quadratic.linear_L[layers], quadratic.pairs_LL[layers, layers])


def _can_enumerate(constraints: Constraints) -> bool:
    free = len(constraints.free_layers)
    most = constraints.num_layers - len(set(constraints.always_mamba)) - constraints.attention_counts[0]
    half_rows = sum(comb(free - free // 2, count) for count in range(min(most, free - free // 2) + 1))
    return constraints.num_layouts <= ENUMERATION_LIMIT and half_rows <= _HALF_LIMIT


def _sorted_rows(size: int, most: int) -> tuple[np.ndarray, list[int]]:
    """All rows of ``size`` zeros and ones with at most ``most`` ones, by their number of ones, and where each
    number starts (one more entry than numbers)."""
    groups = []
    for ones in range(min(size, most) + 1):
        chosen = np.array(list(combinations(range(size), ones)), dtype=int).reshape(comb(size, ones), ones)
        group = np.zeros((len(chosen), size))
        np.put_along_axis(group, chosen, 1.0, axis=1)
        groups.append(group)
    starts = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    return np.concatenate(groups), [int(start) for start in starts]


def _swap_descent(
    linear: np.ndarray, pairs: np.ndarray, mamba: int, cost_L: np.ndarray, cost_limit: float, seed: int
) -> np.ndarray | None:
    """Exchange one Mamba with one attention layer while that improves; None if no allowed start was found."""
    rng = np.random.default_rng(seed)
    both = pairs + pairs.T
    size = len(linear)
    x = np.zeros(size)
    # The first start is greedy by cost, so a feasible one is found whenever there is one.
    x[np.argsort(cost_L, kind="stable")[:mamba] if seed == 0 else rng.permutation(size)[:mamba]] = 1
    if x @ cost_L > cost_limit:
        return None
    while True:
        gain = linear + both @ x  # of setting a layer that is 0, or of clearing one that is 1 (negated)
        ones, zeros = np.flatnonzero(x == 1), np.flatnonzero(x == 0)
        if not len(ones) or not len(zeros):
            return x
        change = gain[zeros][:, None] - gain[ones][None, :] - both[np.ix_(zeros, ones)]
        change[x @ cost_L + cost_L[zeros][:, None] - cost_L[ones][None, :] > cost_limit] = np.inf
        best = np.unravel_index(np.argmin(change), change.shape)
        if change[best] > -1e-12:
            return x
        x[zeros[best[0]]], x[ones[best[1]]] = 1, 0
