"""λ as a fraction of the mean eigenvalue of each block, and self-influences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import influence_framework as inf
from influence_framework.regularization import mean_eigenvalue
from influence_framework.sources.streaming import StreamingOperator
from tests import cases, nets, reference, small
from tests.fits import STRUCTURES, compose
from tests.reference import assert_close

TENTH = inf.RelativeRegularization(0.1)
SOURCES = {
    "gauss_newton": reference.gauss_newton,
    "empirical_fisher": reference.empirical_fisher,
    "hessian": reference.hessian,
}


@pytest.mark.parametrize("name", ["ragged_last_batch", "tied_weights"])
@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher"])
def test_the_mean_eigenvalue_is_exact(source: str, name: str) -> None:
    instance = cases.make(name)
    problem = inf.Problem.build(instance.model, instance.loss, instance.data)
    operator = inf.hessian_sources[source].create().operator(problem, problem.parameters)
    expected = cases.dense(name, source).diagonal().mean()
    assert_close(torch.tensor(mean_eigenvalue(operator), dtype=torch.float64), expected, 1e-10)


class Scaled(nn.Module):
    """Seventy outputs; the last parameter is in no layer, where asked for."""

    def __init__(self, free: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 70)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 70), requires_grad=free)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * self.scale
        return result


@pytest.mark.parametrize("free", [False, True], ids=["layers", "a parameter in no layer"])
@pytest.mark.parametrize(("source", "tolerance"), [("empirical_fisher", 1e-10), ("gauss_newton", 0.1)])
def test_the_mean_eigenvalue_with_many_outputs(source: str, tolerance: float, free: bool) -> None:
    """Exact for the empirical Fisher whatever the outputs; else from few draws, each of which counts once."""
    torch.manual_seed(0)
    net = Scaled(free).double().eval()
    data = [(torch.randn(size, 3, dtype=torch.float64), torch.randint(70, (size,))) for size in (60, 40)]
    problem = inf.Problem.build(net, nn.CrossEntropyLoss(), data)
    operator = inf.hessian_sources[source].create().operator(problem, problem.parameters)
    expected = (operator @ torch.eye(operator.shape[0], dtype=torch.float64)).diagonal().mean()
    assert_close(torch.tensor(mean_eigenvalue(operator), dtype=torch.float64), expected, tolerance)


def test_the_estimate_for_other_operators() -> None:
    torch.manual_seed(0)
    root = torch.randn(300, 40, dtype=torch.float64)

    class Bare(inf.Operator):
        shape, dtype, device = (300, 300), torch.float64, torch.device("cpu")

        def _matmat(self, columns: torch.Tensor) -> torch.Tensor:
            return root @ (root.T @ columns)

    assert mean_eigenvalue(Bare()) == pytest.approx(float(root.square().sum()) / 300, rel=0.1)


@pytest.mark.parametrize("structure", ["full", "per_layer", "interleaved"])
@pytest.mark.parametrize("solver", ["direct", {"name": "cg", "rtol": 1e-11, "atol": 0.0}])
def test_every_block_gets_a_fraction_of_its_own(solver: Any, structure: str) -> None:
    name = "ragged_last_batch"
    instance = cases.make(name)
    names = list(reference.trainable(instance.model))
    blocks = STRUCTURES[structure][0](names)
    dense = cases.dense(name, "gauss_newton")
    strengths = {
        block: 0.1 * float(dense.diagonal()[reference.positions(instance.model, members)].mean())
        for block, members in STRUCTURES[structure][1](names).items()
    }
    given = {"solver": solver, "blocks": blocks}
    relative = compose(instance, hessian_regularization=TENTH, **given).fit(instance.data)
    absolute = compose(instance, hessian_regularization=strengths, **given).fit(instance.data)
    points = cases.points(name, 3, 1)
    expected = absolute.influences_by_block(*points)
    for scores in (
        relative.influences_by_block(*points),
        absolute.with_regularization(TENTH).influences_by_block(*points),
        absolute.with_regularization(dict.fromkeys(strengths, TENTH)).influences_by_block(*points),
        absolute.explore_hessian_regularization(*points, [TENTH, 3.0])[TENTH],
    ):
        assert scores.keys() == expected.keys()
        for block in expected:
            assert_close(scores[block], expected[block], 1e-8, block)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("blocks", ["full", "per_layer"])
def test_the_mean_eigenvalue_is_measured_once_for_a_fit(
    blocks: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small.model(source=source, blocks=blocks, memory_budget=1, preflight=False)
    passes: list[int] = []
    original = inf.Problem.batches

    def counted(problem: inf.Problem, *arguments: Any) -> Iterator[tuple[Any, int]]:
        passes.append(1)
        return original(problem, *arguments)

    sums: list[int] = []
    together = StreamingOperator.layer_sums

    def noted(operator: StreamingOperator, layers: Any, *rest: Any) -> Any:
        sums.append(len(layers))
        return together(operator, layers, *rest)

    fitted = model.with_regularization(3.0).fit(small.batches())
    monkeypatch.setattr(inf.Problem, "batches", counted)
    monkeypatch.setattr(StreamingOperator, "layer_sums", noted)

    def passes_of(action: Callable[[], object]) -> int:
        before = len(passes)
        action()
        return len(passes) - before

    points = small.points()
    tried = [inf.RelativeRegularization(fraction) for fraction in (100.0, 200.0, 300.0)]
    number = passes_of(lambda: fitted.explore_hessian_regularization(*points, [1.0, 2.0]))
    measured = passes_of(lambda: fitted.with_regularization(tried[0]))
    assert measured > 0
    assert len(sums) == (source != "hessian")
    assert passes_of(lambda: fitted.with_regularization(tried[1])) == 0
    assert passes_of(lambda: fitted.with_regularization(0.5).with_regularization(tried[2])) == 0
    assert passes_of(lambda: fitted.explore_hessian_regularization(*points, tried)) == number


def test_curvature_that_is_mostly_negative_has_no_fraction() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2, 1).double().eval()
    data = [(torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64))]
    model = inf.compose(
        module,
        lambda output, target: -(output - target).square().mean(),
        solver="direct",
        source="hessian",
        hessian_regularization=TENTH,
    )
    with pytest.raises(inf.InvalidInputError, match="mostly negative"):
        model.fit(data)


@pytest.mark.parametrize("fraction", [-0.1, float("nan"), float("inf"), True])
def test_what_is_no_fraction(fraction: Any) -> None:
    with pytest.raises(inf.InvalidInputError, match="regularisation"):
        inf.RelativeRegularization(fraction)


@pytest.mark.parametrize("blocks", ["full", "per_layer"])
@pytest.mark.parametrize("budget", [2**14, 2**28])
def test_self_influences_are_the_diagonal(blocks: str, budget: int) -> None:
    model = small.fitted(blocks=blocks, memory_budget=budget)
    points = small.points(6)
    assert_close(model.self_influences(*points), model.influences(*points).diagonal(), 1e-12)
    by_block = model.self_influences_by_block(*points)
    expected = model.influences_by_block(*points)
    for block in expected:
        assert_close(by_block[block], expected[block].diagonal(), 1e-12)


def test_a_layer_that_is_not_covered_leaves_the_exact_diagonal() -> None:
    torch.manual_seed(0)
    module = nets.mlp(3, 4, 2).append(nn.PReLU()).double().eval()
    data = small.batches()
    problem = inf.Problem.build(module, nn.CrossEntropyLoss(), data)
    operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
    expected = reference.gauss_newton(module, nn.CrossEntropyLoss(), data).diagonal().mean()
    assert_close(torch.tensor(mean_eigenvalue(operator), dtype=torch.float64), expected, 1e-10)
