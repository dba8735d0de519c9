"""``nystroem`` on indefinite curvature: noticed in the sketch and around it, never clamped without a word."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from influence_framework_nystroem import NystroemSolver
from influence_framework_nystroem.sketch import Sketch

from influence_framework import DenseOperator, IndefiniteOperatorWarning, SingularOperatorError
from influence_framework.testing import ProductsOnly, symmetric

LAMBDA = 1e-2


def with_spectrum(*parts: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return symmetric(torch.cat([part.double() for part in parts]), seed)


def hidden(magnitude: float, size: int = 400, seed: int = 0) -> torch.Tensor:
    """A single negative eigenvalue among many positive ones: a sketch of ten vectors does not see it."""
    top, bulk = torch.logspace(1, -1, 6), torch.linspace(2e-3, 1e-3, size - 7)
    return with_spectrum(top, bulk, torch.tensor([-magnitude], dtype=torch.float64), seed=seed)


def spread(magnitude: float, size: int = 200) -> torch.Tensor:
    """Half of the spectrum negative: any sketch sees it."""
    return with_spectrum(torch.logspace(1, -1, 6), torch.linspace(-magnitude, 1e-3, size - 6))


def compressed(matrix: torch.Tensor, solver: NystroemSolver) -> torch.Tensor:
    """The eigenvalues of ``Ωᵀ C Ω`` that the solver works with."""
    generator = torch.Generator().manual_seed(solver.seed)
    empty = Sketch.empty(DenseOperator(matrix))
    sketch = empty.widened(matrix.__matmul__, int(solver.rank) + solver.oversampling, 0, generator)
    return torch.linalg.eigvalsh(sketch.test.T @ sketch.product)


def test_pitfall_negative_eigenvalues_clamped_without_a_word() -> None:
    """With the negative half of the spectrum taken for zero, the inverse is off by almost all of itself."""
    matrix = with_spectrum(torch.logspace(0, -2, 20), -torch.logspace(0, -2, 20))
    identity = torch.eye(40, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    clamped = vectors @ torch.diag(1 / (values.clamp_min(0) + LAMBDA)) @ vectors.T
    exact = torch.linalg.inv(matrix + LAMBDA * identity)
    assert torch.linalg.norm(clamped - exact) > 0.9 * torch.linalg.norm(exact)
    for rank in (5, 20, 40):
        with pytest.raises(SingularOperatorError, match="has nothing to do with that of C"):
            NystroemSolver(rank=rank).fit(DenseOperator(matrix), LAMBDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_what_the_sketch_does_not_see_is_seen_around_it(seed: int, dtype: torch.dtype) -> None:
    matrix, solver = hidden(2 * LAMBDA, seed=seed), NystroemSolver(rank=10, seed=seed)
    assert compressed(matrix, solver)[0] > 0
    with pytest.raises(SingularOperatorError, match="indefinite"):
        solver.fit(DenseOperator(matrix.to(dtype)), LAMBDA)


@pytest.mark.parametrize("rank", [10, 40])
@pytest.mark.parametrize("times", [1.5, 5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_the_suggestion_is_twice_the_magnitude_of_the_eigenvalue(seed: int, times: float, rank: int) -> None:
    """However much of its eigenvector the sketch has mixed into large eigenpairs of its own."""
    solver = NystroemSolver(rank=rank, seed=seed)
    with pytest.raises(SingularOperatorError) as caught:
        solver.fit(DenseOperator(hidden(times * LAMBDA, seed=seed)), LAMBDA)
    exact = 2 * times * LAMBDA
    assert 0.95 * exact <= caught.value.suggested_regularization <= exact * (1 + 1e-9)


def test_condition_and_suggestion_are_those_of_the_shifted_matrix() -> None:
    matrix = with_spectrum(torch.tensor([-0.5, 1.0, 2.0]))
    with pytest.raises(SingularOperatorError, match=r"eigenvalue of -0\.5 or less.*at least 1,") as caught:
        NystroemSolver(rank=3).fit(DenseOperator(matrix), 0.25)
    assert caught.value.condition == pytest.approx(2.25 / 0.25)
    assert caught.value.suggested_regularization == pytest.approx(1.0)
    with pytest.warns(IndefiniteOperatorWarning):
        NystroemSolver(rank=3).fit(DenseOperator(matrix), caught.value.suggested_regularization)


@pytest.mark.parametrize("matrix", [hidden(2e-3), spread(2e-3)], ids=["hidden", "spread"])
@pytest.mark.parametrize("rank", [10, 60])
def test_a_small_negative_part_is_warned_of_and_replaced_by_zero(matrix: torch.Tensor, rank: int) -> None:
    with pytest.warns(IndefiniteOperatorWarning, match="takes for zero") as caught:
        inverse = NystroemSolver(rank=rank).fit(DenseOperator(matrix), LAMBDA)
    assert len(caught) == 1
    assert -2e-3 * (1 + 1e-9) <= inverse.lowest <= -1.8e-3
    assert f"{-inverse.lowest / LAMBDA:.1%} too small" in str(caught[0].message)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    applied = inverse @ identity
    spectrum = torch.linalg.eigvalsh((applied + applied.T) / 2)
    assert spectrum[0] > 0
    assert spectrum[-1] <= 1 / LAMBDA * (1 + 1e-9)
    # 20 % along the negative eigenvectors, and what the sketch leaves out of a tail of 2e-3.
    exact = torch.linalg.inv(matrix + LAMBDA * identity)
    assert torch.linalg.matrix_norm(applied - exact, ord=2) <= 0.4 * torch.linalg.matrix_norm(exact, ord=2)


def test_a_negligible_negative_part_is_not_worth_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse = NystroemSolver(rank=10).fit(DenseOperator(spread(2e-3)), 10.0)
        assert inverse.lowest < 0
    with pytest.warns(IndefiniteOperatorWarning):
        inverse.with_regularization(LAMBDA)
    with pytest.raises(SingularOperatorError):
        inverse.with_regularization(1e-4)


@pytest.mark.parametrize(
    "matrix",
    [
        with_spectrum(10 / torch.arange(1, 400), torch.tensor([-0.1])),
        with_spectrum(10 / torch.arange(1, 400), torch.tensor([-0.02])),
        with_spectrum(torch.logspace(1, -3, 395), torch.full((5,), -0.02)),
    ],
    ids=["large", "small", "several"],
)
@pytest.mark.parametrize("rank", [10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_a_slowly_decaying_spectrum_does_not_hide_it(matrix: torch.Tensor, rank: int, seed: int) -> None:
    with pytest.raises(SingularOperatorError, match="indefinite"):
        NystroemSolver(rank=rank, seed=seed).fit(DenseOperator(matrix), LAMBDA)


@pytest.mark.parametrize("checks", [32, 7])
def test_checks_are_as_many_as_the_spectrum_that_is_left_asks_for(checks: int) -> None:
    counts = []
    for magnitude in (1e-6, LAMBDA, 10 * LAMBDA, 1e4 * LAMBDA):
        operator = ProductsOnly(with_spectrum(torch.linspace(10, 1, 10), magnitude * torch.linspace(2, 1, 390)))
        NystroemSolver(rank=30, oversampling=0, checks=checks).fit(operator, LAMBDA)
        assert operator.widths[0] == 30
        counts.append(len(operator.widths) - 1)
    assert counts == sorted(counts)
    assert counts[0] == 5
    assert counts[-1] == checks


def test_no_checks_where_the_operator_claims_to_need_none() -> None:
    class Semidefinite(ProductsOnly):
        positive_semidefinite = True

    operator = Semidefinite(with_spectrum(10 / torch.arange(1, 400)))
    NystroemSolver(rank=10).fit(operator, LAMBDA)
    assert operator.widths == [20]


def test_an_eigenvalue_that_cancels_the_regularisation_is_refused() -> None:
    inverse = NystroemSolver(rank=3).fit(DenseOperator(with_spectrum(torch.tensor([0.5, 1.0, 2.0]))), 0.25)
    with pytest.raises(SingularOperatorError, match="has nothing to do"):
        replace(inverse, lowest=-0.25)


def test_no_checks_leave_it_to_the_sketch() -> None:
    solver = NystroemSolver(rank=10, checks=0)
    assert solver.fit(DenseOperator(hidden(2e-3)), LAMBDA).lowest == 0.0
    with pytest.warns(IndefiniteOperatorWarning):
        solver.fit(DenseOperator(spread(2e-3)), LAMBDA)


def test_negative_curvature_once_seen_is_followed() -> None:
    matrix = with_spectrum(torch.logspace(1, -1, 6), torch.linspace(-2e-3, 2e-3, 994))
    with pytest.warns(IndefiniteOperatorWarning):
        glance, look = (
            NystroemSolver(rank=10, checks=checks).fit(DenseOperator(matrix), LAMBDA).lowest
            for checks in (0, 10)
        )
    assert glance == look <= -1.8e-3


@pytest.mark.parametrize("checks", [0, 6])
def test_the_full_space_knows_the_most_negative_eigenvalue(checks: int) -> None:
    matrix = with_spectrum(torch.logspace(1, -1, 30), torch.tensor([-2e-3], dtype=torch.float64))
    with pytest.warns(IndefiniteOperatorWarning):
        inverse = NystroemSolver(rank=31, checks=checks).fit(DenseOperator(matrix), LAMBDA)
    assert inverse.lowest == pytest.approx(-2e-3, rel=1e-9)


@pytest.mark.parametrize(("checks", "sought"), [(0, False), (1, False), (32, True), (100, True)])
def test_only_with_checks_enough_it_looks_in_place_of_others(checks: int, sought: bool) -> None:
    assert NystroemSolver(checks=checks).finds_indefinite is sought


class Inexact(ProductsOnly):
    """Products of a coarser precision than their dtype's, as those of TF32."""

    def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
        product = super().__matmul__(columns)
        return product + 1e-10 * product.abs().max() * torch.sin(1e3 * columns)


def test_a_sketch_of_the_whole_space_needs_no_checks() -> None:
    operator = Inexact(with_spectrum(torch.linspace(10, 1, 40)))
    NystroemSolver(rank=40, oversampling=10).fit(operator, LAMBDA)
    assert operator.widths == [40]


@pytest.mark.parametrize("seed", range(3))
def test_a_small_negative_eigenvalue_leaves_as_many_checks_as_a_larger_one_needs(seed: int) -> None:
    # Seen in the sketch already, and not what the search is for.
    negative, between = torch.full((360,), -0.4 * LAMBDA), torch.full((30,), 40 * LAMBDA)
    operator = ProductsOnly(with_spectrum(torch.cat([torch.linspace(10, 1, 10), between, negative])))
    with pytest.warns(IndefiniteOperatorWarning):
        NystroemSolver(rank=20, oversampling=0, seed=seed).fit(operator, LAMBDA)
    # The search ends where it has converged; 28 products is what the spectrum asks for.
    assert len(operator.widths) - 1 >= 15
