"""``lissa``: what the recursion converges to, what each option does, and what a solve costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from influence_framework_lissa import LissaSolver, register_solvers

from influence_framework import (
    ConvergenceWarning,
    InvalidInputError,
    Solution,
    StopReason,
)
from influence_framework.testing import ProductsOnly, normal, symmetric

FLOAT = torch.float64


class Sampled(ProductsOnly):
    """The mean of matrices, which are its mini-batches."""

    def __init__(self, *matrices: torch.Tensor) -> None:
        super().__init__(torch.stack(matrices).mean(0))
        self.matrices = matrices
        # All mini-batches keep their columns in one list.
        self.drawn: list[torch.Tensor] = []

    def minibatches(self, generator: torch.Generator) -> Iterator[ProductsOnly]:
        while True:
            for index in torch.randperm(len(self.matrices), generator=generator).tolist():
                batch = ProductsOnly(self.matrices[index])
                batch.columns = self.drawn
                yield batch

    @property
    def drawn_widths(self) -> list[int]:
        """How many columns each product with a mini-batch had."""
        return [columns.shape[1] for columns in self.drawn]


def noisy(count: int = 50, size: int = 12, rows: int = 8, seed: int = 0) -> Sampled:
    """Second moments of small samples of features whose variances fall from 1 to 0.05."""
    factors = normal(count, rows, size, seed=seed) * torch.logspace(0, -0.65, size, dtype=FLOAT)
    return Sampled(*(factors.mT @ factors / rows))


def shifted(matrix: torch.Tensor, amount: float) -> torch.Tensor:
    return matrix + amount * torch.eye(len(matrix), dtype=matrix.dtype)


def true_residuals(
    operator: ProductsOnly, regularization: float, solution: Solution, b: torch.Tensor
) -> torch.Tensor:
    return (b - shifted(operator.matrix, regularization) @ solution.value).norm(dim=0) / b.norm(dim=0)


@pytest.mark.parametrize("scale", ["auto", 8.0])
@pytest.mark.parametrize("count", [1, 4, 45], ids=["one", "few", "more than P"])
def test_equals_the_dense_inverse_where_all_mini_batches_are_the_whole(scale: float | str, count: int) -> None:
    operator, b = Sampled(symmetric(torch.logspace(-2, 1, 30))), normal(30, count)
    solution = LissaSolver(scale=scale, rtol=1e-9, maxiter=30_000).fit(operator, 0.02).solve(b)
    expected = torch.linalg.solve(shifted(operator.matrix, 0.02), b)
    assert solution.converged.all()
    assert (true_residuals(operator, 0.02, solution, b) <= 1e-9).all()
    # Condition number 500 times the tolerance.
    assert (solution.value - expected).norm() <= 5e-7 * expected.norm()


@pytest.mark.parametrize("dampen", [0.0, 0.25])
def test_plain_recursion_is_the_documented_one(dampen: float) -> None:
    operator, b, scale = Sampled(symmetric(torch.logspace(-1, 1, 8))), normal(8, 3), 9.0
    h = b.clone()
    for _ in range(20):
        h = b + (1 - dampen) * h - shifted(operator.matrix, 0.1) @ h / scale
    solver = LissaSolver(averaging=None, dampen=dampen, scale=scale, maxiter=20)
    with (
        pytest.warns(ConvergenceWarning, match="those of λ = 2.35, not of λ = 0.1") if dampen else nullcontext()
    ):
        inverse = solver.fit(operator, 0.1)
    with pytest.warns(ConvergenceWarning, match="iteration limit"):
        solution = inverse.solve(b)
    torch.testing.assert_close(solution.value, h / scale)
    assert solution.iterations.tolist() == [20] * 3
    torch.testing.assert_close(solution.residual, true_residuals(operator, 0.1, solution, b))


@pytest.mark.parametrize("averaging", [32, None])
def test_dampening_adds_to_the_regularisation(averaging: int | None) -> None:
    operator, b = Sampled(symmetric(torch.logspace(-1, 1, 8))), normal(8, 3)
    solver = LissaSolver(dampen=0.2, scale=8.0, rtol=1e-10, averaging=averaging)
    with pytest.warns(ConvergenceWarning, match=r"those of λ = 1\.7, not of λ = 0\.1\. Use dampen=0") as caught:
        inverse = solver.fit(operator, 0.1)
    assert len(caught) == 1
    solution = inverse.solve(b)
    expected = torch.linalg.solve(shifted(operator.matrix, 0.1 + 0.2 * 8.0), b)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-10)
    assert solution.converged.all()
    # What is reported stays the residual of C + λI.
    torch.testing.assert_close(solution.residual, true_residuals(operator, 0.1, solution, b))
    assert (solution.residual > 0.1).all()


def test_noise_falls_with_more_iterations_where_the_plain_recursion_stays() -> None:
    operator, b = noisy(), normal(12, 4)

    def residual(averaging: int | None, maxiter: int) -> float:
        solver = LissaSolver(averaging=averaging, maxiter=maxiter, rtol=0.0, warn_on_max_iteration=False)
        solution = solver.fit(operator, 1e-3).solve(b)
        assert set(solution.reason) == {StopReason.ITERATION_LIMIT}
        torch.testing.assert_close(solution.residual, true_residuals(operator, 1e-3, solution, b))
        return solution.residual.max().item()

    falling = [residual(32, maxiter) for maxiter in (20, 60, 180, 540)]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(falling))
    assert falling[-1] < 1e-4
    assert min(residual(None, maxiter) for maxiter in (60, 180, 540, 1620)) > 0.1


def test_runs_on_what_is_left_beat_one_long_average() -> None:
    operator, b = noisy(), normal(12, 4)
    runs, once = (
        LissaSolver(averaging=length, maxiter=800, rtol=0.0, warn_on_max_iteration=False).fit(operator, 1e-2)
        for length in (32, 800)
    )
    assert runs.solve(b).residual.max() < 0.1 * once.solve(b).residual.max()


@pytest.mark.parametrize("averaging", [32, None])
def test_one_product_with_a_mini_batch_an_iteration_and_few_with_the_whole(averaging: int | None) -> None:
    operator = noisy()
    inverse = LissaSolver(averaging=averaging, maxiter=500, warn_on_max_iteration=False, rtol=0.0).fit(
        operator, 0.01
    )
    operator.drawn.clear()
    operator.columns.clear()
    assert inverse.solve(normal(12, 4)).iterations.tolist() == [500] * 4
    assert operator.drawn_widths == [4] * 500
    assert len(operator.widths) <= 500 / 32 + 2


def test_runs_that_gain_little_are_followed_by_longer_ones() -> None:
    operator = Sampled(symmetric(torch.logspace(-4, 1, 40)))
    inverse = LissaSolver(maxiter=1000, warn_on_max_iteration=False).fit(operator, 1e-4)
    operator.columns.clear()
    inverse.solve(normal(40, 3))
    assert len(operator.widths) <= 12


def test_finished_columns_leave_the_product() -> None:
    operator = Sampled(symmetric(torch.logspace(-2, 1, 40)))
    vectors = torch.linalg.eigh(operator.matrix).eigenvectors
    # The averages of one eigenvector point along it, and the step along them solves it at once.
    inverse = LissaSolver(rtol=1e-6, maxiter=10_000).fit(operator, 0.01)
    operator.drawn.clear()
    solution = inverse.solve(torch.cat([vectors[:, -5:], normal(40, 1)], dim=1))
    assert solution.converged.all()
    assert solution.iterations[:5].tolist() == [32] * 5
    assert operator.drawn_widths == [6] * 32 + [1] * (len(operator.drawn) - 32)
    assert solution.iterations[5].item() == len(operator.drawn)


def test_zero_right_hand_sides_end_at_once() -> None:
    b = torch.stack([torch.zeros(12, dtype=FLOAT), normal(12)], dim=1)
    for guess in (None, torch.ones(12, dtype=FLOAT)):
        solution = LissaSolver(h0=guess).fit(noisy(), 0.1).solve(b)
        assert solution.converged.all()
        assert solution.iterations[0] == 0 < solution.iterations[1]
        assert solution.residual[0] == 0
        assert not solution.value[:, 0].any()


def test_vectors_and_no_columns() -> None:
    inverse = LissaSolver().fit(noisy(), 0.1)
    vector = normal(12)
    assert inverse.solve(vector).value.shape == (12,)
    torch.testing.assert_close(inverse @ vector, inverse.solve(vector[:, None]).value[:, 0])
    assert inverse.solve(torch.empty(12, 0, dtype=FLOAT)).reason == ()


def test_more_parameters_than_directions_in_the_krylov_space() -> None:
    """One and two parameters: fewer than the power iterations have vectors."""
    for size in (1, 2, 3):
        operator = Sampled(torch.diag(torch.arange(1.0, size + 1, dtype=FLOAT)))
        inverse = LissaSolver(rtol=1e-8).fit(operator, 0.0)
        assert inverse.largest == pytest.approx(size)
        assert inverse.solve(normal(size, 2)).converged.all()


def test_seed_decides_and_global_state_is_left_alone() -> None:
    operator, b = noisy(), normal(12, 2)
    state = torch.get_rng_state()
    first, again, other = (LissaSolver(seed=seed).fit(operator, 0.01) for seed in (5, 5, 6))
    assert first.scale == again.scale != other.scale
    assert torch.equal(first.solve(b).value, again.solve(b).value)
    assert torch.equal(first.solve(b).value, first.solve(b).value)
    five, six = (LissaSolver(seed=seed, scale=2.0).fit(operator, 0.01).solve(b).value for seed in (5, 6))
    assert not torch.equal(five, six)
    assert torch.equal(torch.get_rng_state(), state)


def test_start_from_a_guess() -> None:
    operator, b = noisy(), normal(12, 3)
    exact = torch.linalg.solve(shifted(operator.matrix, 0.01), b)
    solution = LissaSolver(h0=exact).fit(operator, 0.01).solve(b)
    assert solution.iterations.tolist() == [0, 0, 0]
    assert solution.converged.all()
    shared = LissaSolver(h0=exact[:, 0]).fit(operator, 0.01).solve(b)
    assert shared.iterations[0] == 0 < shared.iterations[1]
    assert (true_residuals(operator, 0.01, shared, b) <= 1e-4).all()
    near = LissaSolver(h0=exact + 1e-3).fit(operator, 0.01).solve(b)
    assert near.iterations.max() < LissaSolver().fit(operator, 0.01).solve(b).iterations.min()


def test_with_regularization_equals_a_refit_and_estimates_nothing() -> None:
    operator, b = noisy(), normal(12, 2)
    inverse = LissaSolver().fit(operator, 1.0)
    operator.drawn.clear()
    moved = inverse.with_regularization(0.01)
    assert operator.drawn == []
    assert torch.equal(moved.solve(b).value, LissaSolver().fit(operator, 0.01).solve(b).value)


def test_progress_bar_counts_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    solver = LissaSolver(progress=True, maxiter=7, rtol=0.0, warn_on_max_iteration=False)
    solver.fit(noisy(), 0.1).solve(normal(12, 4))
    assert "7/7" in capsys.readouterr().err


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maxiter": 0}, "maxiter must be a positive integer, got 0"),
        ({"dampen": -0.1}, "dampen"),
        ({"dampen": 1.0}, r"from 0 to below 1, got 1\.0"),
        ({"scale": 0.0}, "scale must be a positive number or 'auto'"),
        ({"scale": "large"}, "got 'large'"),
        ({"h0": [0.0]}, "h0 must be a tensor or None, got list"),
        ({"rtol": -1.0}, "rtol"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"averaging": 0}, "None for the plain recursion, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LissaSolver(**options)  # type: ignore[arg-type]


def test_registers_its_name() -> None:
    registered: dict[str, type] = {}
    register_solvers(registered.__setitem__)
    assert registered == {"lissa": LissaSolver}
