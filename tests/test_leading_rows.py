"""The rows of a square root of the curvature that samples contribute most with."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from influence_framework import (
    InvalidInputError,
    LeadingRows,
    LinearOperator,
    NonFiniteError,
    Problem,
    RootRows,
    hessian_sources,
)
from influence_framework.operators import to_dense
from influence_framework.sources import leading
from tests import cases
from tests.cases import CASES
from tests.reference import assert_close
from tests.test_plain import Whispering, points

EXACT = 1e-10
ALL = 10_000


def rows_of(name: str, source: str = "gauss_newton", count: int = ALL) -> Tensor:
    operator = cases.operator(source, cases.problem(cases.make(name).to(torch.float64)))
    assert isinstance(operator, LeadingRows)
    return operator.leading_rows(count).rows


@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("name", CASES)
def test_all_rows_make_up_the_curvature(name: str, source: str) -> None:
    rows = rows_of(name, source)
    assert_close(rows.T @ rows, cases.dense(name, source), EXACT)


@pytest.mark.parametrize("name", ["relu", "tied_weights", "conv"])
def test_of_the_hessian_they_are_the_gauss_newton_part(name: str) -> None:
    rows = rows_of(name, "hessian")
    assert_close(rows.T @ rows, cases.dense(name, "gauss_newton"), EXACT)


def line(weights: Tensor, x: Tensor, y: Tensor, batch_size: int) -> LeadingRows:
    """Three outputs of a linear model, whose rows are known."""
    model = nn.Linear(2, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weights)
    data = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    problem = Problem.build(model, nn.CrossEntropyLoss(), data)
    return cast(LeadingRows, hessian_sources["gauss_newton"].create().operator(problem, problem.parameters))


@pytest.mark.parametrize("batch_size", [4, 7, 50])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_largest_of_all_batches_the_largest_first(count: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    x = 3 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (50,), generator=generator)
    p = (x @ weights.T).softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    every = (values.clamp_min(0).sqrt()[:, None] * vectors).mT.flatten(0, 1)
    index = every.norm(dim=1).argsort(descending=True)[:count]
    expected = (every[index, :, None] * x[index // 3, None, :]).flatten(1) / 50**0.5
    found = line(weights, x, y, batch_size).leading_rows(count).rows
    signs = (found * expected).sum(1, keepdim=True).sign()
    assert_close(signs * found, expected, EXACT)


def test_samples_without_curvature_have_no_row() -> None:
    """With logits 2000 apart the softmax is one to the last bit."""
    x = torch.cat([torch.ones(3, 2), 1e3 * torch.ones(2, 2)]).double()
    weights, y = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]), torch.zeros(5, dtype=torch.int64)
    rows = line(weights, x, y, 5).leading_rows(ALL).rows
    assert len(rows) <= 3 * 3
    assert (torch.linalg.vector_norm(rows, dim=1) > 0).all()
    assert len(line(weights, x[3:], y[3:], 2).leading_rows(ALL)) == 0


class Branching(nn.Module):
    """Control flow on values, which cannot be vectorised over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flags = (x.sum(1) > 0).tolist()
        branches = [self.first if flag else self.second for flag in flags]
        return torch.stack([branch(row) for branch, row in zip(branches, x, strict=True)])


def test_of_a_model_that_cannot_be_vectorised() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(2, (12,))
    problem = Problem.build(Branching(), nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])])
    operator = hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
    rows = cast(LeadingRows, operator).leading_rows(ALL).rows
    assert_close(rows.T @ rows, to_dense(operator), EXACT)


def test_of_many_outputs_one_random_row_each() -> None:
    """Of the same sample many times over: the mean of their outer products is its curvature."""
    torch.manual_seed(0)
    model, copies = nn.Linear(1, 80, bias=False, dtype=torch.float64), 20_000
    x, y = torch.ones(copies, 1, dtype=torch.float64), torch.zeros(copies, dtype=torch.int64)
    problem = Problem.build(model, nn.CrossEntropyLoss(), [(x, y)])
    operator = hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
    rows = cast(LeadingRows, operator).leading_rows(copies).rows
    assert rows.shape == (copies, 80)
    # Entries are means of copies terms of magnitude p: their errors are of the order of √(p / copies).
    assert_close(rows.T @ rows, to_dense(operator), 0.15)


@pytest.mark.parametrize("count", [0, -3])
def test_no_rows_are_refused(count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"must be positive, got {count}"):
        rows_of("relu", count=count)


def net_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3))
    if kind == "frozen":
        cast(nn.Linear, model[3]).weight.requires_grad_(False)
    return Whispering(1e-4) if kind == "whispering" else model


def curvature_of(kind: str, dtype: torch.dtype, parameters: slice = slice(None)) -> tuple[Problem, LeadingRows]:
    x, y = points(40, dtype)
    data = list(zip(x.split(13), y.split(13), strict=True))
    problem = Problem.build(net_of(kind).to(dtype).eval(), nn.CrossEntropyLoss(), data)
    names = problem.parameters.subset(problem.parameters.names[parameters])
    return problem, cast(LeadingRows, hessian_sources["gauss_newton"].create().operator(problem, names))


@pytest.mark.parametrize("parameters", [slice(None), slice(1, 3), slice(2, 3)], ids=["all", "layer", "bias"])
@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_of_linear_layers_without_gradients_of_samples(
    kind: str, parameters: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = curvature_of(kind, torch.float64, parameters)[1]
    with monkeypatch.context() as patch:
        patch.setattr(leading, "plain_layers_of", lambda *_: None)
        rows = expected.leading_rows(70)
    monkeypatch.setattr(leading, "sample_pullbacks", None)
    found = curvature_of(kind, torch.float64, parameters)[1].leading_rows(70)
    assert isinstance(found, leading.PlainRows)
    assert_close(found.rows, rows.rows, 1e-13)
    assert_close(found.inner(), rows.rows @ rows.rows.T, 1e-13)
    assert_close(rows.inner(), rows.rows @ rows.rows.T, 1e-13)


def test_a_weight_beside_its_layer_is_in_the_rows() -> None:
    problem, operator = curvature_of("whispering", torch.float32)
    rows = operator.leading_rows(ALL).rows
    assert_close(rows.T @ rows, to_dense(cast(LinearOperator, operator)), 1e-5)
    assert problem.plain[problem.parameters.names] is None


def test_inner_products_are_in_float64() -> None:
    """The sum of many products of numbers of float32 is not rounded to float32."""
    rows = torch.randn(30, 70_000, generator=torch.Generator().manual_seed(0))
    assert_close(RootRows(rows).inner(), rows.double() @ rows.double().T, 1e-12)


def test_a_row_that_is_not_finite_is_told_of() -> None:
    problem, operator = curvature_of("plain", torch.float64)
    with torch.no_grad():
        next(problem.model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        operator.leading_rows(5)
