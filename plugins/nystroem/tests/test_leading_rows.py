"""``nystroem`` from the samples that curve most, in place of products with all of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_framework_nystroem import NystroemSolver
from influence_framework_nystroem.sketch import leading_approximation
from torch import nn

import influence_framework as inf
from influence_framework import InvalidInputError, MissingCapabilityError
from influence_framework.lowrank import LowRankInverse
from influence_framework.operators import to_dense
from influence_framework.rows import RootRows
from influence_framework.testing import normal, symmetric

LAMBDA = 1e-2


def problem(dtype: torch.dtype = torch.float64, samples: int = 60) -> inf.Problem:
    """A small net at random parameters: 75 of them, and more rows of a square root than that."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = 2 * torch.randn(samples, 5, dtype=dtype), torch.randint(3, (samples,))
    return inf.Problem.build(net, nn.CrossEntropyLoss(), list(zip(x.split(16), y.split(16), strict=True)))


def operator(source: str = "gauss_newton", **options: Any) -> Any:
    whole = problem(**options)
    return inf.hessian_sources[source].create().operator(whole, whole.parameters)


def test_all_rows_give_the_inverse() -> None:
    curvature = operator()
    size = curvature.shape[0]
    inverse = NystroemSolver(rank=size, leading_rows=180).fit(curvature, LAMBDA)
    exact = torch.linalg.inv(to_dense(curvature) + LAMBDA * torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(inverse @ torch.eye(size, dtype=torch.float64), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_are_the_largest_of_the_rows(dtype: torch.dtype) -> None:
    curvature = operator(dtype=dtype)
    inverse = NystroemSolver(rank=12, leading_rows=40).fit(curvature, LAMBDA)
    _, singular, right = torch.linalg.svd(curvature.leading_rows(40).rows.double(), full_matrices=False)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(inverse.values, singular[:12].square(), rtol=1e4 * precision, atol=0.0)
    overlap = (right[:12] @ inverse.vectors.double()).abs()
    torch.testing.assert_close(overlap, torch.eye(12).double(), rtol=0.0, atol=1e4 * precision)


def test_never_above_the_curvature() -> None:
    curvature = operator()
    inverse = NystroemSolver(rank=20, leading_rows=30).fit(curvature, LAMBDA)
    approximation = inverse.vectors @ torch.diag(inverse.values) @ inverse.vectors.T
    assert torch.linalg.eigvalsh(to_dense(curvature) - approximation)[0] > -1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_more_rows_than_the_rank(dtype: torch.dtype) -> None:
    """By subspace iteration: the first pairs to rounding, the others from below; orthonormal, all of them."""
    curvature = operator(dtype=dtype)
    inverse = NystroemSolver(rank=10, leading_rows=150).fit(curvature, LAMBDA)
    rows = curvature.leading_rows(150).rows.double()
    exact = torch.linalg.svdvals(rows)[:10].square()
    vectors, precision = inverse.vectors.double(), torch.finfo(dtype).eps
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(10).double(), rtol=0.0, atol=1e3 * precision)
    torch.testing.assert_close(inverse.values[:2], exact[:2], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(inverse.values, exact, rtol=0.05, atol=0.0)
    left = rows.T @ rows - vectors @ torch.diag(inverse.values) @ vectors.T
    assert torch.linalg.eigvalsh(left)[0] > -1e2 * precision * exact[0]


def test_of_more_rows_than_parameters_the_smaller_matrix() -> None:
    rows = normal(9, 40).T
    found = leading_approximation(RootRows(rows), 4)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    torch.testing.assert_close(found.values, values.flip(0)[:4])
    overlap = (vectors.flip(1)[:, :4].T @ found.vectors).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("rank", [5, 300])
def test_rows_of_half_precision_and_of_low_rank(rank: int) -> None:
    """Eigenvalues that are zero but for rounding are left out, not divided by."""
    rows = (normal(700, 3) @ normal(800, 3).T).bfloat16()
    found = leading_approximation(RootRows(rows), rank)
    assert found.vectors.dtype is torch.bfloat16
    assert found.vectors.isfinite().all()
    assert 3 <= len(found.values) <= max(rank, 3)


@pytest.mark.parametrize("block", [False, True], ids=["columns", "block"])
@pytest.mark.parametrize("source", ["gauss_newton", "hessian"])
def test_in_front_of_conjugate_gradients(source: str, block: bool) -> None:
    curvature = operator(source)
    shift = 1e-3 + 1.1 * max(0.0, -torch.linalg.eigvalsh(to_dense(curvature))[0].item())
    columns = normal(curvature.shape[0], 2)
    preconditioner = NystroemSolver(rank=30, leading_rows=60, checks=0)
    counts = []
    for chosen in (preconditioner, None):
        method = inf.solvers["cg"].create(rtol=1e-9, preconditioner=chosen, block=block)
        solution = method.fit(curvature, shift).solve(columns)
        assert solution.converged.all()
        counts.append(int(solution.iterations.sum()))
        torch.testing.assert_close(
            to_dense(curvature) @ solution.value + shift * solution.value, columns, rtol=0, atol=1e-7
        )
    assert counts[0] < (0.75 if source == "gauss_newton" else 1.0) * counts[1]


def test_as_a_preconditioner_it_is_its_own_inverse_at_half_the_flops() -> None:
    curvature = operator()
    inverse = NystroemSolver(rank=20, leading_rows=40).fit(curvature, LAMBDA)
    front = inverse.preconditioner()
    columns = normal(curvature.shape[0], 3)
    assert isinstance(front, LowRankInverse)
    assert (front.tail, front.rough) == (0.0, True)
    torch.testing.assert_close(front @ columns, inverse @ columns)
    singular = inverse.with_regularization(0.0).preconditioner()
    assert torch.linalg.eigvalsh(singular @ torch.eye(len(columns), dtype=torch.float64))[0] > 0


def test_negative_curvature_is_still_looked_for() -> None:
    """The rows are those of a positive semidefinite part, and so know nothing of it."""
    curvature = operator("hessian")
    lowest = -torch.linalg.eigvalsh(to_dense(curvature))[0].item()
    with pytest.raises(inf.SingularOperatorError, match="indefinite"):
        NystroemSolver(rank=20, leading_rows=60).fit(curvature, 0.9 * lowest)
    with pytest.warns(inf.IndefiniteOperatorWarning, match="indefinite"):
        NystroemSolver(rank=20, leading_rows=60).fit(curvature, 3 * lowest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NystroemSolver(rank=20, leading_rows=60, checks=0).fit(curvature, 0.9 * lowest)


@pytest.mark.parametrize("front", [False, True], ids=["alone", "preconditioner"])
def test_comes_back_from_a_folder(tmp_path: Path, front: bool) -> None:
    whole = problem()
    sketch = {"name": "nystroem", "rank": 20, "leading_rows": 40}
    solver = {"name": "cg", "preconditioner": sketch} if front else sketch
    data = list(whole.data)
    model = inf.compose(whole.model, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=LAMBDA)
    model.fit(data)
    model.save(tmp_path / "model")
    x, y = data[0]
    again = inf.load(tmp_path / "model", whole.model, nn.CrossEntropyLoss(), data=data)
    torch.testing.assert_close(again.influences(x, y), model.influences(x, y), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 30, "leading_rows": 20}, "at most leading_rows=20, got 30"),
        ({"rank": "auto", "leading_rows": 20}, "at most leading_rows=20, got 'auto'"),
        ({"rank": 5, "leading_rows": 0}, "leading_rows must be a positive integer or None, got 0"),
        ({"rank": 5, "leading_rows": 20, "power_passes": 1}, "power_passes=1 improves random test vectors"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        NystroemSolver(**options)


def test_an_operator_without_samples_is_refused() -> None:
    matrix = inf.DenseOperator(symmetric(torch.ones(6, dtype=torch.float64)))
    with pytest.raises(MissingCapabilityError, match="LeadingRows"):
        NystroemSolver(rank=2, leading_rows=3).fit(matrix, LAMBDA)
