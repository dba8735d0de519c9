"""Dense matrices ``1/N Σ Jᵀ H J`` from per-sample Jacobians: exact, and chosen by count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from influence_framework import Problem, hessian_sources
from influence_framework.operators import to_dense
from influence_framework.parameters import Blocks
from influence_framework.sources import outer_products
from influence_framework.sources.streaming import StreamingOperator
from tests import cases, reference
from tests.reference import assert_close

EXACT = 1e-10
SOURCES = pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher"])


NOT_PLAIN = [
    "conv",
    "tied_weights",
    "module_used_twice",
    "root_and_scalar_parameters",
    "embedding",
    "batch_norm",
    "recurrent",
    "transformer",
    "one_loss_term_per_token",
    "mapping_inputs",
]


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of columns of every product with a curvature."""
    counts: list[int] = []
    product = StreamingOperator._matmat

    def counted(self: StreamingOperator, columns: Tensor) -> Tensor:
        counts.append(columns.shape[1])
        return product(self, columns)

    monkeypatch.setattr(StreamingOperator, "_matmat", counted)
    return counts


@SOURCES
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_takes_one_product_where_layers_are_not_plain(name: str, source: str, multiplied: list[int]) -> None:
    operator = cases.operator(source, cases.problem(cases.make(name)))
    assert_close(to_dense(operator), cases.dense(name, source), EXACT)
    assert multiplied == [1], "one column confirms the matrix; all others would be the slow way"


@SOURCES
@pytest.mark.parametrize("sizes", [[1] * 7, [9, 1, 2], [11]], ids=str)
def test_ragged_batches_within_a_small_budget(sizes: list[int], source: str) -> None:
    instance = cases.make("conv", sizes)
    operator = cases.operator(source, cases.problem(instance, memory_budget=2**14))
    expected = reference.CURVATURES[source](instance.model, instance.loss, instance.data)
    assert_close(to_dense(operator), expected, EXACT)


@SOURCES
def test_strips_meet_without_a_seam(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer_products, "STRIP", 7)
    matrix = to_dense(cases.operator(source, cases.problem(cases.make("conv"))))
    assert_close(matrix, cases.dense("conv", source), EXACT)
    assert torch.equal(matrix, matrix.T)


@SOURCES
def test_blocks_are_those_of_the_whole(source: str, multiplied: list[int]) -> None:
    problem = cases.problem(cases.make("conv"))
    whole = cases.dense("conv", source)
    for names in Blocks.resolve("per_layer", problem.parameters).values():
        block = problem.parameters.subset(names)
        index = problem.parameters.indices_of(block)
        matrix = to_dense(hessian_sources[source].create().operator(problem, block))
        assert_close(matrix, whole[index][:, index], EXACT)
    assert set(multiplied) == {1}


def test_a_loss_that_is_not_convex_in_the_outputs(multiplied: list[int]) -> None:
    instance = cases.make("conv")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sin() * outputs.roll(1, -1)).mean() + 0 * targets.sum()

    operator = cases.operator("gauss_newton", Problem.build(instance.model, loss, instance.data))
    assert_close(to_dense(operator), cases.by_columns(operator), EXACT)
    assert multiplied[0] == 1


@SOURCES
def test_of_many_outputs_each_way_takes_what_the_other_would_not(source: str, multiplied: list[int]) -> None:
    """``c P²`` flops of one large product a sample against ``P`` passes through the net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 100)).double()
        data = [(torch.randn(3, 2, dtype=torch.float64), torch.randint(100, (3,)))]
    loss = nn.CrossEntropyLoss()
    operator = cases.operator(source, Problem.build(net, loss, data))
    assert_close(to_dense(operator), reference.CURVATURES[source](net, loss, data), EXACT)
    # A hundred rows a sample, and one.
    assert multiplied == ([256, 48] if source == "gauss_newton" else [1])
