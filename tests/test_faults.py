"""Whatever stops a fit or a score, wherever: model, random states and the previous fit stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.memory import is_out_of_memory
from influence_framework.problem import Problem
from tests import nets, small
from tests.traces import assert_same, trace

# The run-time checks of the tests draw from Python's random numbers themselves.
pytestmark = pytest.mark.usefixtures("as_user")


class Fuse:
    """Raises at its ``at``-th call, and at all that follow if it is lasting; never while ``at`` is 0."""

    def __init__(self) -> None:
        self.at, self.calls, self.error, self.lasting = 0, 0, BaseException, False

    def arm(self, at: int, error: Any, *, lasting: bool = False) -> None:
        self.at, self.calls, self.error, self.lasting = at, 0, error, lasting

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.lasting and 0 < self.at < self.calls):
            raise self.error


class Fused(nn.Module):
    """A net with dropout in eval mode, a buffer and a fuse."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[0](x)
        self.fuse()
        out: Tensor = self.net[1:](hidden)
        return out


class FusedOperator(inf.Operator):
    def __init__(self, inner: Any, fuse: Fuse) -> None:
        self.inner, self.fuse = inner, fuse

    @property
    def shape(self) -> tuple[int, int]:
        shape: tuple[int, int] = self.inner.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.inner.device  # type: ignore[no-any-return]

    def _matmat(self, columns: Tensor) -> Tensor:
        self.fuse()
        product: Tensor = self.inner @ columns
        self.fuse()
        return product

    def minibatches(self, generator: torch.Generator) -> Iterator[inf.LinearOperator]:
        return (FusedOperator(operator, self.fuse) for operator in self.inner.minibatches(generator))


class FusedSource:
    """Gauss-Newton with a fuse before and after every product."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def operator(self, problem: Problem, parameters: inf.ParameterSpace) -> FusedOperator:
        source = inf.hessian_sources["gauss_newton"].create()
        return FusedOperator(source.operator(problem, parameters), self.fuse)


SOLVERS: dict[str, Any] = {
    "cg": "cg",
    "ekfac": {"name": "ekfac", "samples": 1},
    "lissa": {"name": "lissa", "maxiter": 12, "rtol": 0.5},
}
DATA = [small.points(4), small.points(3, 2), small.points(4, 3)]
TEST, TRAIN = small.points(3, 5), small.points(5, 6)
CALLS: dict[str, Callable[[inf.TorchInfluenceFunctionModel], object]] = {
    "fit": lambda m: m.fit(loader()),
    "up": lambda m: m.influences(*TEST, *TRAIN),
    "perturbation": lambda m: m.influences(*TEST, *TRAIN, mode="perturbation"),
    "factors": lambda m: m.influence_factors(*TRAIN),
    "self_influences": lambda m: m.self_influences(*TRAIN),
}


def loader() -> Any:
    dataset = torch.utils.data.ConcatDataset([torch.utils.data.TensorDataset(x, y) for x, y in DATA])
    return torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)


def prepared(solver: str, where: str, budget: int) -> tuple[inf.TorchInfluenceFunctionModel, Fuse]:
    fuse, idle = Fuse(), Fuse()
    torch.manual_seed(0)
    model = Fused(fuse if where == "forward" else idle).double().eval()
    model.net[0].train()  # a mode of the user's own
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    source: Any = FusedSource(fuse) if where == "product" else "gauss_newton"
    influence = inf.compose(
        model,
        nn.CrossEntropyLoss(),
        solver=SOLVERS[solver],
        source=source,
        hessian_regularization=0.5,
        memory_budget=budget,
    )
    return influence.fit(loader()), fuse


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("solver", "where"),
    [("cg", "forward"), ("cg", "product"), ("ekfac", "forward"), ("lissa", "forward"), ("lissa", "product")],
)
@pytest.mark.parametrize("budget", [3000, 2**26], ids=["streamed", "held"])
def test_nothing_is_left_wherever_it_stops(solver: str, where: str, call: str, budget: int) -> None:
    influence, fuse = prepared(solver, where, budget)
    total = calls(influence, fuse, call)
    expected = influence.influences(*TEST, *TRAIN)
    before = trace(influence.model)
    # Every early call, where the checks are, and some of the later ones, which are alike.
    places = sorted({*range(1, min(total, 6) + 1), *range(7, total + 1, max(1, total // 4))})
    outcomes = set()
    for index, at in enumerate(places):
        error = (KeyboardInterrupt, RuntimeError)[index % 2]
        fitted = influence._fit
        outcomes.add((error, came := stopped(influence, fuse, call, at, error)))
        if came:
            assert influence._fit is fitted
        influence._fit = fitted  # of a fit that went on another way, nothing is asked here
        assert_same(before, trace(influence.model))
    # Some errors mean "not this way" to those who try; an interrupt never does.
    assert (KeyboardInterrupt, False) not in outcomes
    fuse.arm(0, None)
    torch.testing.assert_close(influence.influences(*TEST, *TRAIN), expected, rtol=1e-12, atol=1e-14)


def calls(influence: inf.TorchInfluenceFunctionModel, fuse: Fuse, call: str) -> int:
    """How often the fuse is passed, once what is kept from the first time on is there."""
    CALLS[call](influence)
    fuse.arm(0, None)
    CALLS[call](influence)
    return fuse.calls


def stopped(
    influence: inf.TorchInfluenceFunctionModel, fuse: Fuse, call: str, at: int, error: type[BaseException]
) -> bool:
    """Whether ``error``, raised at one place, came through."""
    fuse.arm(at, error("stopped"))
    try:
        CALLS[call](influence)
    except (KeyboardInterrupt, RuntimeError, ValueError):
        return True
    return False


def test_a_first_fit_that_is_stopped_leaves_the_model_unfitted() -> None:
    fuse = Fuse()
    influence = small.model(Fused(fuse).double().eval(), solver="cg")
    fuse.arm(9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        influence.fit(DATA)
    assert not influence.is_fitted
    assert influence.fit(DATA).is_fitted


def test_graphs_that_were_not_all_built_are_built_again() -> None:
    """After the parameters were written to, graphs are rebuilt; stopped halfway, the old ones are not used."""
    fuse = Fuse()
    module = Fused(fuse).double().eval()
    problem = Problem.build(module, nn.CrossEntropyLoss(), DATA)
    source = inf.hessian_sources["gauss_newton"]
    operator = source.create(precompute_grad=True).operator(problem, problem.parameters)
    column = torch.ones(operator.shape[0], dtype=torch.float64)
    before = operator @ column
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    fuse.arm(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        operator @ column
    fresh = source.create().operator(problem, problem.parameters)
    torch.testing.assert_close(operator @ column, fresh @ column)
    assert not torch.allclose(operator @ column, before)


EXHAUSTED: dict[str, Callable[[], BaseException]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "python": lambda: MemoryError(),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
}


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::influence_framework.SmallerBatchWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("kind", "solver"), [("accelerator", "ekfac"), ("python", "cg"), ("cpu", "lissa"), ("windows", "ekfac")]
)
def test_running_out_of_memory_says_what_helps(kind: str, solver: str, call: str) -> None:
    influence, fuse = prepared(solver, "forward", 2**26)
    total, fitted = calls(influence, fuse, call), influence._fit
    for at in range(1, min(total, 14) + 1):
        original = EXHAUSTED[kind]()
        fuse.arm(at, original, lasting=True)
        with pytest.raises(inf.OutOfMemoryError) as caught:
            CALLS[call](influence)
        assert caught.value.__cause__ is original
        message = str(caught.value)
        assert f"memory_budget, which is {2**26} bytes now" in message
        assert ("fewer points per call" in message) == (call != "fit")
        assert "blocks='per_layer'" in message
        assert influence._fit is fitted
    assert total


def test_small_blocks_are_not_told_to_be_smaller() -> None:
    fuse = Fuse()
    influence = small.model(Fused(fuse).double().eval(), blocks="per_layer")
    fuse.arm(1, MemoryError("no"), lasting=True)
    message = (
        r"fit ran out of memory \(no\), a single sample at a time too: lower memory_budget, which is \d+ bytes "
        r"now, or use shorter samples, a lower precision or a device with more memory\.$"
    )
    with pytest.raises(MemoryError, match=message):
        influence.fit(DATA)


def test_a_loss_that_runs_out_of_memory() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise EXHAUSTED["cpu"]()

    with pytest.raises(inf.OutOfMemoryError):
        small.model(loss=loss).fit(DATA)


class Huge(nets.Unused):
    """Asks for more memory than any machine has."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + x.new_empty(2**58)[0]


def test_a_real_allocation_that_fails(device: torch.device) -> None:
    x, y = (tensor.to(device) for tensor in small.points(4))
    with pytest.raises(inf.OutOfMemoryError, match="lower memory_budget") as caught:
        small.model(Huge().double().to(device)).fit([(x, y)])
    assert caught.value.__cause__ is not None
    assert is_out_of_memory(caught.value.__cause__)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError()]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
    fuse = Fuse()
    influence = small.model(Fused(fuse).double().eval())
    fuse.arm(1, error)
    with pytest.raises(type(error)) as caught:
        influence.fit(DATA)
    assert caught.value is error
