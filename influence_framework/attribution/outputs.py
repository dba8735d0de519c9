"""What is kept of the scores, by name: all of them, the extreme ones, their mean, or every point's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from influence_framework.attribution.blocks import Identifiers
from influence_framework.errors import InvalidInputError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, np.dtype[Any]]

MEASURED_UNITS = (
    "∇m(test)ᵀ (C + λI)⁻¹ ∇ℓ(train), m the measurement, C the curvature of the mean training loss: removing a "
    "training point from n changes what is measured at the test point by about +score/n"
)
"""Of scores with a measurement of the test points in place of their loss."""


@dataclass(frozen=True)
class Output(ABC):
    """A choice of what to keep. Frozen options; :meth:`collector` makes what collects.

    Attributes:
        normalize: Divide the scores of a training point ``z`` by a size of its own, after Barshan, Brunet and
            Dziugaite (2020), "RelatIF: Identifying Explanatory Training Examples via Relative Influence", §4:
            ``"l_relatif"`` by ``√(∇ℓ(z)ᵀ (C + λI)⁻¹ ∇ℓ(z))``, ``"theta_relatif"`` by ``‖(C + λI)⁻¹ ∇ℓ(z)‖``.
    """

    name: ClassVar[str]
    pairs: ClassVar[bool] = True
    """Whether there are test points."""
    units: ClassVar[str] = (
        "∇ℓ(test)ᵀ (C + λI)⁻¹ ∇ℓ(train), C the curvature of the mean training loss: removing a training point "
        "from n changes the loss of the test point by about +score/n"
    )

    normalize: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.normalize not in (None, "l_relatif", "theta_relatif"):
            raise InvalidInputError(
                f"normalize must be None, 'l_relatif' or 'theta_relatif', got {self.normalize!r}."
            )

    @abstractmethod
    def collector(self, test: int, train: int, dtype: np.dtype[Any]) -> Collector:
        """Collects the scores of ``train`` points with ``test`` points."""


class Collector(ABC):
    """What has been collected so far. Blocks may come in any order, each once."""

    @abstractmethod
    def add(self, rows: slice, columns: slice, scores: Array) -> None:
        """Scores ``(m, n)`` of the test points ``rows`` with the training points ``columns``."""

    @abstractmethod
    def state(self) -> Mapping[str, Array]:
        """What has to be kept for :meth:`restore` to go on from here."""

    @abstractmethod
    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what :meth:`state` returned."""

    @abstractmethod
    def columns(self, test: Identifiers, train: Identifiers) -> Mapping[str, Array]:
        """The result as columns of a table, with identifiers."""


@dataclass(frozen=True)
class Matrix(Output):
    """All scores, ``(n_test, n_train)``."""

    name = "matrix"

    def collector(self, test: int, train: int, dtype: np.dtype[Any]) -> MatrixCollector:
        return MatrixCollector(np.empty((test, train), dtype))


@dataclass
class MatrixCollector(Collector):
    """Writes into an array, which may be one on disk.

    Attributes:
        scores: Anything that takes ``scores[rows, columns] = block``.
    """

    scores: Any

    def add(self, rows: slice, columns: slice, scores: Array) -> None:
        self.scores[rows, columns] = scores

    def state(self) -> Mapping[str, Array]:
        return {}

    def restore(self, state: Mapping[str, Array]) -> None:
        pass

    def columns(self, test: Identifiers, train: Identifiers) -> Mapping[str, Array]:
        scores = np.asarray(self.scores)
        return {
            "test": np.repeat(test, len(train)),
            "train": np.tile(train, len(test)),
            "score": scores.reshape(-1),
        }


@dataclass(frozen=True)
class Factors(Output):
    """``(C + λI)⁻¹ ∇ℓ(z)`` of every point, ``(n, P)``, one row each: what ``influences_from_factors`` takes."""

    name = "factors"
    pairs = False
    units = "(C + λI)⁻¹ ∇ℓ(z), in the order of the flat parameter vector"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize is not None:
            raise InvalidInputError("Factors are of single points: leave normalize out.")

    def collector(self, test: int, train: int, dtype: np.dtype[Any]) -> FactorsCollector:
        return FactorsCollector(np.empty((train, test), dtype))


class FactorsCollector(MatrixCollector):
    """Writes the factors of a block as rows."""

    def add(self, rows: slice, columns: slice, scores: Array) -> None:
        self.scores[columns, rows] = scores.T

    def columns(self, test: Identifiers, train: Identifiers) -> Mapping[str, Array]:
        raise InvalidInputError("Factors are no table: use array and train_ids.")


@dataclass(frozen=True)
class TopK(Output):
    """The ``k`` most helpful and the ``k`` most harmful training points of every test point.

    Of equal scores the one of the earlier point counts as the more extreme.

    Attributes:
        k: How many of each.
    """

    name = "top_k"
    k: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise InvalidInputError(f"k must be a positive integer, got {self.k!r}.")

    def collector(self, test: int, train: int, dtype: np.dtype[Any]) -> TopKCollector:
        width = min(self.k, train)
        return TopKCollector(
            scores=np.full((2, test, width), -np.inf, dtype),
            positions=np.full((2, test, width), np.iinfo(np.int64).max, np.int64),
        )


@dataclass
class TopKCollector(Collector):
    """The most helpful (0) and, with the sign turned, the most harmful (1), best first.

    Attributes:
        scores: ``(2, n_test, k)``.
        positions: Which training points these are of.
    """

    scores: Array
    positions: Array

    def add(self, rows: slice, columns: slice, scores: Array) -> None:
        for side, signed in enumerate((scores, -scores)):
            best = _largest(signed, min(self.scores.shape[2], signed.shape[1]))
            values = np.concatenate([self.scores[side, rows], np.take_along_axis(signed, best, 1)], axis=1)
            places = np.concatenate([self.positions[side, rows], best + columns.start], axis=1)
            order = np.lexsort((places, -values), axis=1)[:, : self.scores.shape[2]]
            self.scores[side, rows] = np.take_along_axis(values, order, 1)
            self.positions[side, rows] = np.take_along_axis(places, order, 1)

    def state(self) -> Mapping[str, Array]:
        return {"scores": self.scores, "positions": self.positions}

    def restore(self, state: Mapping[str, Array]) -> None:
        self.scores, self.positions = state["scores"], state["positions"]

    def columns(self, test: Identifiers, train: Identifiers) -> Mapping[str, Array]:
        _, count, width = self.scores.shape
        signed = np.stack([self.scores[0], -self.scores[1]])
        return {
            "test": np.tile(np.repeat(test, width), 2),
            "side": np.repeat(["helpful", "harmful"], count * width),
            "rank": np.tile(np.arange(width), 2 * count),
            "train": train[self.positions.reshape(-1)],
            "position": self.positions.reshape(-1),
            "score": signed.reshape(-1),
        }


def _largest(scores: Array, count: int) -> Array:
    """Positions of the ``count`` largest entries of every row; of equal ones the first."""
    least = np.partition(scores, -count, axis=1)[:, -count, None]
    above, equal = scores > least, scores == least
    room = count - above.sum(axis=1, keepdims=True)
    kept = above | (equal & (equal.cumsum(axis=1) <= room))
    return np.nonzero(kept)[1].reshape(len(scores), count)


@dataclass(frozen=True)
class Mean(Output):
    """The mean over all test points of every training point's scores, ``(n_train,)``."""

    name = "mean"

    def collector(self, test: int, train: int, dtype: np.dtype[Any]) -> VectorCollector:
        return VectorCollector(np.zeros(train), test)


@dataclass(frozen=True)
class SelfInfluence(Output):
    """Every training point's influence on its own loss, ``(n_train,)``."""

    name = "self_influence"
    pairs = False
    units = "∇ℓ(z)ᵀ (C + λI)⁻¹ ∇ℓ(z), C the curvature of the mean training loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize is not None:
            raise InvalidInputError("Self-influences are what 'l_relatif' divides by: leave normalize out.")

    def collector(self, test: int, train: int, dtype: np.dtype[Any]) -> VectorCollector:
        return VectorCollector(np.zeros(train), 1)


@dataclass
class VectorCollector(Collector):
    """The mean over test points.

    Attributes:
        total: Sum so far, ``(n_train,)`` float64.
        count: Test points.
    """

    total: Array
    count: int

    def add(self, rows: slice, columns: slice, scores: Array) -> None:
        self.total[columns] += scores.sum(axis=0, dtype=np.float64)

    def state(self) -> Mapping[str, Array]:
        return {"total": self.total}

    def restore(self, state: Mapping[str, Array]) -> None:
        self.total = state["total"]

    def columns(self, test: Identifiers, train: Identifiers) -> Mapping[str, Array]:
        return {"train": train, "score": self.total / self.count}


OUTPUTS: Mapping[str, type[Output]] = {cls.name: cls for cls in (Matrix, TopK, Mean, SelfInfluence, Factors)}


def resolve_output(output: str | Mapping[str, Any] | Output) -> Output:
    """The output that a name, a mapping with ``name`` and options, or an instance stands for.

    Raises:
        InvalidInputError: Unknown name or option; the message lists what there is.
    """
    if isinstance(output, Output):
        return output
    options = {"name": output} if isinstance(output, str) else dict(output)
    name = str(options.pop("name", None))
    if name not in OUTPUTS:
        raise InvalidInputError(
            f"Unknown output {name!r}; expected one of {', '.join(OUTPUTS)}.{did_you_mean(name, OUTPUTS)}"
        )
    known = [option.name for option in fields(OUTPUTS[name])]
    for option in options:
        if option not in known:
            raise InvalidInputError(
                f"The output {name!r} has no option {option!r}.{did_you_mean(option, known)} Its options: "
                f"{', '.join(known)}."
            )
    return OUTPUTS[name](**options)


@dataclass(frozen=True, repr=False)
class Scored:
    """Scores with the identifiers of their points.

    Attributes:
        output: What was kept.
        test_ids: ``(n_test,)``; empty where there are no test points.
        train_ids: ``(n_train,)``.
        collected: The result by name of column, one row for each score kept.
        measurement: What tells a measurement that was taken in place of the loss from others.
        query_error: ``‖F − F_rank‖ / ‖F‖`` of every test point's factor ``F = (C + λI)⁻¹ ∇ℓ(test)``, where it
            was compressed to ``query_rank``, ``(n_test,)``: a score is off by at most that times
            ``‖F‖·‖∇ℓ(train)‖``.
    """

    output: Output
    test_ids: Identifiers
    train_ids: Identifiers
    collected: Collector
    measurement: Mapping[str, Any] | None = None
    query_error: Array | None = None

    def __repr__(self) -> str:
        tests = f", test points: {len(self.test_ids)}" if self.output.pairs else ""
        return f"<{type(self).__name__} {self.output}{tests}, training points: {len(self.train_ids)}>"

    @property
    def units(self) -> str:
        """Of the scores."""
        return self.output.units if self.measurement is None else MEASURED_UNITS

    @property
    def array(self) -> Any:
        """``(n_test, n_train)`` of the output ``matrix``, ``(n, P)`` of ``factors``, in memory or on disk."""
        if not isinstance(self.collected, MatrixCollector):
            raise InvalidInputError(
                f"The output {self.output.name!r} has no matrix: use columns or to_pandas()."
            )
        return self.collected.scores

    @property
    def columns(self) -> Mapping[str, Array]:
        """The result by name of column, one entry for each score that was kept."""
        return self.collected.columns(self.test_ids, self.train_ids)

    def to_pandas(self) -> pd.DataFrame:
        """The result as a data frame."""
        import pandas as pd

        return pd.DataFrame(dict(self.columns))
