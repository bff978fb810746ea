"""The best layout of one ratio under a quadratic score, with a proven bound, for models too large to enumerate."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, layout_from_row, layouts_to_matrix
from mamtra_ray.surrogate.quadratic import Optimum, Quadratic, fix_layers


def solve_with_milp(
    quadratic: Quadratic,
    constraints: Constraints,
    attention: int,
    time_limit: float = 30.0,
    exclude: Collection[Layout] = (),
) -> Optimum | None:
    """The best layout outside ``exclude`` with exactly ``attention`` attention layers, by HiGHS.

    Products are linearized (z_ij = x_i x_j) and tied to the ratio by ``sum over j of z_ij = (m - 1) x_i``, which
    makes the relaxation far tighter than the four McCormick inequalities alone. A descent by swaps supplies a
    layout in any case, so the time limit costs proof, not a result.

    Returns:
        The layout and the proven bound; None if nothing of this ratio is left.
    """
    free = np.array(constraints.free_layers, dtype=int)
    constant, linear, pairs = fix_layers(quadratic, constraints, free)
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
            constraints.max_cost - constraints.cost.all_attention - change[list(set(constraints.always_mamba))].sum()
        )
        conditions.append(LinearConstraint(np.concatenate([cost_L, np.zeros(len(index))])[None], -np.inf, cost_limit))
    known_KH = _free_rows(exclude, constraints, attention, free)
    if len(known_KH):
        # Two layouts of one ratio differ in at least one Mamba layer.
        nothing = np.zeros((len(known_KH), len(index)))
        conditions.append(LinearConstraint(np.concatenate([known_KH, nothing], axis=1), -np.inf, mamba - 1))
    known = {row.tobytes() for row in known_KH}
    solution = milp(
        objective,
        integrality=np.concatenate([np.ones(size), np.zeros(len(index))]),
        bounds=Bounds(0, 1),
        constraints=conditions,
        options={"time_limit": time_limit, "mip_rel_gap": 1e-9},
    )
    if solution.status == 2:  # infeasible
        return None
    starts = [_swap_descent(linear, pairs, mamba, cost_L, cost_limit, known, seed) for seed in range(20)]
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


def _free_rows(layouts: Collection[Layout], constraints: Constraints, attention: int, free: np.ndarray) -> np.ndarray:
    """The free layers (K, H) of those ``layouts`` that are allowed and have ``attention`` attention layers."""
    chosen = [x for x in layouts if len(x.attention_layers) == attention and constraints.allows(x)]
    return layouts_to_matrix(chosen, constraints.num_layers)[:, free]


def _swap_descent(
    linear: np.ndarray,
    pairs: np.ndarray,
    mamba: int,
    cost_L: np.ndarray,
    cost_limit: float,
    known: Collection[bytes],
    seed: int,
) -> np.ndarray | None:
    """Exchange one Mamba with one attention layer while that improves, around the rows in ``known``; None if no
    allowed start was found."""
    rng = np.random.default_rng(seed)
    both = pairs + pairs.T
    size = len(linear)
    x = np.zeros(size)
    # The first start is greedy by cost, so a feasible one is found whenever there is one.
    x[np.argsort(cost_L, kind="stable")[:mamba] if seed == 0 else rng.permutation(size)[:mamba]] = 1
    if x @ cost_L > cost_limit or x.tobytes() in known:
        return None
    while True:
        gain = linear + both @ x  # of setting a layer that is 0, or of clearing one that is 1 (negated)
        ones, zeros = np.flatnonzero(x == 1), np.flatnonzero(x == 0)
        if not len(ones) or not len(zeros):
            return x
        change = gain[zeros][:, None] - gain[ones][None, :] - both[np.ix_(zeros, ones)]
        change[x @ cost_L + cost_L[zeros][:, None] - cost_L[ones][None, :] > cost_limit] = np.inf
        for place in np.argsort(change, axis=None):
            zero, one = np.unravel_index(place, change.shape)
            if change[zero, one] > -1e-12:
                return x
            swapped = x.copy()
            swapped[zeros[zero]], swapped[ones[one]] = 1, 0
            if swapped.tobytes() not in known:
                x = swapped
                break
        else:
            return x
