"""Peak memory of scores for images: mixed derivatives for all pairs at once would take gigabytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 500 * 2**20
"""Twice the default budget for caches and intermediate results, and about the allocator's own."""

SCRIPT = """
import resource
import sys

import torch
from torch import nn

import influence_framework as inf


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
    nn.Flatten(), nn.Linear(2048, 46), nn.Tanh(), nn.Linear(46, 10),
).eval()
size = sum(p.numel() for p in net.parameters())
assert 95_000 < size < 105_000, size
x, y = torch.randn(40, 3, 32, 32), torch.randint(10, (40,))
loss = nn.CrossEntropyLoss()
torch.autograd.grad(loss(net(x), y), list(net.parameters()))
baseline = peak()
# A handful of iterations: memory does not depend on their number.
solver = {"name": "cg", "rtol": 1e-2, "maxiter": 2, "warn_on_max_iteration": False}
model = inf.compose(net, loss, solver=solver, hessian_regularization=0.1)
scores = model.fit([(x[20:], y[20:])]).influences(x[:20], y[:20], x[20:], y[20:], mode=sys.argv[1])
assert torch.isfinite(scores).all()
print(*scores.shape, peak() - baseline)
"""


@pytest.mark.parametrize(("mode", "shape"), [("up", [20, 20]), ("perturbation", [20, 20, 3, 32, 32])])
def test_pitfall_scores_of_small_images_fit_in_memory(mode: str, shape: list[int]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    *found, grown = map(int, result.stdout.split())
    assert found == shape
    assert grown < LIMIT, f"{grown / 2**20:.0f} MiB above the baseline"
