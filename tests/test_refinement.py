"""A cheap inverse as the start of, and the preconditioner for, an exact method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import influence_framework as inf
from influence_framework.inverses import Inverse, approximation
from influence_framework.refinement import RefinedInverse
from tests import cases, fits, reference, small
from tests.reference import assert_close

CG = {"name": "cg", "rtol": 1e-10, "atol": 0.0}


def exact(name: str, batch: Any) -> Tensor:
    instance = cases.make(name)
    g = reference.gradients(instance.model, instance.loss, [batch])
    matrix = cases.dense(name, "gauss_newton")
    return g @ torch.linalg.inv(matrix + fits.strength(name) * torch.eye(len(matrix), dtype=g.dtype)) @ g.T


@pytest.mark.parametrize(
    "solver",
    ["ekfac", "kfac", "jacobi", {"name": "nystroem", "rank": 5}, {"name": "arnoldi", "rank": 4}, "direct"],
    ids=str,
)
def test_refinement_makes_any_method_exact(solver: Any) -> None:
    instance, model = fits.fitted("ragged_last_batch", solver=solver, refine=CG)
    assert_close(model.influences(*instance.data[0]), exact("ragged_last_batch", instance.data[0]), 1e-8)
    assert model.report.converged
    assert (model.report.blocks[0].residual <= 1e-9).all()


def test_an_exact_start_leaves_nothing_to_do() -> None:
    instance, model = fits.fitted("ragged_last_batch", solver="direct", refine=CG | {"rtol": 1e-8})
    model.influences(*instance.data[0])
    assert model.report.blocks[0].iterations.tolist() == [0] * 4


@dataclass(frozen=True)
class Unfixed:
    """A solver that is not known to be one fixed matrix, and so is a start alone."""

    solver: inf.Solver

    def fit(self, operator: inf.LinearOperator, regularization: float) -> inf.InverseOperator:
        return self.solver.fit(operator, regularization)


def test_a_fixed_approximation_preconditions_beside_being_the_start() -> None:
    sketch = inf.solvers["nystroem"].create(rank=10)
    spent = []
    for solver in (None, Unfixed(sketch), sketch):
        options = {"solver": CG} if solver is None else {"solver": solver, "refine": CG}
        instance, model = fits.fitted("ragged_last_batch", **options)
        model.influences(*instance.data[0])
        spent.append(model.report.blocks[0].iterations.double().mean().item())
    plain, started, both = spent
    assert both < 0.7 * started
    assert both < 0.7 * plain


def test_a_few_steps_improve_on_the_approximation() -> None:
    instance, rough = fits.fitted("ragged_last_batch", solver="ekfac")
    few = {"name": "cg", "maxiter": 3, "rtol": 1e-10, "warn_on_max_iteration": False}
    _, refined = fits.fitted("ragged_last_batch", solver="ekfac", refine=few)
    batch = instance.data[0]
    assert (refined.residuals(*batch) < 0.5 * rough.residuals(*batch)).all()


@pytest.mark.parametrize("structure", ["per_layer", "per_parameter"])
def test_blocks_are_fitted_together_where_the_approximation_can(structure: str) -> None:
    instance, model = fits.fitted("ragged_last_batch", structure, solver="kfac", refine=CG)
    other = fits.fitted("ragged_last_batch", structure, solver="direct")[1]
    assert_close(model.influences(*instance.data[0]), other.influences(*instance.data[0]), 1e-8)


@pytest.mark.parametrize("solver", ["ekfac", "jacobi", Ellipsis], ids=str)
def test_another_regularization_equals_a_refit(solver: Any) -> None:
    solver = Fixed() if solver is Ellipsis else solver
    instance, model = fits.fitted("ragged_last_batch", solver=solver, refine=CG)
    moved = model.with_regularization(0.05)
    again = fits.fitted("ragged_last_batch", solver=solver, refine=CG, hessian_regularization=0.05)[1]
    batch = instance.data[0]
    assert_close(moved.influences(*batch), again.influences(*batch), 1e-8)
    assert moved.report.blocks[0].iterations.tolist() == again.report.blocks[0].iterations.tolist()


def test_what_an_approximation_could_not_do_is_no_failure_of_the_refined() -> None:
    crude = {"name": "cg", "maxiter": 1, "rtol": 1e-10}
    instance, model = fits.fitted("ragged_last_batch", solver=crude, refine=CG)
    model.influences(*instance.data[0])  # warnings are errors here
    assert model.report.converged


def test_a_start_worse_than_zero_does_no_harm() -> None:
    matrix = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    inverse = inf.solvers["cg"].create(rtol=1e-12, atol=0.0).fit(inf.DenseOperator(matrix), 0.0)
    assert isinstance(inverse, inf.WarmStart)
    columns = torch.ones(6, 2, dtype=torch.float64)
    from_zero = inverse.solve(columns)
    from_afar = inverse.solve_from(columns, 1e9 * columns)
    torch.testing.assert_close(from_afar.value, from_zero.value)
    assert from_afar.iterations.tolist() == from_zero.iterations.tolist()
    at_once = inverse.solve_from(columns, from_zero.value)
    assert at_once.iterations.tolist() == [0, 0]
    empty = inverse.solve_from(columns[:, :0], columns[:, :0])
    assert empty.value.shape == (6, 0)


def test_what_cannot_refine_is_refused_at_once() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"DirectSolver cannot refine.*Use 'cg'"):
        small.model(refine="direct")
    with pytest.raises(inf.UnknownMethodError, match="Did you mean 'cg'"):
        small.model(refine="cgg")


def test_a_solver_that_lies_about_refining_is_named() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"Liar.fit returned .* no method solve_from"):
        small.model(refine=Liar()).fit(small.batches())


def test_a_preconditioner_of_its_own_is_kept() -> None:
    solver = inf.RefinedSolver(Fixed(), inf.solvers["cg"].create(preconditioner=Fixed(3.0)))
    operator = inf.DenseOperator(torch.eye(3, dtype=torch.float64))
    inverse = solver.fit(operator, 0.1)
    assert isinstance(inverse, RefinedInverse)
    assert inverse.refiner.preconditioner.scale == 3.0


@dataclass(frozen=True, eq=False)
class FixedInverse(Inverse):
    """A multiple of the identity, which has to be fitted again for another λ."""

    base: inf.LinearOperator
    regularization: float
    scale: float

    def _solve(self, columns: Tensor) -> inf.Solution:
        return approximation(self.scale / self.regularization * columns)


@dataclass(frozen=True)
class Fixed:
    """Approximates by a multiple of the identity."""

    scale: float = 1.0
    fixed: bool = field(default=True, init=False)

    def fit(self, operator: inf.LinearOperator, regularization: float) -> FixedInverse:
        return FixedInverse(operator, regularization, self.scale)


@dataclass(frozen=True)
class Liar:
    refines: bool = True

    def fit(self, operator: inf.LinearOperator, regularization: float) -> FixedInverse:
        return Fixed().fit(operator, regularization)
