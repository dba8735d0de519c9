"""Chains of linear layers: where products go without autograd, and where they must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence_framework import Problem, hessian_sources
from influence_framework.plain import PlainGradients
from influence_framework.sources.chain import ChainLinearization
from influence_framework.sources.streaming import StreamingOperator
from tests import nets, reference
from tests.reference import CURVATURES, assert_close
from tests.test_plain import Whispering, points, seldom

EXACT = 1e-10


class Sine(nn.Module):
    """Elementwise, written by hand, with a second derivative everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(2 * x)


class Skip(nn.Module):
    """A connection past a layer, of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        result: Tensor = self.last(torch.tanh(self.second(hidden)) + hidden)
        return result


class FaintSkip(Skip):
    """The same, but so weak that it is easily taken for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        result: Tensor = self.last(torch.tanh(self.second(hidden)) + 1e-4 * hidden)
        return result


class Bounded(nn.Module):
    """Elementwise for short vectors only: longer ones are scaled to norm one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1.0)


class Side(nn.Module):
    """What the first layer finds goes to the outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        result: Tensor = self.second(torch.tanh(first)) * first
        return result


class Parallel(nn.Module):
    """Two layers beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.left(x)) * self.right(x)
        return result


def _frozen_norm() -> nn.Module:
    return nets.frozen(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)), "1.")


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "deep": lambda: nets.mlp(3, 5, 4, 4, 3),
    "without bias": lambda: nets.mlp(3, 5, 4, 3, bias=False),
    "ReLU": lambda: nets.mlp(3, 5, 4, 3, activation=nn.ReLU),
    "GELU": lambda: nets.mlp(3, 5, 4, 3, activation=nn.GELU),
    "written by hand": lambda: nets.mlp(3, 5, 4, 3, activation=Sine),
    "nothing between": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)),
    "dropout in eval": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)),
    "one layer": lambda: nets.mlp(3, 3),
    "frozen first layer": lambda: nets.frozen(nets.mlp(3, 5, 4, 3), "0."),
    "weights frozen, biases not": lambda: nets.frozen(nets.mlp(3, 5, 4, 3), "0.weight", "2.weight"),
    "bias of the middle frozen": lambda: nets.frozen(nets.mlp(3, 5, 4, 3), "2.bias"),
    "frozen last layer behind": lambda: nets.frozen(nets.mlp(3, 5, 4, 3), "4."),
    "softmax behind": lambda: nn.Sequential(nets.mlp(3, 5, 3), nn.Softmax(1)),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "frozen layer between": lambda: nets.frozen(nets.mlp(3, 4, 4, 3), "2."),
    "skip connection": Skip,
    "bounded": lambda: nn.Sequential(nn.Linear(3, 4), Bounded(), nn.Linear(4, 3)),
    "past a layer to the outputs": Side,
    "side by side": Parallel,
    "softmax between": lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 3)),
    "normalisation between": _frozen_norm,
    "used twice": lambda: nn.Sequential(shared := nn.Linear(3, 3), nn.Tanh(), shared),
    "tied": nets.Tied,
}


def _instance(
    make: Callable[[], nn.Module], loss: nn.Module | None = None
) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
        x, y = torch.randn(11, 3, dtype=torch.float64), torch.randint(3, (11,))
    return model, loss or nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]


def _operator(source: str, problem: Problem) -> StreamingOperator:
    operator = hessian_sources[source].create().operator(problem, problem.parameters)
    assert isinstance(operator, StreamingOperator)
    return operator


def _chained(operator: StreamingOperator) -> list[bool]:
    return [
        isinstance(operator.linearize(batch), ChainLinearization) for batch, _ in operator.problem.batches()
    ]


@pytest.mark.parametrize("source", CURVATURES)
@pytest.mark.parametrize("name", [*CHAINS, *OTHERS])
def test_products_equal_the_definition(name: str, source: str) -> None:
    model, loss, data = _instance({**CHAINS, **OTHERS}[name])
    operator = _operator(source, Problem.build(model, loss, data))
    assert _chained(operator) == [name in CHAINS] * len(_chained(operator))
    identity = torch.eye(operator.shape[0], dtype=torch.float64)
    assert_close(operator @ identity, CURVATURES[source](model, loss, data), EXACT)


@pytest.mark.parametrize("source", CURVATURES)
def test_sum_loss_and_blocks(source: str) -> None:
    model, loss, data = _instance(CHAINS["deep"], nn.CrossEntropyLoss(reduction="sum"))
    problem = Problem.build(model, loss, data)
    expected = CURVATURES[source](model, loss, data)
    for names in (["2.weight", "2.bias"], ["4.bias", "2.weight"], ["0.bias", "6.weight"]):
        space = problem.parameters.subset(names)
        operator = hessian_sources[source].create().operator(problem, space)
        own = reference.positions(model, names)
        block = operator @ torch.eye(len(own), dtype=torch.float64)
        assert_close(block, expected[own][:, own], EXACT, str(names))


def test_a_batch_that_is_no_chain_goes_through_autograd() -> None:
    """Short vectors first: whether a function is elementwise may depend on the values."""
    model, loss, data = _instance(lambda: nn.Sequential(nn.Linear(3, 4), Bounded(), nn.Linear(4, 3)))
    with torch.no_grad():
        model.get_parameter("0.bias").zero_()
    data = [(0.01 * data[0][0], data[0][1]), (10.0 * data[1][0], data[1][1])]
    operator = _operator("hessian", Problem.build(model, loss, data, memory_budget=1))
    short, long = data
    assert isinstance(operator.linearize(short), ChainLinearization)
    assert not isinstance(operator.linearize(long), ChainLinearization)
    product = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    assert_close(product, reference.hessian(model, loss, data), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, loss, data = _instance(CHAINS["deep"])
    expected = reference.hessian(model, loss, data)
    operator = _operator("hessian", Problem.build(model.to(dtype), loss, [(x.to(dtype), y) for x, y in data]))
    assert all(_chained(operator))
    product = operator @ torch.eye(operator.shape[0], dtype=dtype)
    assert product.dtype == dtype
    # Sums over samples and layers of products, each of which was rounded a few times.
    assert_close(product, expected, 30 * torch.finfo(dtype).eps)


def test_a_faint_connection_past_a_layer_is_seen_in_single_precision() -> None:
    model, loss, data = _instance(FaintSkip)
    operator = _operator("hessian", Problem.build(model.float(), loss, [(x.float(), y) for x, y in data]))
    assert not any(_chained(operator))


@pytest.mark.parametrize("dense", [False, True], ids=["product", "dense"])
@pytest.mark.parametrize("source", ["hessian", "gauss_newton"])
def test_nor_is_a_faint_use_of_a_weight_beside_its_layer_lost(source: str, dense: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = Whispering(1e-4).eval(), points(40, torch.float32)
    data = [(x[:25], y[:25]), (x[25:], y[25:])]
    operator = _operator(source, Problem.build(model, nn.CrossEntropyLoss(), data))
    found = operator.to_dense() if dense else operator @ torch.eye(operator.shape[0])
    double = Whispering(1e-4).double().eval()
    double.load_state_dict(model.state_dict())
    batches = [(x.double(), y) for x, y in data]
    assert_close(found, CURVATURES[source](double, nn.CrossEntropyLoss(), batches), 1e-5)


@pytest.mark.parametrize("source", ["hessian", "gauss_newton"])
def test_mini_batches_do_not_stand_in_for_a_pass(source: str) -> None:
    """The last batch alone shows that the model is no chain; others were looked at many times before."""
    model, x, y = seldom(torch.float64)
    data = list(zip(x.split(10), y.split(10), strict=True))
    operator = _operator(source, Problem.build(model, nn.CrossEntropyLoss(), data, memory_budget=1))
    for _ in range(10):
        for part, _ in zip(operator.minibatches(torch.Generator().manual_seed(0)), range(2), strict=False):
            part @ torch.ones(operator.shape[0], dtype=torch.float64)
    product = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    assert_close(product, CURVATURES[source](model, nn.CrossEntropyLoss(), data), EXACT)


def test_parameters_written_to_are_held_against_autograd_again() -> None:
    model, x, y = seldom(torch.float64, 0.0)
    del model.scale
    model.scale = nn.Buffer(torch.zeros((), dtype=torch.float64))
    data = list(zip(x.split(10), y.split(10), strict=True))
    operator = _operator("gauss_newton", Problem.build(model, nn.CrossEntropyLoss(), data, memory_budget=1))
    identity = torch.eye(operator.shape[0], dtype=torch.float64)
    operator @ identity
    assert all(_chained(operator))
    model.scale.fill_(1.0)
    expected = CURVATURES["gauss_newton"](model, nn.CrossEntropyLoss(), data)
    assert_close(operator @ identity, expected, EXACT)


def test_later_passes_over_the_same_data_are_not_held_against_autograd_again() -> None:
    model, loss, data = _instance(CHAINS["deep"])
    operator = _operator("hessian", Problem.build(model, loss, data, memory_budget=1))
    columns = torch.eye(operator.shape[0], dtype=torch.float64)[:, :2]
    asked = []

    def count(*arguments: Any, **options: Any) -> bool:
        asked.append(arguments)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainGradients, "adds_up", count)
        operator @ columns
        once = len(asked)
        operator @ columns
    assert once == len(asked) > 1
