"""``cg`` for several λ from one Krylov space."""

from __future__ import annotations

import pytest
import torch
from influence_framework_cg import CgSolver, JacobiSolver

from influence_framework import ConvergenceWarning, DenseOperator, InvalidInputError, StopReason
from influence_framework.testing import ProductsOnly, normal, symmetric

VALUES = [1e-3, 1.0, 1e-2, 30.0]


def shifted(matrix: torch.Tensor, regularization: float) -> torch.Tensor:
    return matrix + regularization * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize(
    "solver",
    [
        CgSolver(rtol=1e-10, atol=0.0),
        CgSolver(rtol=1e-10, atol=0.0, block=True),
        CgSolver(rtol=1e-10, atol=0.0, preconditioner=JacobiSolver()),
    ],
    ids=["plain", "block", "preconditioned"],
)
def test_equals_the_dense_inverse_at_every_value(solver: CgSolver) -> None:
    matrix, rhs = symmetric(torch.logspace(-4, 1, 30)), normal(30, 45)
    rhs[:, 3] = 0.0
    solutions = solver.fit(DenseOperator(matrix), 0.5).solve_sweep(rhs, VALUES)
    for value, solution in zip(VALUES, solutions, strict=True):
        expected = torch.linalg.solve(shifted(matrix, value), rhs)
        residual = rhs - shifted(matrix, value) @ solution.value
        assert solution.converged.all()
        assert (residual.norm(dim=0) <= 1e-10 * rhs.norm(dim=0)).all()
        assert (solution.value - expected).norm() <= 1e-7 * expected.norm()
        assert torch.equal(solution.value[:, 3], torch.zeros(30, dtype=torch.float64))


def test_costs_little_more_than_the_hardest_value_alone() -> None:
    matrix, rhs = symmetric(torch.logspace(-3, 0, 400)), normal(400, 3)
    solver = CgSolver(rtol=1e-8, atol=0.0)

    def columns(values: list[float]) -> int:
        operator = ProductsOnly(matrix)
        solver.fit(operator, 0.0).solve_sweep(rhs, values)
        return sum(operator.widths)

    alone = columns([1e-3])
    together = columns([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    # One product a value checks that the solution is one.
    assert together <= alone + 4 * 3 + 12
    assert alone > 100


def test_a_value_that_leaves_the_matrix_indefinite_fails_alone() -> None:
    matrix, rhs = symmetric([-0.1, 0.2, 0.5, 1.0, 2.0]), normal(5, 4)
    with pytest.warns(ConvergenceWarning, match="non-positive curvature"):
        low, high = CgSolver(rtol=1e-10, atol=0.0).fit(DenseOperator(matrix), 0.0).solve_sweep(rhs, [0.01, 1.0])
    assert set(low.reason) == {StopReason.NEGATIVE_CURVATURE}
    residual = rhs - shifted(matrix, 0.01) @ low.value
    torch.testing.assert_close(low.residual, residual.norm(dim=0) / rhs.norm(dim=0))
    assert high.converged.all()
    assert (high.value - torch.linalg.solve(shifted(matrix, 1.0), rhs)).norm() <= 1e-8


@pytest.mark.parametrize("limit", [None, 30])
def test_a_value_that_fails_gives_nothing_worse_than_zero(limit: int | None) -> None:
    """What the shared recurrence leaves of such a system has a residual of up to 40 times ``b``."""
    matrix, rhs = symmetric([*torch.logspace(0, -2, 60).tolist(), *[-0.05] * 3]), normal(63, 4)
    values = [0.0, 0.01, 0.04, 0.1]
    with pytest.warns(ConvergenceWarning):
        solutions = CgSolver(maxiter=limit).fit(DenseOperator(matrix), 0.0).solve_sweep(rhs, values)
    for value, solution in zip(values, solutions, strict=True):
        residual = (rhs - shifted(matrix, value) @ solution.value).norm(dim=0) / rhs.norm(dim=0)
        torch.testing.assert_close(solution.residual, residual)
        assert (residual <= 1).all()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-21, 1e25])
def test_magnitudes_whose_squares_single_precision_cannot_hold(magnitude: float) -> None:
    matrix, rhs = symmetric([3.0, 2.0, 1.0, 0.5]).float(), (magnitude * normal(4, 2)).float()
    inverse = CgSolver(rtol=1e-5, atol=0.0).fit(DenseOperator(matrix), 0.1)
    block = CgSolver(rtol=1e-5, atol=0.0, block=True).fit(DenseOperator(matrix), 0.1)
    for solution in (inverse.solve(rhs), block.solve(rhs), *inverse.solve_sweep(rhs, [0.1, 0.1])):
        exact = rhs.double() - shifted(matrix.double(), 0.1) @ solution.value.double()
        assert solution.converged.all()
        assert (solution.iterations > 0).all()
        assert (exact.norm(dim=0) <= 2e-5 * rhs.double().norm(dim=0)).all()
    # Guesses and absolute tolerances are in the units of the right-hand sides.
    guessed = CgSolver(rtol=1e-4, atol=0.0, x0=inverse.solve(rhs).value).fit(DenseOperator(matrix), 0.1)
    assert not guessed.solve(rhs).iterations.any()
    loose = CgSolver(rtol=0.0, atol=magnitude).fit(DenseOperator(matrix), 0.1).solve(rhs)
    assert loose.converged.all()
    assert (loose.residual >= 1e-2).all()


def test_single_precision_reaches_what_it_can() -> None:
    matrix, rhs = symmetric(torch.logspace(-3, 1, 60)).float(), normal(60, 8).float()
    solutions = CgSolver(rtol=2e-5, atol=0.0).fit(DenseOperator(matrix), 0.0).solve_sweep(rhs, [1e-1, 1.0])
    for value, solution in zip([1e-1, 1.0], solutions, strict=True):
        residual = rhs.double() - shifted(matrix.double(), value) @ solution.value.double()
        assert solution.converged.all()
        assert (residual.norm(dim=0) <= 3e-5 * rhs.double().norm(dim=0)).all()


def test_the_iteration_limit_counts_both_phases() -> None:
    operator, rhs = ProductsOnly(symmetric(torch.logspace(-4, 0, 200))), normal(200, 2)
    with pytest.warns(ConvergenceWarning, match="iteration limit"):
        solutions = CgSolver(rtol=1e-10, maxiter=5).fit(operator, 0.0).solve_sweep(rhs, [0.0, 1e-3])
    # Five shared ones, and one for each value that measures what they led to.
    assert operator.widths == [2] * 7
    for solution in solutions:
        assert solution.iterations.tolist() == [5, 5]
        assert set(solution.reason) == {StopReason.ITERATION_LIMIT}


def test_wrong_columns_are_refused_and_none_give_none() -> None:
    inverse = CgSolver().fit(DenseOperator(symmetric([1.0, 2.0])), 0.0)
    with pytest.raises(InvalidInputError):
        inverse.solve_sweep(normal(3, 1), [0.1])
    assert [s.value.shape for s in inverse.solve_sweep(normal(2, 0), [0.1, 0.2])] == [(2, 0), (2, 0)]
