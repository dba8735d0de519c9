"""MINRES against dense inverses in float64, mostly of indefinite matrices."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from influence_minres import MinresInverse, MinresSolver
from scipy.sparse.linalg import minres
from torch import nn

import influence_framework as inf
from influence_framework.testing import ProductsOnly, check_solver, normal, symmetric

INDEFINITE = (-3.0, -0.4, -1e-3, 2e-3, 0.1, 0.7, 1.0, 2.0, 5.0, 40.0)


def inverse(
    matrix: torch.Tensor, regularization: float = 0.0, *, rtol: float = 1e-10, maxiter: int | None = None
) -> MinresInverse:
    return MinresSolver(rtol, maxiter).fit(ProductsOnly(matrix), regularization)


def dense(matrix: torch.Tensor, regularization: float, columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(matrix + regularization * torch.eye(len(matrix), dtype=matrix.dtype), columns)


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-10}, {"rtol": 1e-2, "maxiter": 1000}])
def test_conformance(options: dict[str, float]) -> None:
    check_solver({"name": "minres", **options})


@pytest.mark.parametrize("regularization", [0.0, 0.05, -0.2])
def test_an_indefinite_matrix(regularization: float) -> None:
    matrix, columns = symmetric(INDEFINITE), normal(10, 4)
    solution = inverse(matrix, regularization).solve(columns)
    assert solution.reason == (inf.StopReason.CONVERGED,) * 4
    # An error of the residual, over the eigenvalue nearest to zero.
    torch.testing.assert_close(solution.value, dense(matrix, regularization, columns), rtol=0, atol=1e-6)
    assert (solution.residual <= 1e-10).all()
    assert (solution.iterations >= 10).all()


def test_it_starts_again_where_scipy_stops_early() -> None:
    matrix, column = (
        symmetric(torch.logspace(-4, 2, 30, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(15)),
        normal(30),
    )
    one = torch.from_numpy(minres(matrix.numpy(), column.numpy(), rtol=1e-6, maxiter=1000)[0])
    assert torch.linalg.vector_norm(column - matrix @ one) > 1e-4 * torch.linalg.vector_norm(column)
    solution = inverse(matrix, rtol=1e-6, maxiter=1000).solve(column)
    assert solution.reason == (inf.StopReason.CONVERGED,)
    assert torch.linalg.vector_norm(column - matrix @ solution.value) <= 1e-6 * torch.linalg.vector_norm(column)


def test_another_regularization() -> None:
    matrix, columns = symmetric(INDEFINITE), normal(10, 2)
    moved = inverse(matrix, 5.0).with_regularization(0.05)
    assert moved.regularization == 0.05
    torch.testing.assert_close(moved @ columns, dense(matrix, 0.05, columns), rtol=0, atol=1e-6)


def test_the_iteration_limit_is_reported_once_and_by_nothing_else() -> None:
    matrix, columns = symmetric(INDEFINITE), normal(10, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = inverse(matrix, maxiter=4).solve(columns)
    assert {warning.category for warning in caught} <= {inf.ConvergenceWarning}
    assert solution.reason == (inf.StopReason.ITERATION_LIMIT,) * 2
    assert not solution.converged.any()
    assert solution.iterations.tolist() == [4, 4]
    residuals = torch.linalg.vector_norm(columns - matrix @ solution.value, dim=0)
    torch.testing.assert_close(solution.residual, residuals / torch.linalg.vector_norm(columns, dim=0))
    # Four steps of a method of minimal residuals are better than none.
    assert (solution.residual < 1).all()


def test_a_system_without_a_solution_is_reported() -> None:
    matrix = torch.diag(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    columns = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inf.ConvergenceWarning)
        solution = inverse(matrix).solve(columns)
    assert solution.reason == (inf.StopReason.CONVERGED, inf.StopReason.STAGNATED)
    torch.testing.assert_close(solution.value[:, 0], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    # What no solution takes away; a sum of minimal residuals comes near to the minimal one.
    assert solution.residual[1].item() == pytest.approx(3 / 14**0.5, rel=1e-2)


def test_what_is_not_finite_is_reported() -> None:
    matrix, columns = symmetric(INDEFINITE), normal(10, 3)
    columns[3, 1] = float("nan")
    broken = torch.diag(torch.tensor([float("inf"), 1.0, 1.0], dtype=torch.float64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reasons = inverse(matrix).solve(columns).reason
        (other,) = inverse(broken).solve(normal(3)).reason
    assert reasons == (inf.StopReason.CONVERGED, inf.StopReason.NOT_FINITE, inf.StopReason.CONVERGED)
    assert other is inf.StopReason.NOT_FINITE
    assert {warning.category for warning in caught} <= {inf.ConvergenceWarning}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_dtype_can_not_give_is_not_claimed(dtype: torch.dtype) -> None:
    matrix, columns = symmetric(INDEFINITE, dtype=dtype), normal(10, 3, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inf.ConvergenceWarning)
        solution = inverse(matrix, 0.05, maxiter=1000).solve(columns)
    assert solution.value.dtype is dtype
    assert set(solution.reason) <= {inf.StopReason.STAGNATED, inf.StopReason.ITERATION_LIMIT}
    # To what rounding of a matrix of norm 40 and a solution of some 20 times its right-hand side leaves.
    assert (solution.residual < 1e3 * torch.finfo(dtype).eps).all()


def test_what_rounding_to_the_dtype_loses_is_not_claimed() -> None:
    """Where λ is all there is, the method succeeds in float64, and the value returned is float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inf.ConvergenceWarning)
        solution = inverse(torch.zeros(3, 3, dtype=torch.float32), 0.3).solve(normal(3, dtype=torch.float32))
    assert solution.reason == (inf.StopReason.STAGNATED,)
    assert 1e-10 < solution.residual.item() < 1e-6


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"rtol": 1.0}, {"rtol": float("nan")}, {"maxiter": 0}])
def test_options_that_can_not_be_used(options: dict[str, float]) -> None:
    with pytest.raises(inf.InvalidInputError, match=next(iter(options))):
        inf.solvers["minres"].create(**options)


def test_scores_from_the_hessian_of_a_net() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    for seed, parameter in enumerate(net.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    x, y = normal(12, 2, seed=9), torch.arange(12) % 2
    loss = nn.CrossEntropyLoss()
    names, flat = (
        list(dict(net.named_parameters())),
        torch.cat([p.detach().flatten() for p in net.parameters()]),
    )
    sizes, shapes = [p.numel() for p in net.parameters()], [p.shape for p in net.parameters()]

    def mean_loss(vector: torch.Tensor, rows: slice) -> torch.Tensor:
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        called = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), x[rows])
        return loss(called, y[rows])

    hessian = torch.func.hessian(mean_loss)(flat, slice(None))
    assert np.linalg.eigvalsh(hessian.numpy())[0] < -0.02, "it is meant to be indefinite"
    rows = torch.stack([torch.func.grad(mean_loss)(flat, slice(i, i + 1)) for i in range(12)])
    expected = rows @ dense(hessian, 0.01, rows.T)
    model = inf.compose(
        net, loss, solver={"name": "minres", "rtol": 1e-10}, source="hessian", hessian_regularization=0.01
    )
    torch.testing.assert_close(model.fit([(x, y)]).influences(x, y), expected, rtol=1e-6, atol=1e-6)
