"""Scores of nets of linear layers from inputs and output gradients of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework import gradients
from influence_framework.gradients import Factors, contract_up
from tests import reference
from tests.reference import assert_close

LOSS = nn.CrossEntropyLoss()


def net(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    middle: dict[str, nn.Module] = {"relu": nn.ReLU(), "softmax": nn.Softmax(1), "frozen": nn.Tanh()}
    model = nn.Sequential(
        nn.Linear(4, 6), middle[kind], nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )
    if kind == "frozen":
        model[0].bias.requires_grad_(False)
        model[4].weight.requires_grad_(False)
    return model.to(dtype).eval()


def points(count: int, dtype: torch.dtype = torch.float64, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, *shape, 4, generator=generator, dtype=dtype)
    return x, torch.randint(3, (count, *shape), generator=generator)


@pytest.fixture
def by_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("another way was taken")

    monkeypatch.setattr(gradients, "_with_gradients", refuse)
    monkeypatch.setattr(gradients, "_along_factors", refuse)


@pytest.mark.usefixtures("by_layers_alone")
@pytest.mark.parametrize("budget", [2**30, 2**14])
@pytest.mark.parametrize("kind", ["relu", "softmax", "frozen"])
def test_equal_products_with_gradients(kind: str, budget: int) -> None:
    model, train = net(kind), points(70)
    problem = inf.Problem.build(model, LOSS, [points(9)], memory_budget=budget)
    size = problem.parameters.numel
    rows = torch.randn(size + 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = contract_up({"one": Factors(rows), "two": Factors(2 * rows[:3])}, problem, train)
    expected = rows @ reference.gradients(model, LOSS, [train]).T
    assert_close(found["one"], expected, 1e-13)
    assert_close(found["two"], 2 * expected[:3], 1e-13)


class Whispering(nn.Module):
    """Uses its first weight once more beside the layer, too faintly for two samples to tell in float32."""

    def __init__(self, faintness: float) -> None:
        super().__init__()
        self.first, self.second, self.faintness = nn.Linear(4, 4), nn.Linear(4, 3), faintness

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).tanh())
        return result + self.faintness * (x @ self.first.weight)[:, :3]


@pytest.mark.parametrize("faintness", [1e-4, 1.0])
def test_a_weight_beside_its_layer_is_not_lost(faintness: float) -> None:
    torch.manual_seed(0)
    model, train = Whispering(faintness).eval(), points(40, torch.float32)
    problem = inf.Problem.build(model, LOSS, [train])
    rows = torch.randn(3, problem.parameters.numel, generator=torch.Generator().manual_seed(1))
    found = contract_up({"all": Factors(rows)}, problem, train)["all"]
    assert_close(found, rows @ reference.gradients(model, LOSS, [train]).T, 2e-6)
    assert problem.plain[problem.parameters.names] is None


class Echoing(nn.Module):
    """Adds a little of its last bias once more: what that adds to a gradient is that in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.only(x)
        return result + 1e-4 * self.only.bias


def test_nor_where_the_gradient_in_the_outputs_adds_up_to_zero() -> None:
    torch.manual_seed(0)
    model, (x, _) = Echoing().eval(), points(40, torch.float32)
    targets = torch.randn(20, 3)
    with torch.no_grad():
        outputs = model(x)
    # Residuals come in pairs of opposite sign.
    train = (x, outputs + torch.cat([targets, -targets]))
    problem = inf.Problem.build(model, nn.MSELoss(), [train])
    rows = torch.randn(3, problem.parameters.numel, generator=torch.Generator().manual_seed(1))
    found = contract_up({"all": Factors(rows)}, problem, train)["all"]
    assert_close(found, rows @ reference.gradients(model, nn.MSELoss(), [train]).T, 2e-6)
    assert problem.plain[problem.parameters.names] is None


def test_layers_on_sequences_go_another_way() -> None:
    x, y = points(5, torch.float64, 7)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.transpose(1, 2), target)

    problem = inf.Problem.build(model, loss, [(x, y)])
    rows = torch.randn(2, problem.parameters.numel, dtype=torch.float64)
    found = contract_up({"all": Factors(rows)}, problem, (x, y))["all"]
    assert_close(found, rows @ reference.gradients(model, loss, [(x, y)]).T, 1e-12)


def test_a_gradient_that_is_not_finite_is_told_of() -> None:
    model, (x, y) = net("relu"), points(6)
    problem = inf.Problem.build(model, LOSS, [(x, y)])
    rows = torch.ones(2, problem.parameters.numel, dtype=torch.float64)
    x[4] = float("inf")
    with pytest.raises(inf.NonFiniteError, match=r"samples \[4\]|NaN or infinity"):
        contract_up({"all": Factors(rows)}, problem, (x, y))


class Seldom(nn.Module):
    """Uses its first weight beside the layer for points whose first number is large."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(4, 4), nn.Linear(4, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        beside = (x @ self.first.weight)[:, :3] * (x[:, :1] > 5)
        result: Tensor = self.second(self.first(x).tanh())
        return result + self.scale * beside


def seldom(dtype: torch.dtype, scale: float = 1.0) -> tuple[Seldom, Tensor, Tensor]:
    """The model and points of which the last is one of those, and the first are not."""
    torch.manual_seed(0)
    model = Seldom(scale).to(dtype).eval()
    x, y = points(40, dtype)
    x = x.clamp(-3, 3)
    x[-1, 0] = 6.0
    return model, x, y


def found_and_expected(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    problem = inf.Problem.build(model, loss, [(x, y)])
    rows = torch.randn(3, problem.parameters.numel, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    found = contract_up({"all": Factors(rows)}, problem, (x, y))["all"]
    return found, rows @ reference.gradients(model, loss, [(x, y)]).T


def test_two_equal_points_do_not_cancel() -> None:
    model, x, y = seldom(torch.float64)
    problem = inf.Problem.build(model, LOSS, [(x, y)])
    rows = torch.randn(3, problem.parameters.numel, dtype=torch.float64)
    for count in (2, 4):
        twice = x[-1:].expand(count, 4), y[-1:].expand(count)
        found = contract_up({"all": Factors(rows)}, problem, twice)["all"]
        assert_close(found, rows @ reference.gradients(model, LOSS, [twice]).T, 1e-12)
        problem.plain.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_with_small_gradients_is_held_too(dtype: torch.dtype) -> None:
    faint = torch.finfo(dtype).eps
    model, x, y = seldom(dtype, faint)
    with torch.no_grad():
        model.second.weight *= faint
    problem = inf.Problem.build(model, LOSS, [(x, y)])
    rows = torch.zeros(1, problem.parameters.numel, dtype=dtype)
    rows[0, :16] = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = contract_up({"all": Factors(rows)}, problem, (x, y))["all"]
    assert_close(found, rows @ reference.gradients(model, LOSS, [(x, y)]).T, 1e-4)


@pytest.mark.parametrize("large", [1e7, 1e12])
def test_one_large_sample_hides_nothing(large: float) -> None:
    model, x, _ = seldom(torch.float32)
    targets = torch.randn(40, 3)
    targets[7] = large
    found, expected = found_and_expected(model, nn.MSELoss(), x, targets)
    assert_close(found[:, -1:], expected[:, -1:], 1e-4)


def test_what_is_not_finite_beside_a_layer_is_no_agreement() -> None:
    class Broken(Seldom):
        def forward(self, x: Tensor) -> Tensor:
            beside = torch.where(x[:, :1] > 5, (0 * self.first.weight.sum()).sqrt(), 0.0)
            result: Tensor = self.second(self.first(x).tanh())
            return result + beside

    _, x, y = seldom(torch.float64)
    model = Broken().double().eval()
    problem = inf.Problem.build(model, LOSS, [(x[:-1], y[:-1])])
    rows = torch.ones(2, problem.parameters.numel, dtype=torch.float64)
    with pytest.raises(inf.NonFiniteError):
        contract_up({"all": Factors(rows)}, problem, (x, y))
