"""``nystroem``: exact up to the rank, close to the best beyond it, and every option does what it says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from influence_framework_nystroem import NystroemSolver
from influence_framework_nystroem.sketch import Sketch
from influence_framework_nystroem.spectrum import ritz_values

from influence_framework import (
    ConvergenceWarning,
    DenseOperator,
    StopReason,
)
from influence_framework.testing import ProductsOnly, normal, symmetric

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def decaying(size: int = 120, last: float = -6.0) -> torch.Tensor:
    return symmetric(torch.logspace(1, last, size, dtype=torch.float64))


def of_rank(rank: int, size: int = 40) -> torch.Tensor:
    return symmetric([*torch.logspace(1, -1, rank).tolist(), *[0.0] * (size - rank)])


def approximation_of(inverse: Any) -> torch.Tensor:
    return inverse.vectors @ torch.diag(inverse.values) @ inverse.vectors.T


def error_of(inverse: Any) -> torch.Tensor:
    return torch.linalg.matrix_norm(inverse.base.matrix - approximation_of(inverse), ord=2)


@pytest.mark.parametrize("oversampling", [0, 5])
@pytest.mark.parametrize("count", [1, 4, 60], ids=["one", "few", "more than P"])
@pytest.mark.parametrize("rank", [8, 11, 40, 99], ids=["its rank", "above it", "P", "above P"])
def test_exact_where_the_rank_suffices(rank: int, count: int, oversampling: int) -> None:
    matrix, columns = of_rank(8), normal(40, count)
    solver = NystroemSolver(rank=rank, oversampling=oversampling)
    solution = solver.fit(DenseOperator(matrix), 1e-4).solve(columns)
    expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(40, dtype=torch.float64), columns)
    # Rounding of 1e-15 times a condition number of 1e5, and some.
    assert torch.linalg.norm(solution.value - expected) <= 1e-9 * torch.linalg.norm(expected)
    assert solution.converged.all()
    assert set(solution.reason) == {StopReason.APPROXIMATION}
    assert solution.residual.isnan().all()


@pytest.mark.parametrize("regularization", [1e-5, 0.0])
def test_the_full_space_inverts_a_definite_matrix(regularization: float) -> None:
    matrix = decaying(30, last=-4.0)
    inverse = NystroemSolver(rank=30).fit(DenseOperator(matrix), regularization)
    identity = torch.eye(30, dtype=torch.float64)
    expected = torch.linalg.inv(matrix + regularization * identity)
    assert torch.linalg.norm(inverse @ identity - expected) <= 1e-8 * torch.linalg.norm(expected)


def test_without_regularisation_it_is_the_pseudo_inverse() -> None:
    matrix = of_rank(8)
    inverse = NystroemSolver(rank=20).fit(DenseOperator(matrix), 0.0)
    assert len(inverse.values) == 8
    torch.testing.assert_close(
        inverse @ torch.eye(40).double(), torch.linalg.pinv(matrix), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("rank", [10, 30, 60])
def test_errors_are_within_the_bounds_of_the_theory(rank: int) -> None:
    matrix, strength = decaying(), 1e-3
    inverse = NystroemSolver(rank=rank, oversampling=5).fit(DenseOperator(matrix), strength)
    remainder = torch.linalg.eigvalsh(matrix - approximation_of(inverse))
    best = torch.linalg.eigvalsh(matrix)[-rank - 1]
    # Positive semidefinite, and within a factor of the best: algorithm 3 of Tropp et al. loses a little.
    assert remainder[0] >= -1e-12
    assert best * (1 - 1e-9) <= remainder[-1] <= 10 * best
    identity = torch.eye(120, dtype=torch.float64)
    error = torch.linalg.matrix_norm(inverse @ identity - torch.linalg.inv(matrix + strength * identity), ord=2)
    assert error <= remainder[-1] / (strength * (remainder[-1] + strength)) * (1 + 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_devices(dtype: torch.dtype, device: str) -> None:
    matrix, columns = of_rank(8), normal(40, 3)
    operator = DenseOperator(matrix.to(device, dtype))
    value = NystroemSolver(rank=12).fit(operator, 1e-2) @ columns.to(device, dtype)
    expected = torch.linalg.solve(matrix + 1e-2 * torch.eye(40, dtype=torch.float64), columns)
    assert value.dtype == dtype
    # The condition number is 1e3.
    tolerance = 1e5 * torch.finfo(dtype).eps
    assert torch.linalg.norm(value.cpu() - expected) <= tolerance * torch.linalg.norm(expected)


def test_vectors_no_columns_and_zero_columns() -> None:
    inverse = NystroemSolver(rank=5).fit(DenseOperator(decaying(20)), 0.1)
    columns = torch.stack([normal(20), torch.zeros(20, dtype=torch.float64)], dim=1)
    solution = inverse.solve(columns)
    torch.testing.assert_close(inverse.solve(columns[:, 0]).value, solution.value[:, 0])
    torch.testing.assert_close(inverse @ columns, solution.value)
    assert not solution.value[:, 1].any()
    assert inverse.solve(columns[:, :0]).value.shape == (20, 0)


@pytest.mark.parametrize("regularization", [0.0, 0.5])
def test_zero_curvature(regularization: float) -> None:
    inverse = NystroemSolver(rank=3).fit(DenseOperator(torch.zeros(6, 6)), regularization)
    expected = torch.ones(6) / regularization if regularization else torch.zeros(6)
    torch.testing.assert_close(inverse @ torch.ones(6), expected)
    assert inverse.error_estimate == 0.0


@pytest.mark.parametrize("rank", [10, "auto"])
def test_seed_decides_and_global_state_is_left_alone(rank: Any) -> None:
    operator, state = DenseOperator(decaying()), torch.get_rng_state()
    first, again = (NystroemSolver(rank=rank, seed=3).fit(operator, 1e-2) for _ in range(2))
    assert torch.equal(first.vectors, again.vectors)
    assert first.error_estimate == again.error_estimate
    assert torch.equal(torch.get_rng_state(), state)
    other = NystroemSolver(rank=rank, seed=4).fit(operator, 1e-2)
    assert other.vectors.shape != first.vectors.shape or not torch.equal(other.vectors, first.vectors)


def test_one_product_holds_the_whole_sketch() -> None:
    operator = ProductsOnly(decaying())
    NystroemSolver(rank=20, oversampling=7, checks=0).fit(operator, 1e-2)
    assert operator.widths == [27]
    operator = ProductsOnly(decaying())
    NystroemSolver(rank=20, power_passes=2, checks=4).fit(operator, 1e-2)
    assert operator.widths == [30, 30, 30, 1, 1, 1, 1]


@pytest.mark.parametrize("option", ["oversampling", "power_passes"])
def test_more_work_gives_better_eigenpairs(option: str) -> None:
    operator = DenseOperator(decaying(last=-1.0))
    errors = [
        torch.stack([error_of(NystroemSolver(rank=10, seed=seed, **{option: n}).fit(operator, 1.0))
                     for seed in range(5)]).mean()
        for n in (0, 2, 8)
    ]  # fmt: skip
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_widened_test_matrix_stays_orthonormal(passes: int) -> None:
    """Products of later blocks lie almost in the span of the first: projecting once is not enough."""
    matrix = decaying(80, last=-12.0)
    sketch, generator = Sketch.empty(DenseOperator(matrix)), torch.Generator().manual_seed(0)
    for width in (20, 40, 200, 300):
        sketch = sketch.widened(matrix.__matmul__, width, passes, generator)
        assert sketch.test.shape == (80, min(width, 80))
        gram = sketch.test.T @ sketch.test
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0.0, atol=1e-13)
        torch.testing.assert_close(sketch.product, matrix @ sketch.test)


@pytest.mark.parametrize("tolerance", [1.0, 0.01])
def test_auto_reaches_the_regularisation_and_keeps_every_product(tolerance: float) -> None:
    operator = ProductsOnly(decaying(300, last=-9.0))
    inverse = NystroemSolver(rank="auto", tolerance=tolerance, checks=0).fit(operator, 0.05)
    assert error_of(inverse) <= 1.05 * tolerance * 0.05
    assert inverse.error_estimate == pytest.approx(error_of(inverse).item(), rel=0.1)
    blocks = [width for width in operator.widths if width > 1]
    assert blocks == [42, 32, 64, 128][: len(blocks)]
    assert sum(blocks) - 10 == len(inverse.values) == {1.0: 128, 0.01: 256}[tolerance]


def test_auto_gives_up_at_max_rank_and_says_how_far_it_came() -> None:
    operator = ProductsOnly(decaying(300, last=-4.0))
    with pytest.warns(ConvergenceWarning, match=r"max_rank=50 with an error of about .*raise max_rank"):
        inverse = NystroemSolver(rank="auto", max_rank=50, checks=0).fit(operator, 0.05)
    assert [width for width in operator.widths if width > 1] == [42, 18]
    assert len(inverse.values) == 50


@pytest.mark.parametrize("strength", [1e-6, 1e-18])
@pytest.mark.parametrize("size", [5, 40])
def test_auto_ends_at_the_full_space(size: int, strength: float) -> None:
    matrix = symmetric(torch.linspace(1.0, 2.0, size))
    inverse = NystroemSolver(rank="auto", oversampling=10).fit(DenseOperator(matrix), strength)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(inverse @ identity, torch.linalg.inv(matrix + strength * identity))


@pytest.mark.parametrize("rank", [1, 25])
@pytest.mark.parametrize("seed", range(4))
def test_error_estimate_is_close_from_below(seed: int, rank: int) -> None:
    inverse = NystroemSolver(rank=rank, seed=seed).fit(DenseOperator(decaying()), 1e-2)
    assert inverse.error is None
    assert 0.9 * error_of(inverse) <= inverse.error_estimate <= error_of(inverse) * (1 + 1e-9)


def test_ritz_values_stay_within_the_spectrum_however_bad_the_preconditioner() -> None:
    """This one turns every residual back into the space that there is, up to one part in ten million."""
    matrix, basis = symmetric(torch.linspace(1.0, 2.0, 20)), torch.linalg.qr(normal(20, 3)).Q
    back = basis[:, :1] + 1e-7 * normal(20, 1, seed=2)
    products = matrix @ basis
    seen = ritz_values(
        matrix.__matmul__, lambda r: r + 1e16 * back @ (back.T @ r), basis, products, basis.T @ products
    )
    counts = []
    for values in seen:
        assert values[0] >= 1 - 1e-13
        assert values[-1] <= 2 + 1e-13
        counts.append(len(values))
    assert counts == list(range(3, 3 + len(counts)))
    assert values[0] <= 1 + 1e-8


def test_another_regularisation_costs_nothing() -> None:
    operator, vector = ProductsOnly(decaying()), normal(120)
    inverse = NystroemSolver(rank=30).fit(operator, 1e-2)
    spent = len(operator.widths)
    moved = inverse.with_regularization(1e-3)
    assert len(operator.widths) == spent
    torch.testing.assert_close(moved @ vector, NystroemSolver(rank=30).fit(operator, 1e-3) @ vector)


def test_auto_fits_again_for_a_regularisation_that_needs_more() -> None:
    operator, vector = ProductsOnly(decaying(300, last=-4.0)), normal(300)
    solver = NystroemSolver(rank="auto")
    inverse = solver.fit(operator, 0.05)
    spent = len(operator.widths)
    assert len(inverse.with_regularization(0.5).values) == len(inverse.values)
    assert len(operator.widths) == spent
    smaller = inverse.with_regularization(1e-3)
    assert len(smaller.values) > len(inverse.values)
    torch.testing.assert_close(smaller @ vector, solver.fit(operator, 1e-3) @ vector)


def test_progress_counts_columns(capsys: pytest.CaptureFixture[str]) -> None:
    operator = DenseOperator(decaying())
    NystroemSolver(rank=20, checks=0).fit(operator, 1.0)
    assert not capsys.readouterr().err
    NystroemSolver(rank=20, checks=3, progress=True).fit(operator, 1.0)
    assert "33column" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positive_semidefinite_curvature_is_not_complained_about(dtype: torch.dtype) -> None:
    spectra = [torch.logspace(2, -12, 90), torch.cat([torch.rand(5) + 1, torch.zeros(85)]), torch.ones(90)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in spectra:
            for seed in range(5):
                for rank in (3, 30, 90):
                    operator = DenseOperator(symmetric(values, seed).to(dtype))
                    assert NystroemSolver(rank=rank, seed=seed).fit(operator, 0.0).lowest == 0.0
