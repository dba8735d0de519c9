"""Passes that differentiate once take the attention kernel of training, which has no second derivative."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import influence_framework as inf
from tests.reference import assert_close

FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
CLASSES = 10


class Attention(nn.Module):
    """One head of self-attention, averaged over the sequence, for ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)[:, None].chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.head(attended[:, 0].mean(1))
        return result


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def scores(solver: Any, source: str) -> Tensor:
    torch.manual_seed(0)
    model = inf.compose(
        Attention().double().eval(),
        nn.CrossEntropyLoss(),
        solver=solver,
        source=source,
        hessian_regularization=0.1,
        preflight=False,
    )
    result: Tensor = model.fit([points(7, 0), points(4, 1)]).influences(*points(3, 2), *points(5, 3))
    return result


# Exact rows are pulled back ten at a time, by one backward pass for all.
@pytest.mark.parametrize("samples", ["exact", 1])
def test_kronecker_factors_use_the_kernel_of_training(samples: Any) -> None:
    solver = {"name": "ekfac", "samples": samples}
    with Calls() as calls:
        fused = scores(solver, "gauss_newton")
    assert calls.counts[FORWARD] > 0
    assert calls.counts[BACKWARD] > 0
    with sdpa_kernel(SDPBackend.MATH), Calls() as plain:
        expected = scores(solver, "gauss_newton")
    assert plain.counts[FORWARD] == 0
    assert_close(fused, expected, 1e-10)
