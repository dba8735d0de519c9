"""How many samples are brought into matrix form together, and that a pass keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.derivatives import CACHE_BYTES
from influence_framework.layers import cover, layer_batches, samples_at_once, true_gradients
from tests import cases, nets
from tests.reference import assert_close


def problem_of(*, held: int, sample_bytes: int, sizes: list[int] | None = None) -> inf.Problem:
    """One that holds the second derivatives of ``held`` samples."""
    problem = cases.problem(cases.make("ragged_last_batch", sizes))
    return replace(problem, sample_bytes=sample_bytes, memory_budget=8 * sample_bytes * held)


LARGE = CACHE_BYTES // 8
"""Bytes of a sample of which four fill the cache."""


@pytest.mark.parametrize(
    ("held", "sample_bytes", "draws", "expected"),
    [
        # By the budget: sixteen draws' output gradients take about what second derivatives do, a single one's
        # less than a third.
        (6, LARGE, 1, 20),
        (1, LARGE, 1, 3),
        (20, LARGE, 1, 32),
        (20, LARGE, 16, 20),
        (20, LARGE, 17, 18),
        (20, LARGE, 160, 2),
        (20, LARGE, 10_000, 1),
        (1, LARGE, 32, 1),
        # By the cache, but at least a batch worth its overhead.
        (10**6, LARGE, 1, 32),
        (10**6, CACHE_BYTES // 200, 1, 100),
        (10**6, CACHE_BYTES // 200, 16 * 10**6 // 50, 50),
    ],
)
def test_how_many_samples_are_worked_on_together(
    held: int, sample_bytes: int, draws: int, expected: int
) -> None:
    assert samples_at_once(problem_of(held=held, sample_bytes=sample_bytes), draws) == expected


@pytest.mark.parametrize("samples", [1, 48, "exact"])
def test_a_pass_takes_no_more_at_a_time_and_every_sample_once(samples: inf.layers.Samples) -> None:
    problem = problem_of(held=6 if samples == 48 else 2, sample_bytes=1024, sizes=[7, 5])
    (layers, draws) = cover(problem, problem.parameters).layers, 3 if samples == "exact" else samples
    assert isinstance(draws, int)
    largest = samples_at_once(problem, draws)
    found = list(layer_batches(problem, layers, true_gradients(problem), samples))
    sizes = [size for _, size in found]
    # Batches are held as second derivatives leave room for; neighbours of them are joined, and none is cut.
    assert largest - problem.max_batch < max(sizes) <= largest == {1: 6, "exact": 5, 48: 2}[samples]
    assert sum(sizes) == problem.size
    at_once = replace(problem, memory_budget=2**28)
    ((whole, _),) = layer_batches(at_once, layers, true_gradients(problem), samples)
    for layer in layers:
        inputs = torch.cat([batches[layer].inputs for batches, _ in found], dim=1)
        assert_close(inputs, whole[layer].inputs, 1e-12)


class Refilled:
    """Yields one buffer, filled again for every batch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        buffers = torch.empty_like(self.x[:5]), torch.empty_like(self.y[:5])
        for parts in zip(self.x.split(5), self.y.split(5), strict=True):
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part)
            yield buffers


def test_batches_of_a_loader_that_refills_its_buffer_are_used_as_they_come() -> None:
    x, y = torch.randn(400, 4, dtype=torch.float64), torch.randint(3, (400,))
    model, loss = nets.mlp(4, 6, 3).double().eval(), nn.CrossEntropyLoss()
    sums = []
    for budget in (2**28, 10_000):
        problem = inf.Problem.build(model, loss, Refilled(x, y), memory_budget=budget)
        layers = cover(problem, problem.parameters).layers
        assert problem.cached is (budget == 2**28)
        assert samples_at_once(problem, layers=layers) > 10
        passed = layer_batches(problem, layers, true_gradients(problem), 1)
        sums.append(sum(batches[layers[0]].inputs.square().sum() for batches, _ in passed))
    assert_close(torch.as_tensor(sums[1]), torch.as_tensor(sums[0]), 1e-12)


def test_patches_of_convolutions_leave_room_for_fewer_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    data = [(torch.randn(64, 2, 4, 4, dtype=torch.float64), torch.randint(3, (64,)))]
    problem = replace(inf.Problem.build(net, nn.CrossEntropyLoss(), data), memory_budget=100_000)
    convolution, linear = cover(problem, problem.parameters).layers
    assert samples_at_once(problem, layers=[convolution, linear]) == problem.max_batch
    assert samples_at_once(problem, layers=[linear]) > 2 * problem.max_batch
