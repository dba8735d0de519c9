"""What scores need of the test side, worked out once, and the scores of training points with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.attribution.blocks import Block
from influence_framework.attribution.outputs import Output
from influence_framework.data import Batch, take
from influence_framework.devices import to_device
from influence_framework.errors import InvalidInputError
from influence_framework.fitted import Fitted, scored
from influence_framework.layer_scores import Sides, nbytes
from influence_framework.measurement import Measurement, measured
from influence_framework.points import checked_points
from influence_framework.protocols import InfluenceMode
from influence_framework.query_factors import (
    QueryFactors,
    check_rank,
    join_query_factors,
    query_bytes,
    query_factors,
    scores_of,
)
from influence_framework.reports import SolveReport
from influence_framework.solving import SolveLog


class Computed(NamedTuple):
    """Numbers for the points of a block, and what came of what was solved for them.

    Attributes:
        values: ``(m, n)``.
        report: On right-hand sides, where there were any.
    """

    values: Float[Tensor, "m n"]
    report: SolveReport


Job = Callable[[Block], Computed]
"""``m`` rows of numbers for the ``n`` points of a block; a function that can be sent to another process."""


@dataclass(frozen=True)
class PairScores(ABC):
    """Scores of every training point of a block with every test point of a group."""

    alone: ClassVar[bool] = True
    """Whether one of the processes that the data is divided between can do this without the others."""

    label: ClassVar[str] = "scores"
    """What is done, for those who watch it."""

    fitted: Fitted

    def __call__(self, block: Block) -> Computed:
        batches = _checked(self.fitted, block, outputs=not self.looks)
        return Computed(torch.cat([self._of(batch) for batch in batches], dim=1), SolveReport())

    @property
    def looks(self) -> bool:
        """Whether outputs of the model are looked at while scores are worked out."""
        return False

    @abstractmethod
    def _of(self, batch: Batch) -> Float[Tensor, "m n"]: ...


@dataclass(frozen=True)
class FactorScores(PairScores):
    """With factors ``(C + λI)⁻¹ ∇ℓ(z_test)``, ``(m, P)``."""

    factors: Float[Tensor, "m P"]

    def _of(self, batch: Batch) -> Float[Tensor, "m n"]:
        return self.fitted.contract_whole(self.factors, batch, InfluenceMode.Up)


@dataclass(frozen=True)
class LayerScores(PairScores):
    """From inputs and output gradients of layers, for inverses that work on these."""

    held: Sides
    count: int

    @property
    def looks(self) -> bool:
        return True

    def _of(self, batch: Batch) -> Float[Tensor, "m n"]:
        scorer = self.fitted.layer_scorer()
        assert scorer is not None
        return _total(scorer.with_held(self.held, self.count, batch))


@dataclass(frozen=True)
class QueryScores(PairScores):
    """With factors of the test points that are compressed to low rank."""

    factors: QueryFactors

    @property
    def looks(self) -> bool:
        return bool(self.factors.layers)

    def _of(self, batch: Batch) -> Float[Tensor, "m n"]:
        return scores_of(self.fitted, self.factors, batch)


@dataclass(frozen=True)
class SelfScores:
    """``∇ℓ(z)ᵀ (C + λI)⁻¹ ∇ℓ(z)`` of every training point, as one row."""

    label: ClassVar[str] = "self-influences"

    fitted: Fitted

    @property
    def alone(self) -> bool:
        """As of :class:`PairScores`."""
        return solves_alone(self.fitted)

    def __call__(self, block: Block) -> Computed:
        log = SolveLog()
        outputs = self.fitted.layer_scorer() is None
        batches = _checked(self.fitted, block, outputs=outputs)
        found = [_total(self.fitted.self_scores(batch, log)) for batch in batches]
        return Computed(torch.cat(found)[None], log.report())


@dataclass(frozen=True)
class FactorRows:
    """``(C + λI)⁻¹ ∇ℓ(z)`` of every training point, one column each."""

    label: ClassVar[str] = "factors"

    fitted: Fitted

    def __call__(self, block: Block) -> Computed:
        log = SolveLog()
        found = [
            self.fitted.assemble(self.fitted.factors(batch, log)) for batch in _checked(self.fitted, block)
        ]
        return Computed(torch.cat(found).T, log.report())


@dataclass(frozen=True)
class FactorNorms:
    """``‖(C + λI)⁻¹ ∇ℓ(z)‖`` of every training point, as one row."""

    label: ClassVar[str] = "norms"

    fitted: Fitted

    @property
    def alone(self) -> bool:
        """As of :class:`PairScores`, by right-hand sides."""
        return not self.fitted.divided

    def __call__(self, block: Block) -> Computed:
        log = SolveLog()
        found = []
        for batch in _checked(self.fitted, block):
            factors = self.fitted.factors(batch, log)
            found.append(_total({name: part.square().sum(1) for name, part in factors.items()}).sqrt())
        return Computed(torch.cat(found)[None], log.report())


class Prepared(NamedTuple):
    """What scores need of some test points.

    Attributes:
        held: Factors ``(C + λI)⁻¹ ∇ℓ``, ``(m, P)``; or what they were compressed to; or, for inverses that work
            on layers, those' own objects.
        report: On right-hand sides, or on what an inverse gave without any.
    """

    held: Float[Tensor, "m P"] | QueryFactors | Sides
    report: SolveReport


@dataclass(frozen=True)
class Preparation:
    """Works out what scores need of test points: each is solved for once, here.

    Attributes:
        fitted: What the fit left behind.
        measurement: Of the test points, in place of their loss.
        rank: That factors are compressed to, layer by layer; ``None``: they are not.
    """

    label: ClassVar[str] = "solve"

    fitted: Fitted
    measurement: Measurement | None = None
    rank: int | None = None

    @property
    def alone(self) -> bool:
        """As of :class:`PairScores`."""
        return solves_alone(self.fitted) if self.rank is None else not self.fitted.divided

    def __call__(self, block: Block) -> Prepared:
        log = SolveLog()
        if self.rank is not None:
            compressed = [
                query_factors(self.fitted, batch, self.rank, 0, log, self.measurement)
                for batch in _checked(self.fitted, block, self.measurement)
            ]
            return Prepared(join_query_factors(compressed), log.report())
        scorer = self.fitted.layer_scorer()
        problem = measured(self.fitted.problem, self.measurement)
        batches = _checked(self.fitted, block, self.measurement, outputs=scorer is None)
        if scorer is not None:
            with scored(self.fitted.blocks.values(), len(block), log):
                held = scorer.combined([s for b in batches for _, s in scorer.prepared(b, problem)])
            return Prepared(held, log.report())
        factors = [self.fitted.assemble(self.fitted.factors(batch, log, problem)) for batch in batches]
        return Prepared(torch.cat(factors), log.report())

    def job(self, parts: Sequence[Prepared], count: int) -> Job:
        """The job of ``count`` test points from all their parts, in order."""
        if self.rank is not None:
            compressed = [cast(QueryFactors, part) for part in self._present(parts)]
            return QueryScores(self.fitted, join_query_factors(compressed))
        scorer = self.fitted.layer_scorer()
        if scorer is not None:
            held = scorer.combined([cast(Sides, part) for part in self._present(parts)])
            return LayerScores(self.fitted, held, count)
        return FactorScores(self.fitted, torch.cat([cast(Tensor, part) for part in self._present(parts)]))

    def _present(self, parts: Sequence[Prepared]) -> list[Tensor | QueryFactors | Sides]:
        """On the device of the model, from wherever they were worked out."""
        return [to_device(part.held, self.fitted.problem.parameters.device) for part in parts]


def solves_alone(fitted: Fitted) -> bool:
    """Whether no solve takes products with data that is divided between processes."""
    return not fitted.divided or fitted.layer_scorer() is not None


def check_query_rank(rank: int | None, output: Output) -> None:
    """Refuse what is no rank, and one for an output without test points."""
    if rank is None:
        return
    check_rank(rank, "query_rank")
    if not output.pairs:
        raise InvalidInputError(
            f"Factors of test points are compressed, and the output {output.name!r} has none: leave "
            "query_rank out."
        )


def points_at_once(fitted: Fitted, rank: int | None = None) -> int:
    """Test points whose jobs half of the memory budget holds, compressed to ``rank`` if given; at least one."""
    problem = fitted.problem
    scorer = fitted.layer_scorer()
    if rank is not None:
        size = query_bytes(fitted, rank)
    elif scorer is None:
        element = torch.empty(0, dtype=problem.parameters.dtype).element_size()
        size = problem.parameters.numel * element
    else:
        size = max(nbytes(sides) for _, sides in scorer.prepared(take(problem.example, slice(0, 1))))
    return max(1, problem.memory_budget // (2 * size))


def _total(by_block: Mapping[str, Tensor]) -> Tensor:
    """The sum over blocks, in single precision at least: half of it would lose the later ones."""
    stacked = torch.stack(list(by_block.values()))
    return stacked.sum(0, dtype=torch.promote_types(stacked.dtype, torch.float32))


def _checked(
    fitted: Fitted, block: Block, measurement: Measurement | None = None, *, outputs: bool = True
) -> Iterator[Batch]:
    for x, y in block.batches:
        yield checked_points(fitted, x, y, f"points from {block.start} on", measurement, outputs=outputs)
