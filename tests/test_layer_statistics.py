"""How many samples are brought into matrix form together, and that a pass keeps to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import influence_framework as inf
from influence_framework.derivatives import CACHE_BYTES
from influence_framework.layers import cover, layer_batches, samples_at_once, true_gradients
from tests import cases
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
