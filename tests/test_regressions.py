"""Wrong results that looked right: each of these once passed without a word."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf

SHAPE = (30, 4)


def net(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct(loss: object, outputs: int = 3, **options: object) -> inf.TorchInfluenceFunctionModel:
    options = {"solver": "direct", "hessian_regularization": 0.1} | options
    return inf.compose(net(outputs), loss, **options)  # type: ignore[arg-type]


def test_a_penalty_inside_the_loss_is_refused() -> None:
    model = net()

    def penalised(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return functional.mse_loss(output, target) + 0.5 * penalty

    influence = inf.compose(model, penalised, solver="direct", hessian_regularization=0.1)
    with pytest.raises(inf.InvalidInputError, match="add twice its factor to hessian_regularization"):
        influence.fit([(normal(*SHAPE), normal(30, 3))])


@pytest.mark.parametrize(("outputs", "targets"), [((30, 3), (30, 1)), ((30, 1), (30, 3))])
def test_a_broadcast_over_features_is_refused(outputs: tuple[int, int], targets: tuple[int, int]) -> None:
    with pytest.raises(inf.InvalidInputError, match="would broadcast"):
        direct(functional.mse_loss, outputs[1]).fit([(normal(*SHAPE), normal(*targets))])


def test_a_loss_that_fails_is_shown_with_the_shapes() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"shape \(30, 3\) and targets of shape \(30, 1\)"):
        direct(nn.CrossEntropyLoss()).fit([(normal(*SHAPE), torch.zeros(30, 1, dtype=torch.int64))])


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss])
def test_sum_equals_mean_with_several_outputs(loss: type[nn.Module]) -> None:
    data = [(normal(*SHAPE), normal(30, 3).sigmoid())]
    mean, total = (direct(loss(reduction=reduction)).fit(data) for reduction in ("mean", "sum"))
    torch.testing.assert_close(total.influences(*data[0]), mean.influences(*data[0]))
    factors = mean.influence_factors(*data[0])
    torch.testing.assert_close(total.influence_factors(*data[0]), factors)


def test_training_data_that_is_written_to_after_the_fit_changes_nothing() -> None:
    x, y = normal(*SHAPE), normal(30, 3)
    model = direct(nn.MSELoss(), solver={"name": "cg", "rtol": 1e-10, "atol": 0.0}).fit([(x, y)])
    query = (x[:3].clone(), y[:3].clone())
    before = model.influences(*query)
    x.mul_(3.0)
    torch.testing.assert_close(model.influences(*query), before)


def test_a_loader_that_refills_one_buffer() -> None:
    x, y = normal(*SHAPE), normal(30, 3)

    class Refilling:
        def __iter__(self):  # type: ignore[no-untyped-def]
            buffer = torch.empty(10, 4, dtype=torch.float64)
            for start in range(0, 30, 10):
                buffer.copy_(x[start : start + 10])
                yield buffer, y[start : start + 10]

    torch.testing.assert_close(
        direct(nn.MSELoss()).fit(Refilling()).influences(x, y),
        direct(nn.MSELoss()).fit([(x, y)]).influences(x, y),
    )


def test_a_streamed_loader_with_a_generator_of_its_own_gives_the_same_matrix_each_time() -> None:
    own = torch.Generator().manual_seed(5)
    data = TensorDataset(normal(*SHAPE), normal(30, 3))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True, generator=own)
    state = own.get_state()
    problem = inf.Problem.build(net(), nn.MSELoss(), loader, memory_budget=100)
    assert not problem.cached
    operator = inf.hessian_sources["hessian"].create().operator(problem, problem.parameters)
    vector = torch.ones(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(operator @ vector, operator @ vector, rtol=0.0, atol=0.0)
    assert torch.equal(own.get_state(), state)


def test_fit_under_no_grad_knows_the_size_of_activations() -> None:
    data = [(normal(*SHAPE), normal(30, 3))]
    with torch.no_grad():
        inside = inf.Problem.build(net(), nn.MSELoss(), data)
    assert inside.sample_bytes == inf.Problem.build(net(), nn.MSELoss(), data).sample_bytes > 8


def test_buffers_that_the_model_writes_to_are_left_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.linear(x)

    model = Counting().eval()
    batch = (normal(*SHAPE), normal(30, 3))
    influence = inf.compose(model, nn.MSELoss(), solver="direct", hessian_regularization=0.1).fit([batch])
    influence.influences(*batch)
    assert model.calls.item() == 0


def test_scores_carry_no_graph() -> None:
    x, y = normal(*SHAPE).requires_grad_(), normal(30, 3)
    model = direct(nn.MSELoss()).fit([(x, y)])
    assert not model.influences(x, y).requires_grad
    assert not model.influence_factors(x, y).requires_grad


def test_a_solver_that_returns_nan_is_an_error() -> None:
    class Broken:
        def fit(self, operator: inf.LinearOperator, regularization: float) -> inf.Operator:
            inverse = inf.DenseOperator(torch.eye(operator.shape[0], dtype=operator.dtype))
            solution = inf.solvers["direct"].create().fit(inverse, 0.0).solve

            class Inverse(type(inverse)):  # type: ignore[misc]
                def solve(self, columns: torch.Tensor) -> inf.Solution:
                    found = solution(columns)
                    found.value.fill_(float("nan"))
                    return found

            return Inverse(inverse.matrix)

    model = inf.compose(net(), nn.MSELoss(), solver=Broken(), hessian_regularization=0.1)
    model.fit([(normal(*SHAPE), normal(30, 3))])
    with pytest.raises(inf.NonFiniteError, match="Broken returned NaN"):
        model.influences(normal(*SHAPE), normal(30, 3))


class Doubled(torch.autograd.Function):
    """Twice its input, in the form of which torch.func cannot take derivatives."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return 2.0 * gradient


def test_functions_that_torch_func_does_not_know() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module, *, known: bool) -> None:
            super().__init__()
            self.inner, self.known = inner, known

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * self.inner(x) if self.known else Doubled.apply(self.inner(x))

    batch = (normal(*SHAPE), normal(30, 3))
    scores = [
        inf.compose(Twice(net(), known=known), nn.MSELoss(), solver="direct", hessian_regularization=0.1)
        .fit([batch])
        .influences(*batch)
        for known in (True, False)
    ]
    torch.testing.assert_close(scores[1], scores[0])
