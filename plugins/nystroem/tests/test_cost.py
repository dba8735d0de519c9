"""What ``nystroem`` says that leading rows take, against what they do: within a factor of three."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from influence_framework_nystroem import NystroemSolver
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import influence_framework as inf
from influence_framework.costs import Workload
from influence_framework.sources.streaming import StreamingOperator
from tests.test_memory import measured

FACTOR = 3.0
LOSS = nn.CrossEntropyLoss()
SAMPLES = 300
ROWS = 240


def within(predicted: float, found: float) -> None:
    assert found / FACTOR <= predicted <= found * FACTOR, f"{predicted:.3g} predicted, {found:.3g} found"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Not one of linear layers alone, whose rows take no products with each other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 40, 3), nn.Tanh(), nn.Flatten(), nn.Linear(640, 3)).eval()


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(SAMPLES, 1, 6, 6), torch.randint(3, (SAMPLES,)))]


@pytest.fixture(scope="module")
def workload(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Workload:
    return inf.advise(net, LOSS, data, hessian_regularization=0.1).workload


@pytest.mark.filterwarnings("ignore::influence_framework.IndefiniteOperatorWarning")
@pytest.mark.parametrize("source", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("rank", [20, 120], ids=["subspace iteration", "all eigenvectors"])
def test_work(
    source: str,
    rank: int,
    net: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    workload: Workload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solver = NystroemSolver(rank=rank, leading_rows=ROWS, checks=7)
    cost = solver.cost(replace(workload, semidefinite=source == "gauss_newton"))
    (passes, once), *checks = cost.fit.products

    problem = inf.Problem.build(net, LOSS, data)
    operator = inf.hessian_sources[source].create().operator(problem, problem.parameters)
    product = StreamingOperator._matmat
    widths, multiplied, seen = [], [], []

    def counted(self: StreamingOperator, columns: Tensor) -> Tensor:
        widths.append(columns.shape[1])
        before = len(seen)
        with FlopCounterMode(display=False) as apart:
            result = product(self, columns)
        del seen[before:]
        multiplied.append(apart.get_total_flops())
        return result

    monkeypatch.setattr(StreamingOperator, "_matmat", counted)
    hook = net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with FlopCounterMode(display=False) as counter:
        solver.fit(operator, 100.0)
    hook.remove()
    assert bool(checks) == bool(widths) == (source == "hessian")
    within(sum(count * width for count, width in checks), sum(widths))
    within(passes * once * SAMPLES, sum(seen))
    # All but the eigenvectors of a small matrix, which are not counted.
    within(cost.fit.flops, counter.get_total_flops() - sum(multiplied))


MEMORY = """
import sys

import torch
from torch import Tensor, nn

import influence_framework as inf
from tests.peak import peak


def fit(width, rank, rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16 * width, 3)).eval()
    x, y = torch.randn(rows, 1, 6, 6), torch.randint(3, (rows,))
    problem = inf.Problem.build(net, nn.CrossEntropyLoss(), [(x, y)])
    operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
    return inf.solvers["nystroem"].create(rank=rank, leading_rows=rows).fit(operator, 0.1), problem


torch.set_num_threads(1)
fit(2, 4, 8)
baseline = peak()
found, problem = fit(*map(int, sys.argv[1:]))
print(peak() - baseline, problem.parameters.numel)
"""


@pytest.mark.parametrize("rank", [20, 250])
def test_memory(rank: int, workload: Workload) -> None:
    grown, size = measured(MEMORY, "600", str(rank), "300")
    cost = NystroemSolver(rank=rank, leading_rows=300).cost(replace(workload, parameters=size))
    assert cost.fit_bytes > 30 * 2**20  # above what an allocator's habits amount to
    within(cost.fit_bytes, grown)
