"""What a page tells about scores: extremes of every test point, rankings, and how they are distributed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from influence_framework.attribution.outputs import Array, Matrix, Scored, SelfInfluence
from influence_framework.attribution.reading import SINGLE, Stored, extremes
from influence_framework.errors import InvalidInputError

BINS = 80
"""Bars of the distribution."""


@dataclass(frozen=True)
class Side:
    """Training points in the order of their scores, the most extreme first.

    Attributes:
        positions: Of the training points.
        scores: Theirs.
    """

    positions: tuple[int, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, scores: Array, positions: Array, places: Sequence[int]) -> Side:
        """The entries at ``places``."""
        return cls(
            tuple(int(positions[place]) for place in places), tuple(float(scores[place]) for place in places)
        )


@dataclass(frozen=True)
class Both:
    """The most helpful and the most harmful training points of one test point, or of all of them."""

    helpful: Side
    harmful: Side


@dataclass(frozen=True)
class Distribution:
    """How scores are distributed.

    Attributes:
        count: Of scores that are finite.
        low: The smallest.
        high: The largest.
        mean: Of all.
        positive: Share of those above zero.
        bars: How many there are in each of equally wide pieces from ``low`` to ``high``.
    """

    count: int
    low: float
    high: float
    mean: float
    positive: float
    bars: tuple[int, ...]


@dataclass(frozen=True)
class Extract:
    """What a page needs of the scores.

    Attributes:
        tests: Of every test point; empty where there are no scores of single ones.
        overall: Of all test points together; ``None`` where that is not known.
        distribution: Of all scores that were kept; ``None`` where none is finite.
        lost: How many scores are not finite.
    """

    tests: tuple[Both, ...]
    overall: Both | None
    distribution: Distribution | None
    lost: int


def stored_of(scores: Any, test_ids: Any = None, train_ids: Any = None) -> Stored:
    """The scores as if they had been read from a store.

    Args:
        scores: Path of a store, a :class:`Stored`, a :class:`Scored`, or a matrix ``(n_test, n_train)``.
        test_ids: Identifiers of the test points, of a matrix; their positions where left out.
        train_ids: Of the training points.

    Raises:
        InvalidInputError: It is none of these, or holds no scores.
    """
    if isinstance(scores, Tensor | np.ndarray):
        return _of_matrix(scores, test_ids, train_ids)
    if test_ids is not None or train_ids is not None:
        raise InvalidInputError("Identifiers are taken from the store: leave test_ids and train_ids out.")
    if isinstance(scores, str | os.PathLike):
        stored = Stored.read(scores)
    elif isinstance(scores, Scored):
        stored = Stored.of(scores)
    elif isinstance(scores, Stored):
        stored = scores
    else:
        raise InvalidInputError(
            "Expected scores (n_test, n_train), what inf.attribute has returned, or the path of its store, got "
            f"{type(scores).__name__}."
        )
    if stored.output == "factors":
        raise InvalidInputError("These are factors, and no scores: attribute with another output.")
    return stored


def _of_matrix(scores: Any, test_ids: Any, train_ids: Any) -> Stored:
    matrix = scores.detach().cpu().double().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "fiu":
        raise InvalidInputError(f"Expected scores of shape (n_test, n_train), got {tuple(scores.shape)}.")
    ids = []
    for given, count, what in zip((test_ids, train_ids), matrix.shape, ("test", "train"), strict=True):
        found = np.arange(count) if given is None else np.asarray(given)
        if found.shape != (count,):
            raise InvalidInputError(f"{what}_ids: expected {count} identifiers, got shape {found.shape}.")
        ids.append(found)
    return Stored(
        manifest={"output": {"name": Matrix.name}, "units": Matrix.units},
        test_ids=ids[0],
        train_ids=ids[1],
        matrix=matrix,
        columns={},
    )


def own_influence(own: Any, stored: Stored) -> Array:
    """Self-influences ``(n_train,)`` of the training points of ``stored``.

    Args:
        own: A vector, or what :func:`stored_of` takes, of the output ``"self_influence"``.
        stored: The scores they are shown with.

    Raises:
        InvalidInputError: It is neither, or of other points.
    """
    count = len(stored.train_ids)
    if isinstance(own, Tensor | np.ndarray):
        vector = own.detach().cpu().double().numpy() if isinstance(own, Tensor) else np.asarray(own)
        if vector.shape != (count,):
            raise InvalidInputError(
                f"self_influence: expected one number for each of {count} training points, got {vector.shape}."
            )
        return vector
    other = stored_of(own)
    if other.output != SelfInfluence.name:
        raise InvalidInputError(f"self_influence: expected that output, got {other.output!r}.")
    if not np.array_equal(other.train_ids.astype(str), stored.train_ids.astype(str)):
        raise InvalidInputError(
            f"self_influence: of {len(other.train_ids)} training points, which are not the {count} that the "
            "scores are of."
        )
    return np.asarray(other.row(None)[0])


def extract(stored: Stored, count: int, ranked: int) -> Extract:
    """Extremes and distribution of all scores; of a matrix on disk, a row at a time.

    Args:
        stored: The scores.
        count: How many training points on each side of a test point.
        ranked: How many of a ranking over all test points.
    """
    if stored.output not in SINGLE:
        scores, positions = stored.row(None)
        return Extract((), both(scores, positions, ranked), *distribution([scores]))
    tests, total = [], np.zeros(len(stored.train_ids))
    for test in range(len(stored.test_ids)):
        scores, positions = stored.row(test)
        tests.append(both(scores, positions, count))
        if stored.matrix is not None:
            with np.errstate(invalid="ignore"):
                total += scores
    overall = None
    if stored.matrix is not None and len(tests) > 1:
        overall = both(total / len(tests), np.arange(len(total)), ranked)
    found = distribution(_Rows(stored))
    return Extract(tuple(tests), overall, *found)


@dataclass(frozen=True)
class _Rows(Sequence[Array]):
    """The scores of every test point, read when they are asked for."""

    stored: Stored

    def __len__(self) -> int:
        return len(self.stored.test_ids)

    def __getitem__(self, test: Any) -> Any:
        if test >= len(self):
            raise IndexError(test)
        return self.stored.row(test)[0]


def both(scores: Array, positions: Array, count: int) -> Both:
    """The most helpful and the most harmful, at most ``count`` of each."""
    helpful, harmful = extremes(scores, positions, count)
    return Both(Side.of(scores, positions, helpful), Side.of(scores, positions, harmful))


def distribution(rows: Sequence[Array]) -> tuple[Distribution | None, int]:
    """How the scores in ``rows`` are distributed, and how many are not finite."""
    low, high, total, positive, count, lost = math.inf, -math.inf, 0.0, 0, 0, 0
    for row in rows:
        finite = row[np.isfinite(row)].astype(np.float64)
        lost += row.size - finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            total += float(finite.sum())
            positive += int((finite > 0).sum())
            count += finite.size
    if not count:
        return None, lost
    edges = np.linspace(low, high, BINS + 1) if high > low else np.linspace(low - 0.5, high + 0.5, BINS + 1)
    bars = np.zeros(BINS, np.int64)
    for row in rows:
        bars += np.histogram(row[np.isfinite(row)], edges)[0]
    return Distribution(count, low, high, total / count, positive / count, tuple(bars.tolist())), lost
