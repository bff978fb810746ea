"""The best layouts under a quadratic score: exact by enumeration, or with a stated gap by HiGHS.

Dimension letters: L decoder layers, H and W the halves into which the free layers are split, K layouts kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, layout_from_row
from mamtra_ray.surrogate.mixed_integer import solve_with_milp
from mamtra_ray.surrogate.quadratic import Optimum, Quadratic, fix_layers

# Enumeration visits about 2e8 layouts per second on one core; beyond this HiGHS takes over.
ENUMERATION_LIMIT = 2**28
# Rows of one half that are held at once (with 24 layers a half has 4,096).
_HALF_LIMIT = 2**20
_BLOCK_BYTES = 16 * 2**20


def best_layouts(
    quadratic: Quadratic,
    constraints: Constraints,
    count: int = 1,
    time_limit: float = 30.0,
    exclude: Collection[Layout] = (),
) -> dict[int, list[Optimum]]:
    """The ``count`` best layouts, outside ``exclude``, of every allowed number of attention layers, best first.

    Exact where enumeration is possible (all layouts up to 28 layers, extreme ratios of larger models); otherwise
    HiGHS runs for each of them, at most ``time_limit`` seconds per layout, and states its gap.

    Returns:
        number of attention layers -> optima. Ratios that nothing is left of are left out.
    """
    if can_enumerate(constraints):
        return _enumerate_others(quadratic, constraints, count, exclude)
    result: dict[int, list[Optimum]] = {}
    for num_attention in constraints.attention_counts:
        try:
            single = replace(constraints, min_attention=num_attention, max_attention=num_attention)
        except InputError:
            continue  # the cost bound leaves no layout of this ratio
        if can_enumerate(single):
            result |= _enumerate_others(quadratic, single, count, exclude)
        else:
            found: list[Optimum] = []
            while len(found) < count:
                known = {*exclude, *(optimum.layout for optimum in found)}
                optimum = solve_with_milp(quadratic, single, num_attention, time_limit, known)
                if optimum is None:
                    break
                found.append(optimum)
            # Within their gaps a later one may turn out better.
            result |= {num_attention: sorted(found, key=lambda optimum: optimum.value)} if found else {}
    return result


def _enumerate_others(
    quadratic: Quadratic, constraints: Constraints, count: int, exclude: Collection[Layout]
) -> dict[int, list[Optimum]]:
    excluded = {layout for layout in exclude if constraints.allows(layout)}
    found = enumerate_layouts(quadratic, constraints, count + len(excluded))
    others = {
        num_attention: [o for o in optima if o.layout not in excluded][:count]
        for num_attention, optima in found.items()
    }
    return {num_attention: optima for num_attention, optima in others.items() if optima}


def enumerate_layouts(quadratic: Quadratic, constraints: Constraints, count: int = 1) -> dict[int, list[Optimum]]:
    """Every allowed layout, in blocks: the free layers are split into two halves whose rows are sorted by their
    number of Mamba layers, so a block is one matrix product and a ratio is a contiguous slice of its columns."""
    free = np.array(constraints.free_layers, dtype=int)
    constant, linear, pairs = fix_layers(quadratic, constraints, free)
    always = len(set(constraints.always_mamba))
    mamba_counts = [constraints.num_layers - num_attention - always for num_attention in constraints.attention_counts]
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
            # One pass for the minima of all ratios; only a ratio that improved is looked at again.
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


def _part(quadratic: Quadratic, layers: slice) -> Quadratic:
    return Quadratic(0.0, quadratic.linear_L[layers], quadratic.pairs_LL[layers, layers])


def can_enumerate(constraints: Constraints) -> bool:
    """Whether all layouts can be visited, within seconds and far below 1 GiB; else HiGHS must do."""
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
