"""Scores against closed forms and against retraining, and for which side the systems are solved."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.inverses import Inverse, make_solution
from influence_framework.operators import to_dense
from influence_framework.protocols import StopReason
from tests import cases, reference
from tests.fits import compose, fitted
from tests.reference import assert_close

RIDGE = 1e-3


def regression_data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    return x, y + torch.randn(n, 1, generator=generator, dtype=torch.float64)


def ridge_weights(x: Tensor, y: Tensor) -> Tensor:
    """Minimiser of ``1/n Σ (xᵀw − y)² + λ/2 ‖w‖²``."""
    hessian = 2 * x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(hessian, 2 * x.T @ y / len(x))


def linear(weights: Tensor) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights.T)
    return model


@pytest.mark.parametrize("source", ["hessian", "gauss_newton"])
def test_linear_regression_in_closed_form(source: str) -> None:
    x, y = regression_data(20)
    test_x, test_y = regression_data(4, seed=1)
    weights = torch.tensor([[0.3], [0.1], [-0.2]], dtype=torch.float64)
    model = inf.compose(
        linear(weights), nn.MSELoss(), solver="direct", source=source, hessian_regularization=RIDGE
    )
    model.fit([(x[:15], y[:15]), (x[15:], y[15:])])

    a, b, w = x.numpy(), test_x.numpy(), weights.numpy()
    inverse = np.linalg.inv(2 * a.T @ a / len(a) + RIDGE * np.eye(3))
    residual, test_residual = a @ w - y.numpy(), b @ w - test_y.numpy()
    factors = 2 * test_residual * b @ inverse
    up = factors @ (2 * residual * a).T
    # ∇ₓ of 2 (xᵀw − y) xᵀf is 2 (xᵀf) w + 2 (xᵀw − y) f.
    perturbation = (
        2 * (factors @ a.T)[:, :, None] * w[:, 0] + 2 * residual[:, 0][None, :, None] * factors[:, None, :]
    )
    assert_close(model.influences(test_x, test_y, x, y), torch.from_numpy(up), 1e-12)
    assert_close(
        model.influences(test_x, test_y, x, y, mode="perturbation"), torch.from_numpy(perturbation), 1e-12
    )
    assert_close(model.influence_factors(test_x, test_y), torch.from_numpy(factors), 1e-12)


def test_removing_a_point_changes_the_test_loss_by_its_score_over_n() -> None:
    x, y = regression_data(300)
    test_x, test_y = regression_data(10, seed=1)
    weights = ridge_weights(x, y)
    model = inf.compose(
        linear(weights), nn.MSELoss(), solver="direct", source="hessian", hessian_regularization=RIDGE
    ).fit([(x, y)])
    scores = model.influences(test_x, test_y, x, y)

    def test_losses(w: Tensor) -> Tensor:
        return (test_x @ w - test_y).square()[:, 0]

    changes = []
    for j in range(len(x)):
        kept = torch.arange(len(x)) != j
        changes.append(test_losses(ridge_weights(x[kept], y[kept])) - test_losses(weights))
    change, predicted = torch.stack(changes, dim=1), scores / len(x)
    scale = predicted.abs().max()
    # What is left out is of relative order leverage + 1/n, here at most 3/300 on average.
    assert (change - predicted).abs().max() < 0.1 * scale
    assert torch.corrcoef(torch.stack([change.flatten(), predicted.flatten()]))[0, 1] > 0.99
    large = predicted.abs() > 0.05 * scale
    assert torch.equal(change[large].sign(), predicted[large].sign())


def test_moving_an_input_changes_the_test_loss_as_predicted() -> None:
    x, y = regression_data(100)
    test_x, test_y = regression_data(5, seed=1)
    weights = ridge_weights(x, y)
    model = inf.compose(
        linear(weights), nn.MSELoss(), solver="direct", source="hessian", hessian_regularization=RIDGE
    ).fit([(x, y)])
    scores = model.influences(test_x, test_y, x, y, mode="perturbation")
    step = 1e-5
    for j, feature in [(0, 0), (7, 2), (42, 1)]:
        losses = []
        for sign in (1, -1):
            moved = x.clone()
            moved[j, feature] += sign * step
            losses.append((test_x @ ridge_weights(moved, y) - test_y).square()[:, 0])
        # Central differences: an error of order step² and of rounding over step.
        change = (losses[0] - losses[1]) / (2 * step)
        assert_close(-scores[:, j, feature] / len(x), change, 1e-6)


@pytest.mark.parametrize("source", ["hessian", "gauss_newton"])
def test_pitfall_an_indefinite_hessian_is_reported(source: str) -> None:
    lowest = torch.linalg.eigvalsh(cases.dense("mse", "hessian"))[0].item()
    # What the solvers themselves say.
    options = {"source": source, "hessian_regularization": -0.1 * lowest, "preflight": False}
    instance, test = cases.make("mse"), cases.points("mse", 3, 1)
    direct, iterative = compose(instance, **options), compose(instance, solver="cg", **options)
    if source == "gauss_newton":  # the remedy that both messages name: no warning
        assert_close(
            iterative.fit(instance.data).influences(*test), direct.fit(instance.data).influences(*test), 1e-4
        )
        return
    with pytest.warns(inf.IndefiniteOperatorWarning, match=r"not positive definite .*-\d.*'gauss_newton'"):
        direct.fit(instance.data)
    inverse = torch.linalg.inv(
        cases.dense("mse", "hessian") - 0.1 * lowest * torch.eye(26, dtype=torch.float64)
    )
    g = reference.gradients(instance.model, instance.loss, [test])
    assert_close(direct.influences(*test), g @ inverse @ g.T, 1e-9)
    with pytest.warns(
        inf.ConvergenceWarning, match=r"right-hand sides were not solved.*non-positive curvature"
    ):
        iterative.fit(instance.data).influences(*test)


@dataclass
class StubInverse(Inverse):
    """A dense inverse that notes how many right-hand sides it was given."""

    base: inf.LinearOperator
    regularization: float
    widths: list[int]

    def __post_init__(self) -> None:
        matrix = to_dense(self.base)
        self.matrix = torch.linalg.inv(
            matrix + self.regularization * torch.eye(len(matrix), dtype=matrix.dtype)
        )

    def _solve(self, columns: Tensor) -> inf.Solution:
        self.widths.append(columns.shape[1])
        reasons = [StopReason.CONVERGED] * columns.shape[1]
        return make_solution(self.matrix @ columns, torch.zeros(columns.shape[1]), reasons)


@dataclass
class StubSolver:
    """Counts fits and right-hand sides; its inverse cannot change λ."""

    fits: list[float] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def fit(self, operator: inf.LinearOperator, regularization: float) -> StubInverse:
        self.fits.append(regularization)
        return StubInverse(operator, regularization, self.widths)


@pytest.mark.parametrize(("n_test", "n_train", "solved"), [(5, 2, 2), (2, 5, 2), (3, 3, 3)])
def test_mode_up_solves_for_the_smaller_side(n_test: int, n_train: int, solved: int) -> None:
    solver = StubSolver()
    _, influence = fitted("conv", "per_layer", solver=solver)
    _, direct = fitted("conv", "per_layer")
    test, train = cases.points("conv", n_test, 1), cases.points("conv", n_train, 2)
    scores = influence.influences(*test, *train)
    assert solver.widths == [solved] * 2
    assert_close(scores, direct.influences(*test, *train), 1e-10)
    solver.widths.clear()
    influence.influences(*test, *train, mode="perturbation")
    influence.influence_factors(*test)
    assert solver.widths == [n_test] * 4
    solver.widths.clear()
    influence.influences_from_factors(direct.influence_factors(*test), *train)
    assert solver.widths == []


SOLVERS = {"direct": "direct", "cg": {"name": "cg", "rtol": 1e-12, "atol": 0.0, "preconditioner": "jacobi"}}


@pytest.mark.parametrize("blocks", ["full", "per_layer"])
@pytest.mark.parametrize("name", [*SOLVERS, "stub"])
def test_another_regularization_equals_a_refit_and_leaves_the_original(name: str, blocks: str) -> None:
    solver = StubSolver() if name == "stub" else SOLVERS[name]
    strong = 0.5 if blocks == "full" else {"0": 0.5, "3": 0.2}
    instance, influence = fitted("conv", blocks, solver=solver, hessian_regularization=0.05)
    test, train = cases.points("conv", 3, 1), cases.points("conv", 4, 2)
    before = influence.influences(*test, *train)
    other = influence.with_regularization(strong)
    refit = compose(instance, solver=solver, blocks=blocks, hessian_regularization=strong).fit(instance.data)
    assert type(other) is type(influence)
    assert other.is_fitted
    assert other.hessian_regularization == strong
    assert influence.hessian_regularization == 0.05
    assert_close(other.influences(*test, *train), refit.influences(*test, *train), 1e-9)
    assert torch.equal(influence.influences(*test, *train), before)
    assert (other.influences(*test, *train) - before).abs().max() > 0.1 * before.abs().max()
    # Back again, and for a later fit of the derived model.
    assert_close(other.with_regularization(0.05).influences(*test, *train), before, 1e-9)
    assert_close(other.fit(instance.data).influences(*test, *train), refit.influences(*test, *train), 1e-9)


def test_another_regularization_before_the_fit() -> None:
    instance = cases.make("conv")
    influence = compose(instance, hessian_regularization=0.05)
    other = influence.with_regularization(0.5)
    assert not other.is_fitted
    test = cases.points("conv", 3, 1)
    expected = compose(instance, hessian_regularization=0.5).fit(instance.data).influences(*test)
    assert torch.equal(other.fit(instance.data).influences(*test), expected)
    assert not influence.is_fitted


def test_another_regularization_does_not_read_the_data_where_the_inverse_offers_it() -> None:
    solver = StubSolver()
    _, influence = fitted("conv", solver=solver)
    influence.with_regularization(1.0)
    assert len(solver.fits) == 2

    class Once(list[cases.Sample]):
        reads = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            type(self).reads += 1
            return super().__iter__()

    instance = cases.make("conv")
    data = Once(instance.data)
    direct = compose(instance, hessian_regularization=0.1, memory_budget=1).fit(data)
    reads = Once.reads
    direct.with_regularization(1.0)
    assert Once.reads == reads
