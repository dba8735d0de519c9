"""What a fit leaves behind: an inverse per block, and the way from there to factors and scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.checks import model_state
from influence_framework.data import Batch, random_state_kept, split
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.finite import finite_rows
from influence_framework.gradients import (
    Factors,
    Name,
    contract_perturbation,
    contract_up,
    sample_gradients,
    samples_within,
)
from influence_framework.inverses import relative_residuals
from influence_framework.layer_scores import LayerScorer, suits
from influence_framework.memory import in_pieces
from influence_framework.operators import require_capabilities
from influence_framework.parameters import Blocks
from influence_framework.preflight import Preflight
from influence_framework.problem import Problem
from influence_framework.protocols import (
    HessianSource,
    InfluenceMode,
    InverseOperator,
    JointSolver,
    LinearOperator,
    Reregularizable,
    Solution,
    Solver,
    Sweepable,
)
from influence_framework.regularization import BlockScale, Strength, absolute
from influence_framework.solving import SolveLog

SOLVE_COPIES = 12
"""Vectors of the length of a right-hand side that an iterative solver holds for each of them."""


@dataclass(frozen=True, eq=False)
class FittedBlock:
    """One block's share of the flat vector, its curvature and the inverse fitted to it.

    ``index`` is ``None`` where the block is the whole vector.
    """

    name: str
    index: Tensor | None
    operator: LinearOperator
    solver: Solver
    inverse: InverseOperator
    regularization: float

    @classmethod
    def of(
        cls,
        name: str,
        index: Tensor | None,
        operator: LinearOperator,
        solver: Solver,
        inverse: InverseOperator,
        regularization: float,
    ) -> Self:
        """A block from what ``solver`` returned for it: checked to be an inverse of its operator's shape."""
        if not isinstance(inverse, InverseOperator) or inverse.shape != operator.shape:
            raise InvalidInputError(
                f"{type(solver).__name__}.fit returned {type(inverse).__name__} where an inverse operator "
                f"of shape {operator.shape} was expected: the solver is faulty."
            )
        return cls(name, index, operator, solver, inverse, regularization)

    @property
    def solver_name(self) -> str:
        """Name of the solver's class."""
        return type(self.solver).__name__

    @property
    def selection(self) -> Tensor | slice:
        """What picks this block's columns out of rows over the whole vector."""
        return slice(None) if self.index is None else self.index

    def with_regularization(self, strength: float) -> Self:
        """At another λ: without fitting again where the inverse offers it."""
        if not isinstance(self.inverse, Reregularizable):
            inverse = self.solver.fit(self.operator, strength)
            return self.of(self.name, self.index, self.operator, self.solver, inverse, strength)
        return replace(self, inverse=self.inverse.with_regularization(strength), regularization=strength)

    def solve(self, gradients: Float[Tensor, "m P"], log: SolveLog) -> Float[Tensor, "m q"]:
        """This block's factors of rows over the whole vector."""
        columns = gradients[:, self.selection].T
        (solution,) = self._logged(log, [self.regularization], lambda: [self.inverse.solve(columns)])
        return self._rows(solution)

    def _logged(
        self, log: SolveLog, strengths: Sequence[float], work: Callable[[], Sequence[Solution]]
    ) -> Sequence[Solution]:
        return log.solve(self.name, self.solver_name, strengths, self.inverse, work)

    def at_each(self, strengths: Sequence[float]) -> list[Self]:
        """This block at each λ, as :meth:`solve_sweep` wants it: none where the inverse sweeps by itself."""
        if isinstance(self.inverse, Sweepable):
            return []
        return [self.with_regularization(strength) for strength in strengths]

    def solve_sweep(
        self,
        gradients: Float[Tensor, "m P"],
        strengths: Sequence[float],
        at: Sequence[FittedBlock],
        log: SolveLog,
    ) -> list[Float[Tensor, "m q"]]:
        """Factors at each λ; ``at`` is what :meth:`at_each` returned for them."""
        if not isinstance(self.inverse, Sweepable):
            return [block.solve(gradients, log) for block in at]
        inverse, columns = self.inverse, gradients[:, self.selection].T
        solutions = self._logged(log, strengths, lambda: inverse.solve_sweep(columns, strengths))
        return [self._rows(solution) for solution in solutions]

    def _rows(self, solution: Solution) -> Tensor:
        value = solution.value.T
        bad = torch.nonzero(~finite_rows(value)).flatten().tolist()
        if bad:
            raise NonFiniteError(
                f"{type(self.solver).__name__} returned NaN or infinity for {len(bad)} of {len(value)} "
                f"right-hand sides in block {self.name!r} (positions {bad[:8]}): raise the regularisation, or "
                "use another solver."
            )
        return value


@dataclass(frozen=True, eq=False)
class Fitted:
    """Everything that ``fit`` leaves behind.

    Attributes:
        problem: Model, objective and data.
        blocks: By name, in the order of the parameters.
        state: The model's parameters and buffers as they were, to notice that it was trained on.
        scales: The size of each block's curvature, for λ relative to it.
        preflight: What was found out beforehand.
    """

    problem: Problem
    blocks: dict[str, FittedBlock]
    state: dict[str, Tensor]
    scales: dict[str, BlockScale]
    preflight: Preflight

    @classmethod
    def fit(
        cls,
        problem: Problem,
        blocks: Blocks,
        source: HessianSource,
        solver: Solver,
        regularization: Mapping[str, Strength],
        *,
        probe: bool = True,
    ) -> Self:
        """One inverse per block; ``probe`` as in :meth:`Preflight.of`."""
        parts = {name: problem.parameters.subset(names) for name, names in blocks.items()}
        operators = {name: source.operator(problem, part) for name, part in parts.items()}
        places = {name: problem.parameters.indices_of(part) for name, part in parts.items()}
        for operator in operators.values():
            require_capabilities(type(solver).__name__, operator, getattr(solver, "requires", ()))
        scales = {name: BlockScale(name, operator) for name, operator in operators.items()}
        strengths = absolute(scales, regularization)
        preflight = Preflight.of(
            problem,
            parts,
            source,
            strengths,
            taken=bool(getattr(solver, "takes_indefinite", False)),
            sought=bool(getattr(solver, "finds_indefinite", False)),
            least_dtype=getattr(solver, "least_dtype", None),
            probe=probe,
        )
        if isinstance(solver, JointSolver):
            inverses = solver.fit_jointly(operators, strengths)
        else:
            inverses = {name: solver.fit(operator, strengths[name]) for name, operator in operators.items()}
        fitted = {
            name: FittedBlock.of(name, places[name], operator, solver, inverses[name], strengths[name])
            for name, operator in operators.items()
        }
        return cls(problem, fitted, model_state(problem.model), scales, preflight)

    def with_regularization(self, regularization: Mapping[str, Strength]) -> Self:
        """The same at another λ per block."""
        with random_state_kept():
            strengths = absolute(self.scales, regularization)
            blocks = {name: block.with_regularization(strengths[name]) for name, block in self.blocks.items()}
        return replace(self, blocks=blocks, preflight=self.preflight.at(strengths))

    @property
    def divided(self) -> bool:
        """Whether the training data is divided between processes, so that none of them solves alone."""
        operators = (block.operator for block in self.blocks.values())
        return self.problem.processes is not None or any(getattr(o, "divided", False) for o in operators)

    def size(self, batch: Batch) -> int:
        """Samples in ``batch``."""
        return self.problem.objective.size(batch)

    def factors(
        self, batch: Batch, log: SolveLog, problem: Problem | None = None
    ) -> dict[str, Float[Tensor, "m _q"]]:
        """``(C + λI)⁻¹ ∇ℓ`` of every sample, by block; of the losses of another ``problem`` where given."""
        chunks = [
            {name: block.solve(gradients, log) for name, block in self.blocks.items()}
            for gradients in self.gradients(batch, problem=problem)
        ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in self.blocks}

    def scores(
        self,
        test: Batch,
        train: Batch,
        mode: InfluenceMode,
        log: SolveLog,
        problems: Sequence[Problem] | None = None,
    ) -> dict[str, Tensor]:
        """Scores by block, solving for the smaller side where both will do.

        ``problems`` are those whose losses are differentiated for the test and for the training points.
        """
        problems = problems or (self.problem, self.problem)
        if mode is InfluenceMode.Up and self.size(train) < self.size(test):
            swapped = self.scores(train, test, mode, log, problems[::-1])
            return {name: part.T for name, part in swapped.items()}
        if mode is InfluenceMode.Up and (scorer := self.layer_scorer()) is not None:
            with scored(self.blocks.values(), self.size(test), log):
                (scores,) = scorer.scores(test, train, problems=problems)
            return scores
        parts = []
        for gradients in self.gradients(test, problem=problems[0]):
            factors = {name: block.solve(gradients, log) for name, block in self.blocks.items()}
            parts.append(self.contract(factors, train, mode, problems[1]))
        return {name: torch.cat([part[name] for part in parts]) for name in self.blocks}

    def sweep(
        self,
        test: Batch,
        train: Batch,
        mode: InfluenceMode,
        values: Sequence[Strength],
        log: SolveLog,
        problems: Sequence[Problem] | None = None,
    ) -> dict[Strength, dict[str, Tensor]]:
        """:meth:`scores` at each λ, with one pass over the gradients of each side for all of them."""
        problems = problems or (self.problem, self.problem)
        if mode is InfluenceMode.Up and self.size(train) < self.size(test):
            swapped = self.sweep(train, test, mode, values, log, problems[::-1])
            return {s: {name: part.T for name, part in scores.items()} for s, scores in swapped.items()}
        each = [absolute(self.scales, dict.fromkeys(self.blocks, value)) for value in values]
        strengths = {name: [at[name] for at in each] for name in self.blocks}
        at = {name: block.at_each(strengths[name]) for name, block in self.blocks.items()}
        if mode is InfluenceMode.Up and (scorer := self.layer_scorer()) is not None:
            inverses = [{name: at[name][i].inverse for name in at} for i in range(len(values))]
            with scored([block for each in at.values() for block in each], self.size(test), log):
                return dict(zip(values, scorer.scores(test, train, inverses, problems), strict=True))
        parts = []
        for gradients in self.gradients(test, SOLVE_COPIES * len(values), problems[0]):
            factors = {
                (i, name): Factors(rows, block.index)
                for name, block in self.blocks.items()
                for i, rows in enumerate(block.solve_sweep(gradients, strengths[name], at[name], log))
            }
            parts.append(_contract(mode, factors, problems[1], train))
        return {
            value: {name: torch.cat([part[i, name] for part in parts]) for name in self.blocks}
            for i, value in enumerate(values)
        }

    def residuals(self, batch: Batch, log: SolveLog) -> dict[str, Float[Tensor, " n"]]:
        """``‖∇ℓ − (C + λI) x̂‖ / ‖∇ℓ‖`` of every sample's factor ``x̂``, by block, at one product a block."""
        parts = []
        for gradients in self.gradients(batch):
            part = {}
            for name, block in self.blocks.items():
                columns = gradients[:, block.selection].T
                value = block.solve(gradients, log).T
                part[name] = relative_residuals(block.operator, block.regularization, value, columns)
            parts.append(part)
        return {name: torch.cat([part[name] for part in parts]) for name in self.blocks}

    def self_scores(self, batch: Batch, log: SolveLog) -> dict[str, Float[Tensor, " n"]]:
        """``∇ℓᵀ (C + λI)⁻¹ ∇ℓ`` of every sample with itself, by block; never of pairs."""
        if (scorer := self.layer_scorer()) is not None:
            with scored(self.blocks.values(), self.size(batch), log):
                return scorer.self_scores(batch)
        parts = [
            {
                name: (block.solve(gradients, log) * gradients[:, block.selection]).sum(1)
                for name, block in self.blocks.items()
            }
            for gradients in self.gradients(batch)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in self.blocks}

    def layer_scorer(self) -> LayerScorer | None:
        """What scores without per-sample gradients, where every block can."""
        operators = {name: block.operator for name, block in self.blocks.items()}
        inverses = {name: block.inverse for name, block in self.blocks.items()}
        return LayerScorer(self.problem, operators, inverses) if suits(operators, inverses) else None

    def contract(
        self, factors: Mapping[str, Tensor], batch: Batch, mode: InfluenceMode, problem: Problem | None = None
    ) -> dict[str, Tensor]:
        """Each block's scores, from one pass over the gradients for all blocks."""
        parts = {name: Factors(factors[name], block.index) for name, block in self.blocks.items()}
        return _contract(mode, parts, problem or self.problem, batch)

    def contract_whole(self, factors: Float[Tensor, "m P"], batch: Batch, mode: InfluenceMode) -> Tensor:
        """Scores from factors over the whole vector."""
        return _contract(mode, {"all": Factors(factors)}, self.problem, batch)["all"]

    def assemble(self, factors: Mapping[str, Tensor]) -> Float[Tensor, "n P"]:
        """Factors by block as rows in the order of the flat vector."""
        count = len(next(iter(factors.values())))
        parameters = self.problem.parameters
        rows = torch.empty(count, parameters.numel, dtype=parameters.dtype, device=parameters.device)
        for name, block in self.blocks.items():
            rows[:, block.selection] = factors[name]
        return rows

    def gradients(
        self, batch: Batch, copies: int = SOLVE_COPIES, problem: Problem | None = None
    ) -> Iterator[Float[Tensor, "m P"]]:
        """Per-sample gradients, as many at a time as can be solved for within the budget."""
        parameters, room = self.problem.parameters, self.problem.room
        count = samples_within(self.problem, parameters, self.problem.memory_budget, copies)
        work = partial(sample_gradients, problem or self.problem, parameters)
        if not self.divided or self.layer_scorer() is not None:
            yield from (found for _, found in in_pieces(room, batch, self.size, count, work))
            return
        # Memory may run out in one process alone, and all are to solve for the same samples at a time.
        for chunk in split(batch, self.size(batch), self.problem.agreed(count)):
            yield torch.cat([found for _, found in in_pieces(room, chunk, self.size, count, work)])


@contextmanager
def scored(blocks: Collection[FittedBlock], count: int, log: SolveLog) -> Iterator[None]:
    """Note the scores of ``count`` samples, worked out within, which no right-hand side was solved for."""
    start = time.perf_counter()
    yield
    seconds = (time.perf_counter() - start) / len(blocks)
    for block in blocks:
        log.note(block.name, block.solver_name, block.regularization, block.inverse, count, seconds)


def _contract(
    mode: InfluenceMode, factors: Mapping[Name, Factors], problem: Problem, batch: Batch
) -> dict[Name, Tensor]:
    contraction = contract_up if mode is InfluenceMode.Up else contract_perturbation
    return contraction(factors, problem, batch)
