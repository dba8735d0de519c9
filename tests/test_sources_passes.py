"""How the curvatures go through the data: batches, passes, budgets, graphs and mini-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf
from influence_framework import Diagonal, LinearOperator, Minibatches, Problem, gradients
from influence_framework.data import map_leaves
from tests import cases, nets, reference
from tests.cases import Instance
from tests.reference import CURVATURES, assert_close

EXACT = 1e-10
TINY = 1
"""Bytes: nothing is cached, every batch is split into single samples."""


@pytest.fixture(params=CURVATURES)
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Counting(nn.Module):
    """Counts the forward passes of the model inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


def counted(name: str, **options: Any) -> tuple[Counting, Instance]:
    instance = cases.make(name, **options)
    model = Counting(instance.model).eval()
    return model, Instance(model, instance.loss, instance.data)


def passes(model: Counting, operator: LinearOperator, columns: Tensor) -> int:
    before = model.calls
    _ = operator @ columns
    return model.calls - before


def at_most_samples(count: int, instance: Instance) -> Problem:
    """The problem with a memory budget that holds the derivatives of ``count`` samples."""
    budget = cases.problem(instance).sample_bytes * 8 * count
    problem = cases.problem(instance, memory_budget=budget)
    assert problem.max_batch == count
    return problem


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=8)
@pytest.mark.parametrize("name", CURVATURES)
def test_pitfall_ragged_batches_are_weighted_by_their_samples(name: str, sizes: list[int]) -> None:
    instance = cases.make("tied_weights", sizes)
    expected = CURVATURES[name](instance.model, instance.loss, instance.data)
    held = cases.problem(instance)
    # As they are, which is how they are streamed; joined, which is how they are held; and cut.
    streamed = replace(held, data=instance.data, cached=False)
    assert [size for _, size in streamed.batches()] == sizes
    for problem in (streamed, held, cases.problem(instance, memory_budget=TINY)):
        assert_close(cases.by_columns(cases.operator(name, problem)), expected, EXACT)


@pytest.mark.parametrize("name", ["mapping_inputs", "conv", "sum"])
def test_batch_size_does_not_matter(name: str, source: str) -> None:
    expected = cases.by_columns(cases.operator(source, cases.problem(cases.make(name, [12]))))
    for sizes in ([1] * 12, [5, 5, 2], [11, 1], [4, 4, 4]):
        for at_most in (1, 5, 12):
            instance = cases.make(name, sizes)
            problem = at_most_samples(at_most, instance)
            # Rounding only: the sums are the same in another order.
            result = cases.by_columns(cases.operator(source, problem))
            assert_close(result, expected, 1e-13, f"{sizes} in batches of at most {at_most}")


@pytest.mark.parametrize("name", ["tuple_inputs", "mapping_inputs", "embedding", "conv"])
def test_a_tiny_memory_budget_gives_the_same(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CACHE_BYTES", 0)
    problem = cases.problem(cases.make(name), memory_budget=TINY)
    assert not problem.cached
    assert problem.max_batch == 1
    operator, expected = cases.operator(source, problem), cases.dense(name, source)
    columns = cases.columns(operator, 3)
    assert_close(operator @ columns, expected @ columns, EXACT)
    if isinstance(operator, Diagonal):
        assert_close(operator.diagonal(), expected.diagonal(), EXACT)


@pytest.mark.parametrize("budget", [2**20, TINY])
def test_pitfall_a_sum_is_told_from_a_mean_in_batches_of_one(budget: int, source: str) -> None:
    instance = cases.make("batch_size_one")
    total = Instance(instance.model, lambda o, t: F.cross_entropy(o, t, reduction="sum"), instance.data)
    operator = cases.operator(source, cases.problem(total, memory_budget=budget))
    assert_close(cases.by_columns(operator), cases.dense("batch_size_one", source), EXACT)


def test_batches_of_different_sequence_length(source: str) -> None:
    torch.manual_seed(0)
    model = nets.TokenMean().double().eval()
    data = [
        (torch.randint(5, (n, length)), torch.randint(2, (n,)))
        for n, length in [(3, 4), (2, 4), (4, 2), (1, 4)]
    ]
    instance = Instance(model, nn.CrossEntropyLoss(), data)
    expected = CURVATURES[source](model, instance.loss, data)
    for budget in (2**20, TINY):
        operator = cases.operator(source, cases.problem(instance, memory_budget=budget))
        assert_close(cases.by_columns(operator), expected, EXACT)


@pytest.mark.parametrize("cache", [0, 2**30])
@pytest.mark.parametrize("name", ["conv", "root_and_scalar_parameters", "linear_model", "recurrent"])
def test_columns_together_and_one_by_one(
    name: str, cache: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "CACHE_BYTES", cache)
    operator = cases.operator(source, cases.problem(cases.make(name)))
    columns = cases.columns(operator, 17)
    together = operator @ columns
    single = torch.stack([operator @ column for column in columns.T], dim=1)
    assert_close(together, single, 1e-13)
    assert_close(together, cases.dense(name, source) @ columns, EXACT)


def test_right_hand_sides_share_each_forward_pass(source: str) -> None:
    model, instance = counted("ragged_last_batch")
    problem = cases.problem(instance, memory_budget=2000)
    batches = len(list(problem.batches()))
    assert batches > 1
    operator = cases.operator(source, problem)
    operator.cover()  # the layers are looked for once, on two samples
    assert passes(model, operator, cases.columns(operator)) == batches
    assert passes(model, operator, cases.columns(operator, 40)) == batches
    assert passes(model, operator, cases.columns(operator, 0)) == 0


@pytest.mark.parametrize(("budget", "precompute_grad"), [(2000, True), (2**28, False)])
def test_graphs_are_reused_and_change_nothing(source: str, budget: int, precompute_grad: bool) -> None:
    """On request, or because they fit the budget."""
    model, instance = counted("ragged_last_batch")
    problem = cases.problem(instance, memory_budget=budget)
    operator = cases.operator(source, problem, precompute_grad=precompute_grad)
    operator.cover()  # the layers are looked for once, on two samples
    batches = len(list(problem.batches()))
    columns = cases.columns(operator, 3)
    assert passes(model, operator, columns) == batches
    assert passes(model, operator, columns) == 0
    fresh = cases.operator(source, problem) @ columns
    assert torch.equal(operator @ columns, fresh)
    assert torch.equal(operator @ columns, fresh)


def test_graphs_are_built_again_after_the_parameters_were_written_to(source: str) -> None:
    model, instance = counted("ragged_last_batch")
    problem = cases.problem(instance)
    operator = cases.operator(source, problem)
    columns = cases.columns(operator, 3)
    before = operator @ columns
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert_close(operator @ columns, cases.operator(source, problem) @ columns, 1e-14)
    assert not torch.allclose(operator @ columns, before)


def test_blocks_share_the_budget_for_graphs() -> None:
    """Each block has graphs of its own, so that all may be too many where one fits."""
    model, instance = counted("ragged_last_batch")
    names = list(dict(model.named_parameters()))
    whole = cases.problem(instance)
    needed = 2 * 3 * whole.sample_bytes * whole.size
    problem = cases.problem(instance, memory_budget=needed + 1)
    source = inf.hessian_sources["gauss_newton"].create()
    for parameters, kept in ((problem.parameters, True), (problem.parameters.subset(names[:1]), False)):
        operator = source.operator(problem, parameters)
        columns = cases.columns(operator, 3)
        passes(model, operator, columns)
        assert (passes(model, operator, columns) == 0) == kept


@pytest.mark.parametrize("budget", [2**20, TINY])
def test_shuffling_loader(source: str, budget: int) -> None:
    instance = cases.make("ragged_last_batch")
    x, y = (torch.cat(parts) for parts in zip(*instance.data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    problem = cases.problem(Instance(instance.model, instance.loss, loader), memory_budget=budget)
    operator = cases.operator(source, problem)
    before = torch.get_rng_state()
    first, second = cases.by_columns(operator), cases.by_columns(operator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert_close(first, cases.dense("ragged_last_batch", source), EXACT)


@pytest.mark.parametrize("name", ["tuple_inputs", "mapping_inputs", "embedding"])
def test_loader_over_single_samples(name: str, source: str) -> None:
    instance = cases.make(name)
    # Without their batch dimension, for the loader to put together: tuples come back as lists.
    singles = [map_leaves(lambda tensor: tensor[0], sample) for sample in reference.samples(instance.data)]
    loader: DataLoader[Any] = DataLoader(singles, batch_size=4)  # type: ignore[arg-type]
    problem = cases.problem(Instance(instance.model, instance.loss, loader))
    assert_close(cases.by_columns(cases.operator(source, problem)), cases.dense(name, source), EXACT)


@pytest.mark.parametrize("budget", [2**20, TINY])
def test_minibatches_average_to_the_whole(source: str, budget: int) -> None:
    problem = cases.problem(cases.make("ragged_last_batch"), memory_budget=budget)
    operator = cases.operator(source, problem)
    assert isinstance(operator, Minibatches)
    expected = cases.dense("ragged_last_batch", source)
    stream = operator.minibatches(torch.Generator().manual_seed(3))
    for _ in range(2):
        total, samples, matrices = torch.zeros_like(expected), 0, []
        while samples < problem.size:
            batch = next(stream)
            matrices.append(cases.by_columns(batch))
            total += batch.size * matrices[-1]
            samples += batch.size
        assert samples == problem.size
        assert len(matrices) > 1
        assert reference.relative_error(matrices[0], expected) > 1e-2
        assert_close(total / samples, expected, EXACT)


def test_minibatches_are_decided_by_their_generator() -> None:
    operator = cases.operator("hessian", cases.problem(cases.make("ragged_last_batch")))

    def first_three(seed: int) -> list[Tensor]:
        stream = operator.minibatches(torch.Generator().manual_seed(seed))
        return [cases.by_columns(batch) for batch in islice(stream, 3)]

    torch.manual_seed(0)
    once = first_three(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = first_three(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], first_three(6)[0])


def test_definiteness_is_asked_of_samples_in_hand_and_begins_no_pass() -> None:
    instance = cases.make("ragged_last_batch")
    begun: list[int] = []

    class Data(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            begun.append(1)
            return super().__iter__()

    problem = Problem.build(instance.model, instance.loss, Data(instance.data), memory_budget=TINY)
    operator, before = cases.operator("gauss_newton", problem), len(begun)
    assert getattr(operator, "positive_semidefinite", None) is True
    assert len(begun) == before
