"""A score for every layout, learned from some: a term per layer and per pair of layers, with its uncertainty.

Bayesian linear regression in the features 1, u_i, u_i u_j with u_i = +1 for Mamba and -1 for attention (301 for 24
layers). The prior variances are learned by maximizing the evidence (MacKay 1992, "Bayesian interpolation"), separately
for what depends on the number of Mamba layers only, for single layers, for all pairs and for pairs of near layers:
neighbors compensate each other more than distant layers do, and 300 coefficients are to be had from 100 scores.

Dimension letters: L decoder layers, B scored layouts, F features, K kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import spearmanr

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, layouts_to_matrix
from mamtra_ray.surrogate.optimum import best_layouts
from mamtra_ray.surrogate.quadratic import Optimum, Quadratic

_NEAR_LAYERS = 2.0  # e-fold distance of the prior of near pairs
_MIN_NOISE = 1e-6  # of the scores' variance


@dataclass(frozen=True)
class RatioFit:
    """How well left-out scores of one ratio are predicted.

    ``spearman`` is None below 4 layouts or without spread; ``coverage`` is the part of the scores inside the
    predicted 90 % intervals; ``rmse`` is in units of the target (log KL by default).
    """

    attention_layers: int
    layouts: int
    spearman: float | None
    rmse: float
    coverage: float


@dataclass(frozen=True)
class Surrogate:
    """A fitted model. ``mean`` is what is minimized exactly; :meth:`sample` draws another such function from the
    posterior, whose optimum is a layout that may be the best one for all we know (Thompson sampling)."""

    mean: Quadratic
    attention_counts: tuple[int, ...]
    noise: float
    _target_B: np.ndarray
    _features_BF: np.ndarray
    _prior: _Prior
    _precision_BB: np.ndarray
    _shift: float
    _scale: float

    @property
    def misfit(self) -> float:
        """Standard deviation of what linear and pairwise terms cannot represent, in units of the target."""
        return self._scale * float(np.sqrt(self.noise))

    def predict(self, layouts: Sequence[Layout]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (B,) of the target of each layout, noise included."""
        features = _features(layouts_to_matrix(layouts, self.mean.num_layers))
        cross = self._prior.times(features) @ self._features_BF.T
        prior = np.einsum("bf,bf->b", self._prior.times(features), features)
        variance = prior - np.einsum("bn,nm,bm->b", cross, self._precision_BB, cross) + self.noise
        mean = self._shift + self._scale * (cross @ self._precision_BB @ self._target_B)
        return mean, self._scale * np.sqrt(np.maximum(variance, _MIN_NOISE))

    def sample(self, rng: np.random.Generator) -> Quadratic:
        """One function from the posterior (Matheron's rule: a prior sample, corrected by its residual)."""
        prior = self._prior.sample(rng, self._features_BF.shape[1])
        noise = np.sqrt(self.noise) * rng.normal(size=len(self._target_B))
        residual = self._target_B - self._features_BF @ prior - noise
        weights = prior + self._prior.times((self._precision_BB @ residual) @ self._features_BF)
        return _to_quadratic(weights, self.mean.num_layers, self._shift, self._scale)

    def held_out_fit(self) -> dict[int, RatioFit]:
        """Leave-one-out fit inside each ratio (closed form, the prior variances kept): attention layers -> fit."""
        diagonal = np.diag(self._precision_BB)
        error = self._scale * (self._precision_BB @ self._target_B) / diagonal
        deviation = self._scale / np.sqrt(diagonal)
        actual = self._shift + self._scale * self._target_B
        counts = np.array(self.attention_counts)
        fits = {}
        for count in sorted(set(self.attention_counts)):
            at = counts == count
            predicted = actual[at] - error[at]
            spread = at.sum() >= 4 and np.ptp(actual[at]) > 0 and np.ptp(predicted) > 0
            correlation = float(spearmanr(predicted, actual[at]).statistic) if spread else None
            inside = np.abs(error[at]) <= 1.645 * deviation[at]
            rmse = float(np.sqrt(np.mean(error[at] ** 2)))
            fits[count] = RatioFit(count, int(at.sum()), correlation, rmse, float(inside.mean()))
        return fits

    def best(self, constraints: Constraints, count: int = 1, time_limit: float = 30.0) -> dict[int, list[Optimum]]:
        """The best layouts of every allowed number of attention layers, exact or with their gap."""
        return best_layouts(self.mean, constraints, count, time_limit)


def fit_surrogate(layouts: Sequence[Layout], scores: Sequence[float] | np.ndarray) -> Surrogate:
    """Fit the model to the scores (lower is better; the logarithm of the KL divergence suits it best).

    Raises:
        InputError: fewer than 3 scores, layouts of different lengths, or a score that is not finite.
    """
    target = np.asarray(scores, dtype=np.float64)
    if len(layouts) != len(target):
        raise InputError(f"{len(layouts)} layouts but {len(target)} scores")
    if len(layouts) < 3:
        raise InputError(f"the surrogate needs at least 3 scored layouts, got {len(layouts)}")
    if not np.isfinite(target).all():
        worst = layouts[int(np.flatnonzero(~np.isfinite(target))[0])]
        raise InputError(f"the score of layout {worst} is not a finite number")
    num_layers = layouts[0].num_layers
    features = _features(layouts_to_matrix(layouts, num_layers))
    shift, scale = float(target.mean()), float(target.std()) or 1.0
    standard = (target - shift) / scale
    components = _components(num_layers)
    kernels = np.stack([component.kernel(features) for component in components])
    scales = np.array([component.scale(features) for component in components])
    kernels /= scales[:, None, None]
    variances, noise = _maximise_evidence(kernels, standard)
    prior = _Prior(components, tuple(variances / scales))
    covariance = np.tensordot(variances, kernels, 1) + noise * np.eye(len(target))
    precision = np.linalg.inv(covariance)
    precision = (precision + precision.T) / 2
    weights = prior.times((precision @ standard) @ features)
    counts = tuple(len(layout.attention_layers) for layout in layouts)
    mean = _to_quadratic(weights, num_layers, shift, scale)
    return Surrogate(mean, counts, noise, standard, features, prior, precision, shift, scale)


@dataclass(frozen=True)
class _Component:
    """Independent weights with standard deviations ``deviation_F``, or one shared weight of the pattern
    ``deviation_F`` (which is then a function of the number of Mamba layers)."""

    deviation_F: np.ndarray
    shared: bool

    def kernel(self, features_BF: np.ndarray) -> np.ndarray:
        if self.shared:
            projected = features_BF @ self.deviation_F
            return np.outer(projected, projected)
        scaled = features_BF * self.deviation_F
        return scaled @ scaled.T

    def scale(self, features_BF: np.ndarray) -> float:
        """Mean square of what unit variance contributes to the scores. Bounded from below for shared weights, whose
        contribution vanishes where all layouts have half of their layers replaced."""
        if self.shared:
            return max(float(np.mean((features_BF @ self.deviation_F) ** 2)), 0.01 * self.deviation_F.sum() ** 2)
        return float(np.sum(self.deviation_F**2))


@dataclass(frozen=True)
class _Prior:
    """Covariance of the weights: the sum of the components, each times its variance."""

    components: tuple[_Component, ...]
    variances: tuple[float, ...]

    def times(self, rows: np.ndarray) -> np.ndarray:
        """``rows @ covariance`` (rows may be one vector) without forming it."""
        result = np.zeros_like(rows)
        for component, variance in zip(self.components, self.variances, strict=True):
            if component.shared:
                result += variance * np.multiply.outer(rows @ component.deviation_F, component.deviation_F)
            else:
                result += variance * rows * component.deviation_F**2
        return result

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        weights = np.zeros(size)
        for component, variance in zip(self.components, self.variances, strict=True):
            normal = rng.normal() if component.shared else rng.normal(size=size)
            weights += np.sqrt(variance) * component.deviation_F * normal
        return weights


def _features(mamba_BL: np.ndarray) -> np.ndarray:
    u = 2 * mamba_BL - 1
    i, j = np.triu_indices(u.shape[1], k=1)
    return np.concatenate([np.ones((len(u), 1)), u, u[:, i] * u[:, j]], axis=1)


def _components(num_layers: int) -> tuple[_Component, ...]:
    i, j = np.triu_indices(num_layers, k=1)
    size = 1 + num_layers + len(i)
    first_pair = 1 + num_layers

    def filled(part: slice, values: float | np.ndarray) -> np.ndarray:
        vector = np.zeros(size)
        vector[part] = values
        return vector

    layers, pairs = slice(1, first_pair), slice(first_pair, None)
    return (
        _Component(filled(slice(0, 1), 1.0), shared=True),
        _Component(filled(layers, 1.0), shared=True),  # linear in the number of Mamba layers
        _Component(filled(pairs, 1.0), shared=True),  # quadratic in it
        _Component(filled(layers, 1.0), shared=False),
        _Component(filled(pairs, 1.0), shared=False),
        _Component(filled(pairs, np.exp(-(j - i - 1) / (2 * _NEAR_LAYERS))), shared=False),
    )


def _maximise_evidence(kernels_KBB: np.ndarray, target_B: np.ndarray) -> tuple[np.ndarray, float]:
    """Variance of each kernel and of the noise, all relative to the target's variance."""
    count = len(target_B)
    identity = np.eye(count)

    def negative_evidence(log_theta: np.ndarray) -> tuple[float, np.ndarray]:
        theta = np.exp(log_theta)
        covariance = np.tensordot(theta[:-1], kernels_KBB, 1) + (theta[-1] + 1e-10) * identity
        factor = cho_factor(covariance, lower=True)
        alpha = cho_solve(factor, target_B)
        inverse = cho_solve(factor, identity)
        value = 0.5 * target_B @ alpha + np.log(np.diag(factor[0])).sum()
        slope = inverse - np.outer(alpha, alpha)
        gradient = [0.5 * theta[k] * np.vdot(slope, kernel) for k, kernel in enumerate(kernels_KBB)]
        gradient.append(0.5 * theta[-1] * np.trace(slope))
        # A weak prior on the logarithms (a factor of 20 is one deviation) keeps variances that few scores cannot tell.
        distance = (log_theta - start) / 3.0
        return float(value + 0.5 * distance @ distance), np.array(gradient) + distance / 3.0

    start = np.log(np.array([1.0, 1.0, 0.3, 0.3, 0.03, 0.03, 0.01]))
    bounds = [(np.log(1e-8), np.log(1e3))] * len(kernels_KBB) + [(np.log(_MIN_NOISE), np.log(2.0))]
    found = minimize(negative_evidence, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
    theta = np.exp(found.x)
    return theta[:-1], float(theta[-1])


def _to_quadratic(weights_F: np.ndarray, num_layers: int, shift: float, scale: float) -> Quadratic:
    """From u = +-1 to x = 0, 1: u_i = 2 x_i - 1."""
    i, j = np.triu_indices(num_layers, k=1)
    linear, pair = weights_F[1 : 1 + num_layers], weights_F[1 + num_layers :]
    pairs = np.zeros((num_layers, num_layers))
    pairs[i, j] = pair
    touching = pairs.sum(axis=0) + pairs.sum(axis=1)
    constant = shift + scale * (weights_F[0] - linear.sum() + pair.sum())
    return Quadratic(float(constant), scale * 2 * (linear - touching), scale * 4 * pairs)
