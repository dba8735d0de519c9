"""``nystroem`` in front of conjugate gradients: definite, deflating, and worth its price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from influence_framework_nystroem import NystroemInverse, NystroemSolver

from influence_framework import DenseOperator, solvers
from influence_framework.testing import normal, symmetric

BLOCK = pytest.mark.parametrize("block", [False, True], ids=["columns", "block"])


def decaying(size: int = 300) -> torch.Tensor:
    """Eigenvalues 10 / i²: a quickly falling head and a long tail."""
    return symmetric(10 / torch.arange(1, size + 1, dtype=torch.float64).square())


def fit(matrix: torch.Tensor, regularization: float, **options: Any) -> NystroemInverse:
    return NystroemSolver(**options).fit(DenseOperator(matrix), regularization)


def applied(inverse: Any) -> torch.Tensor:
    return inverse @ torch.eye(inverse.shape[0], dtype=inverse.dtype)


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
def test_the_deflated_form_is_the_one_of_the_paper(regularization: float) -> None:
    inverse = fit(decaying(60), regularization, rank=15)
    values, vectors = inverse.values, inverse.vectors
    outside = torch.eye(60, dtype=torch.float64) - vectors @ vectors.T
    expected = vectors @ torch.diag(1 / (values + regularization)) @ vectors.T
    expected += outside / (values[-1] + regularization)
    torch.testing.assert_close(applied(inverse.preconditioner()), expected)


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
@pytest.mark.parametrize("rank", [3, 8, 12, 30])
def test_positive_definite_even_where_the_curvature_is_singular(rank: int, regularization: float) -> None:
    matrix = symmetric(torch.cat([torch.logspace(1, -1, 8), torch.zeros(22)]))
    preconditioner = applied(fit(matrix, regularization, rank=rank).preconditioner())
    assert torch.linalg.eigvalsh((preconditioner + preconditioner.T) / 2)[0] >= 0.09
    # As many iterations as there are clusters of eigenvalues, at most, with a right-hand side in the range.
    method = solvers["cg"].create(rtol=1e-9, atol=0.0, preconditioner=NystroemSolver(rank=rank))
    solution = method.fit(DenseOperator(matrix), regularization).solve(matrix @ normal(30, 2))
    assert solution.converged.all()
    assert solution.iterations.max() <= (9 if rank < 8 else 2)


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
def test_zero_curvature_is_preconditioned_by_a_multiple_of_the_identity(regularization: float) -> None:
    preconditioner = applied(fit(torch.zeros(6, 6).double(), regularization, rank=2).preconditioner())
    torch.testing.assert_close(preconditioner, preconditioner[0, 0] * torch.eye(6, dtype=torch.float64))
    assert preconditioner[0, 0] > 0


@pytest.mark.parametrize("rank", [10, 40])
def test_condition_number_is_within_the_bound_of_the_theory(rank: int) -> None:
    """Frangella, Tropp and Udell (2023), §5: (θ_r + λ + ‖E‖) / λ."""
    matrix, strength = decaying(), 1e-3
    inverse = fit(matrix, strength, rank=rank)
    shifted = matrix + strength * torch.eye(300, dtype=torch.float64)
    root = torch.linalg.cholesky(shifted)
    spectrum = torch.linalg.eigvalsh(root.T @ applied(inverse.preconditioner()) @ root)
    error = torch.linalg.matrix_norm(
        matrix - inverse.vectors @ torch.diag(inverse.values) @ inverse.vectors.T, ord=2
    )
    assert spectrum[-1] / spectrum[0] <= (inverse.values[-1] + strength + error) / strength
    # Better by far than nothing, and than the Woodbury form in its place.
    assert 20 * spectrum[-1] / spectrum[0] <= torch.linalg.cond(shifted)


@BLOCK
def test_pitfall_the_preconditioner_is_really_used(block: bool) -> None:
    """An ill-conditioned head, deflated: a quarter of the iterations, where the diagonal saves none."""
    operator, rhs = DenseOperator(decaying()), normal(300, 3)

    def iterations(preconditioner: Any) -> float:
        method = solvers["cg"].create(rtol=1e-6, atol=0.0, block=block, preconditioner=preconditioner)
        solution = method.fit(operator, 1e-3).solve(rhs)
        assert solution.converged.all()
        expected = torch.linalg.solve(operator.matrix + 1e-3 * torch.eye(300, dtype=torch.float64), rhs)
        assert torch.linalg.norm(solution.value - expected) <= 1e-3 * torch.linalg.norm(expected)
        return solution.iterations.double().mean().item()

    plain, jacobi = iterations(None), iterations(solvers["jacobi"].create())
    assert jacobi > 0.7 * plain
    assert iterations(NystroemSolver(rank=60)) < plain / (2.5 if block else 4)


@BLOCK
def test_iterations_do_not_grow_where_the_rank_suffices(block: bool) -> None:
    """With the whole range deflated, two clusters of eigenvalues are left, however far apart."""
    matrix = symmetric(torch.cat([torch.logspace(2, -2, 20), torch.zeros(80)]))
    for strength in (1e-2, 1e-4, 1e-6):
        method = solvers["cg"].create(rtol=1e-8, atol=0.0, block=block, preconditioner=NystroemSolver(rank=30))
        solution = method.fit(DenseOperator(matrix), strength).solve(normal(100, 2))
        assert solution.converged.all()
        # Two in exact arithmetic.
        assert solution.iterations.max() <= 8


def test_another_regularisation_keeps_the_deflated_form() -> None:
    matrix = decaying(60)
    inverse = fit(matrix, 1e-2, rank=15)
    moved = inverse.preconditioner().with_regularization(1e-4)
    torch.testing.assert_close(applied(moved), applied(inverse.with_regularization(1e-4).preconditioner()))
    assert not torch.allclose(applied(moved), applied(inverse.with_regularization(1e-4)))
    method = solvers["cg"].create(preconditioner=NystroemSolver(rank=15))
    refitted = method.fit(DenseOperator(matrix), 1e-4).preconditioner
    swept = method.fit(DenseOperator(matrix), 1e-2).with_regularization(1e-4).preconditioner
    torch.testing.assert_close(applied(swept), applied(refitted))
