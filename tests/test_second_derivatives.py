"""Models whose backward pass cannot be differentiated: scores where there are any, an error where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

import influence_framework as inf
from tests import reference
from tests.reference import assert_close


class OnceDifferentiable(torch.autograd.Function):
    """Twice its input, without a second derivative."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Doubled(nn.Module):
    """A linear layer behind a function without a second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = OnceDifferentiable.apply(self.inner(x))
        return doubled


class HalfDoubled(Doubled):
    """Beside it, a way on which nothing is missing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.inner(x)


def problem_of(model: nn.Module) -> tuple[inf.Problem, list[tuple[Tensor, Tensor]]]:
    data = [(torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,)))]
    return inf.Problem.build(model, nn.CrossEntropyLoss(), data), data


@pytest.mark.parametrize("cls", [Doubled, HalfDoubled])
def test_a_model_without_second_derivatives_has_scores(
    cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = cls().double().eval()
    problem, data = problem_of(model)
    monkeypatch.setattr(inf.gradients, "_directions_pay", lambda *_: True)
    rows = torch.randn(4, problem.parameters.numel, dtype=torch.float64)
    scores = inf.gradients.contract_up({"all": inf.gradients.Factors(rows)}, problem, data[0])["all"]
    assert_close(scores, rows @ reference.gradients(model, nn.CrossEntropyLoss(), data).T, 1e-12)


@pytest.mark.parametrize("cls", [Doubled, HalfDoubled])
@pytest.mark.parametrize("source", ["hessian", "gauss_newton", "empirical_fisher"])
def test_but_no_curvature_products(cls: type[nn.Module], source: str) -> None:
    torch.manual_seed(0)
    problem, _ = problem_of(cls().double().eval())
    operator = inf.hessian_sources[source].create().operator(problem, problem.parameters)
    with pytest.raises(inf.InvalidInputError, match="cannot be differentiated again"):
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)


def test_and_no_mixed_derivatives() -> None:
    torch.manual_seed(0)
    problem, data = problem_of(Doubled().double().eval())
    rows = torch.randn(4, problem.parameters.numel, dtype=torch.float64)
    with pytest.raises(inf.InvalidInputError, match="cannot be differentiated again"):
        inf.gradients.contract_perturbation({"all": inf.gradients.Factors(rows)}, problem, data[0])


def test_a_model_that_fits_its_data_is_recognised() -> None:
    """The gradients of its losses are rounding errors, which agree with nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double().eval()
    x = torch.randn(50, 6, dtype=torch.float64)
    data = [(x, model(x).softmax(1).detach())]
    assert inf.Problem.build(model, nn.CrossEntropyLoss(), data).twice_differentiable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_models_are_recognised_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 200), nn.ReLU(), nn.LayerNorm(200), nn.Linear(200, 3)).to(dtype).eval()
    data = [(torch.randn(5, 3).to(dtype), torch.randint(3, (5,)))]
    assert inf.Problem.build(model, nn.CrossEntropyLoss(), data).twice_differentiable
