"""Peak memory of scores, of small images and of many training points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 500 * 2**20
"""Twice the default budget for caches and intermediate results, and about the allocator's own."""

SCRIPT = """
import sys

import torch
from torch import nn

import influence_framework as inf
from tests.peak import peak

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


def measured(script: str, *arguments: str) -> list[int]:
    """The numbers that a process of its own prints, whose allocator returns what is freed at once."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert result.returncode == 0, result.stderr
    return [int(number) for number in result.stdout.split()]


@pytest.mark.parametrize(("mode", "shape"), [("up", [20, 20]), ("perturbation", [20, 20, 3, 32, 32])])
def test_pitfall_scores_of_small_images_fit_in_memory(mode: str, shape: list[int]) -> None:
    *found, grown = measured(SCRIPT, mode)
    assert found == shape
    assert grown < LIMIT, f"{grown / 2**20:.0f} MiB above the baseline"


MANY = """
import torch
from torch import nn

import influence_framework as inf
from tests.peak import peak

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).eval()
x, y = torch.randn(300_000, 64), torch.randint(10, (300_000,))


def scores(count: int) -> torch.Tensor:
    data = list(zip(x[:count].split(500), y[:count].split(500)))
    solver = {"name": "ekfac", "memory_budget": 2**20}
    model = inf.compose(
        net, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=0.1, memory_budget=2**27
    )
    return model.fit(data).influences(x[:50], y[:50], x[:count], y[:count])


scores(20_000)
baseline = peak()
result = scores(len(x))
held = x.nbytes + y.nbytes + result.nbytes
print(peak() - baseline - held)
"""


def test_memory_beside_a_copy_of_the_data_and_the_results_does_not_grow_with_the_data() -> None:
    """Neither is held twice, and no mask of the data is formed."""
    (beside,) = measured(MANY)
    assert beside < 32 * 2**20, f"{beside / 2**20:.0f} MiB beside the data and the results"


STREAMED = """
import sys
from dataclasses import dataclass

import torch
from torch import nn

import influence_framework as inf
from tests.peak import peak

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).eval()


@dataclass
class Synthesised:
    count: int
    size: int = 500

    def __iter__(self):
        for start in range(0, self.count, 500):
            x = torch.randn(500, 64, generator=torch.Generator().manual_seed(start))
            yield x[: self.size], (x[: self.size, 0] > 0).long()


loss, folder = nn.CrossEntropyLoss(), sys.argv[1]
model = inf.compose(net, loss, solver="ekfac", hessian_regularization=0.1, memory_budget=2**24)
model.fit(Synthesised(2_000))
outputs = ({"name": "top_k", "normalize": "l_relatif"}, "self_influence", "matrix")


def scores(count):
    for output in outputs:
        test = None if output == "self_influence" else Synthesised(500, 100)
        store = f"{folder}/{count}" if output == "matrix" else None
        inf.attribute(model, test, Synthesised(count), output=output, store=store)


scores(5_000)
baseline = peak()
scores(40_000)
print(peak() - baseline)
"""


def test_memory_of_scores_between_loaders_does_not_grow_with_the_number_of_points(tmp_path: Path) -> None:
    """But for an identifier of each and a line of the report; all scores would be 16 MB, all samples 10 MB."""
    (grown,) = measured(STREAMED, str(tmp_path))
    assert grown < 6 * 2**20, f"{grown / 2**20:.0f} MiB more for 40,000 points than for 5,000"
