"""Correlations of rows, with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from influence_framework.errors import InvalidInputError

Kind = Literal["pearson", "spearman"]
Floats = NDArray[np.float64]
CONFIDENCE = 0.95
QUANTILE = float(ndtri((1 + CONFIDENCE) / 2))
"""Half the width of an interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:.3f}"

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def ranks(values: Floats) -> Floats:
    """Ranks from 1 along the last dimension; equal values each get their mean rank."""
    # Imported here: scipy.stats takes as long to load as all the rest without torch.
    from scipy.stats import rankdata

    found: Floats = rankdata(values, axis=-1)
    return found


def correlations(one: ArrayLike, other: ArrayLike, kind: Kind = "spearman") -> Floats:
    """Correlation of each row of ``one`` with the same row of ``other``, ``(m, k)`` each: ``(m,)``.

    Of equal values each gets their mean rank. NaN where a row of ``other``, the truth, is constant, so that
    there is nothing to predict; zero where only that of ``one`` is.

    Raises:
        InvalidInputError: Shapes differ, or there are fewer than two columns.
    """
    a, b = np.atleast_2d(np.asarray(one, dtype=np.float64)), np.atleast_2d(np.asarray(other, dtype=np.float64))
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2:
        raise InvalidInputError(
            f"Correlations are of two matrices of the same shape with at least two columns, got {a.shape} and "
            f"{b.shape}."
        )
    if kind == "spearman":
        a, b = ranks(a), ranks(b)
    constant = [np.ptp(rows, axis=1) == 0 for rows in (a, b)]
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found[constant[0]] = 0.0
    found[constant[1]] = np.nan
    return np.clip(found, -1.0, 1.0)


def fisher_interval(correlation: ArrayLike, count: int, kind: Kind = "spearman") -> tuple[Floats, Floats]:
    """95 % interval of a correlation from ``count`` pairs, by Fisher's ``z = artanh r``.

    The standard error of ``z`` is ``1/√(count − 3)`` for Pearson's, after Fisher (1921), and
    ``√((1 + r²/2)/(count − 3))`` for Spearman's, after Bonett and Wright (2000), "Sample size requirements
    for estimating Pearson, Kendall and Spearman correlations". From three pairs or fewer nothing follows: the
    interval is then all of ``[−1, 1]``.
    """
    r = np.asarray(correlation, dtype=np.float64)
    if count <= 3:
        return np.full_like(r, -1.0), np.full_like(r, 1.0)
    variance = np.ones_like(r) if kind == "pearson" else 1 + r**2 / 2
    reach = QUANTILE * np.sqrt(variance / (count - 3))
    with np.errstate(divide="ignore"):
        z = np.arctanh(r)
    return np.asarray(np.tanh(z - reach)), np.asarray(np.tanh(z + reach))


def nan_mean(values: Floats) -> float:
    """Mean of those that are not NaN; NaN where all are."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def mean_of(values: Floats) -> float:
    """Mean of those that are not NaN.

    Raises:
        InvalidInputError: All are.
    """
    if np.isnan(mean := nan_mean(values)):
        raise InvalidInputError(
            "There is nothing to predict: retraining changed the loss of no test point by any amount that "
            "differs. Leave out other points, or train longer."
        )
    return mean


def bootstrap(
    statistic: Callable[[np.random.Generator], float], value: float, *, resamples: int, seed: int
) -> Estimate:
    """``value`` with the percentile interval of ``statistic`` over random resamples.

    Efron and Tibshirani (1993), "An Introduction to the Bootstrap", §13.3. A resample that has no value is
    left out.
    """
    generator = np.random.default_rng(seed)
    drawn: list[float] = []
    for _ in range(resamples):
        found = statistic(generator)
        if not np.isnan(found):
            drawn.append(found)
    if not drawn:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def bootstrap_mean(values: Floats, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean of the values that are not NaN, with its bootstrap interval over them."""
    kept = values[~np.isnan(values)]

    def statistic(generator: np.random.Generator) -> float:
        return float(kept[generator.integers(len(kept), size=len(kept))].mean())

    return bootstrap(statistic, mean_of(values), resamples=resamples, seed=seed)


def as_array(values: Any) -> Floats:
    """A tensor or array as float64 on the host."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
