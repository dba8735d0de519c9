"""Scores with a bound on their error: the bound holds for every pair, and is not idle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from tests import fits, nets, reference, small

Points = tuple[Tensor, Tensor]


def problem(seed: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Points, Points, Points]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nets.mlp(4, 5, 3).to(dtype).eval()

    def points(count: int) -> Points:
        x = torch.randn(count, 4, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(3, (count,), generator=generator)

    return net, points(30), points(5), points(11)


def truth(net: nn.Module, data: Points, test: Points, train: Points, strength: float) -> tuple[Tensor, Tensor]:
    """Scores and ``C + λI`` in float64."""
    net, loss = net.double(), nn.CrossEntropyLoss()
    matrix = reference.gauss_newton(net, loss, [double(data)])
    matrix += strength * torch.eye(len(matrix), dtype=torch.float64)
    left, right = (reference.gradients(net, loss, [double(points)]) for points in (test, train))
    return left @ torch.linalg.solve(matrix, right.T), matrix


def double(points: Points) -> Points:
    return points[0].double(), points[1]


CRUDE: list[Any] = [
    {"name": "cg", "maxiter": 1},
    {"name": "cg", "maxiter": 3},
    {"name": "cg", "maxiter": 8},
    {"name": "cg", "rtol": 1e-12, "atol": 0.0},
    "ekfac",
    "jacobi",
    "direct",
    {"name": "nystroem", "rank": 4},
    {"name": "arnoldi", "rank": 3},
]


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", CRUDE, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_for_every_pair(seed: int, solver: Any, dtype: torch.dtype) -> None:
    net, data, test, train = problem(seed, dtype)
    for strength in (1e-3, 1e-1):
        model = inf.compose(net, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=strength)
        scores, bounds = model.fit([data]).influences(*test, *train, return_bounds=True)
        exact, _ = truth(net, data, test, train, strength)
        net.to(dtype)
        assert scores.shape == bounds.shape == (5, 11)
        assert scores.dtype == bounds.dtype == dtype
        assert ((scores.double() - exact).abs() <= bounds.double()).all()


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("maxiter", [2, 4])
def test_the_bound_is_tight(seed: int, maxiter: int) -> None:
    """For a point with itself the error is ``rᵀA⁻¹r ≥ ‖r‖²/‖A‖``; the bound is at most ``‖A‖/λ`` times it."""
    net, data, test, _ = problem(seed)
    strength = 1e-1
    solver = {"name": "cg", "maxiter": maxiter}
    model = inf.compose(net, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=strength)
    scores, bounds = model.fit([data]).influences(*test, return_bounds=True)
    exact, matrix = truth(net, data, test, test, strength)
    error = (exact - scores).diagonal()
    assert (error > 0).all()
    factor = torch.linalg.matrix_norm(matrix, 2) / strength
    assert (bounds.diagonal() <= 1.001 * factor * error).all()
    assert factor < 20


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
def test_the_correction_squares_the_error() -> None:
    net, data, test, train = problem(0)
    strength = 1e-1
    solver = {"name": "cg", "maxiter": 6}
    model = inf.compose(net, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=strength)
    model.fit([data])
    exact, _ = truth(net, data, test, train, strength)
    plain = (model.influences(*test, *train) - exact).norm() / exact.norm()
    corrected = (model.influences(*test, *train, return_bounds=True).scores - exact).norm() / exact.norm()
    assert corrected < 30 * plain**2
    assert corrected < 0.2 * plain


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("blocks", ["per_layer", "per_parameter"])
def test_blocks_and_budgets_change_no_bound(blocks: str) -> None:
    net, data, test, train = problem(1)
    results = []
    for budget in (2**28, 20_000):
        model = inf.compose(
            net,
            nn.CrossEntropyLoss(),
            solver={"name": "cg", "maxiter": 2},
            blocks=blocks,
            hessian_regularization=1e-2,
            memory_budget=budget,
        )
        results.append(model.fit([data]).influences(*test, *train, return_bounds=True))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
    matrix = reference.gauss_newton(net, nn.CrossEntropyLoss(), [data])
    structure = fits.STRUCTURES[blocks][1](list(reference.trainable(net)))
    inverses = reference.block_inverse(net, matrix, structure, dict.fromkeys(structure, 1e-2))
    left, right = (reference.gradients(net, nn.CrossEntropyLoss(), [points]) for points in (test, train))
    exact = reference.up_scores(sum(inverses.values(), torch.zeros_like(matrix)), left, right)
    assert ((results[0].scores - exact).abs() <= results[0].bounds).all()


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("blocks", ["full", "per_layer"])
@pytest.mark.parametrize("solver", [CRUDE[1], CRUDE[3], "ekfac", "direct"], ids=str)
def test_the_bound_holds_for_every_feature(solver: Any, blocks: str, dtype: torch.dtype) -> None:
    strength = 1e-2
    net, data, test, train = problem(3, dtype)
    scores, bounds = [], []
    for budget in (2**28, 30_000):
        model = inf.compose(
            net,
            nn.CrossEntropyLoss(),
            solver=solver,
            blocks=blocks,
            hessian_regularization=strength,
            memory_budget=budget,
        )
        found = model.fit([data]).influences(*test, *train, mode="perturbation", return_bounds=True)
        torch.testing.assert_close(found.scores, model.influences(*test, *train, mode="perturbation"))
        scores.append(found.scores.double())
        bounds.append(found.bounds.double())
        assert found.scores.shape == found.bounds.shape == (5, 11, 4)
        assert found.scores.dtype == found.bounds.dtype == dtype
    if solver in (CRUDE[1], "ekfac"):  # of the others hardly more than rounding is left
        torch.testing.assert_close(*bounds, rtol=1e-2, atol=0.0)
    net, loss = net.double(), nn.CrossEntropyLoss()
    matrix = reference.gauss_newton(net, loss, [double(data)])
    structure = fits.STRUCTURES[blocks][1](list(reference.trainable(net)))
    parts = reference.block_inverse(net, matrix, structure, dict.fromkeys(structure, strength))
    inverse = sum(parts.values(), torch.zeros_like(matrix))
    mixed = reference.mixed_derivatives(net, loss, *double(train))
    exact = reference.perturbation_scores(inverse, reference.gradients(net, loss, [double(test)]), mixed)
    error = (scores[0] - exact).abs()
    assert (error <= bounds[0]).all()
    if solver == CRUDE[1]:
        # Cauchy and Schwarz, and ‖A⁻¹‖ ≤ 1/λ, give away some factors, not orders of magnitude.
        assert bounds[0].norm() < 100 * error.norm()


def test_test_points_with_themselves_are_solved_for_once() -> None:
    net, data, test, _ = problem(2)
    model = inf.compose(net, nn.CrossEntropyLoss(), solver="cg", hessian_regularization=1e-2).fit([data])
    scores = model.influences(*test, return_bounds=True).scores
    assert len(model.report) == len(test[0])
    torch.testing.assert_close(scores, scores.T, rtol=1e-6, atol=1e-9)


def test_a_loss_that_is_convex_on_the_first_samples_alone_has_no_lower_bound() -> None:
    """Samples to be unlearnt, weighted against the others."""
    net, (x, _), test, _ = problem(0)
    generator = torch.Generator().manual_seed(0)

    def weighted(outputs: Tensor, target: Tensor) -> Tensor:
        return (target[:, 3:] * (outputs - target[:, :3]).square()).mean()

    x = torch.cat([x, x + 1])
    targets = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    for later in (1.0, -3.0):
        weights = torch.ones(60, 3, dtype=torch.float64)
        weights[40:] = later
        data = [(x, torch.cat([targets, weights], dim=1))]
        model = inf.compose(net, weighted, solver="direct", hessian_regularization=10.0).fit(data)
        (block,) = model.fitted.blocks.values()
        assert getattr(block.operator, "positive_semidefinite") == (later > 0)  # noqa: B009
        if later > 0:
            model.influences(test[0], data[0][1][:5], return_bounds=True)
        else:
            with pytest.raises(inf.InvalidInputError, match="does not claim to be positive semidefinite"):
                model.influences(test[0], data[0][1][:5], return_bounds=True)


def test_without_a_lower_bound_on_the_spectrum_there_is_no_bound() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"'full' does not claim .*'gauss_newton'"):
        small.fitted(source="hessian", hessian_regularization=1.0).influences(
            *small.points(), return_bounds=True
        )
    net, data, test, _ = problem(0)
    model = inf.compose(net, nn.CrossEntropyLoss(), solver="ekfac").fit([data])
    with pytest.raises(inf.InvalidInputError, match="hessian_regularization > 0"):
        model.influences(*test, return_bounds=True)
    with pytest.raises(inf.InvalidInputError, match="hessian_regularization > 0"):
        model.influences(*test, mode="perturbation", return_bounds=True)
