"""Scores of more pairs than memory holds, under a ceiling, to a store; and seconds a score against pydvl.

The points are digits with noise from a seed. The first part runs in a process of its own, whose addresses are
limited by ``resource.setrlimit(RLIMIT_AS)``: an allocation beyond it fails there.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import HEADER, relative_error, row
from growth import memory
from problems import LOSS, Digits, digits, trained
from pseudo_gradients import PydvlFisher
from pydvl.influence import SequentialInfluenceCalculator
from pydvl.influence.torch import DirectInfluence, EkfacInfluence
from pydvl.influence.torch.util import NestedTorchCatAggregator
from timing import paired
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf

TRAIN, TEST = 200_000, 2_000
CEILING = 2 * 10**9
LARGE, MIDDLE, SMALL = [64, 1024, 512, 10], [64, 128, 64, 10], [64, 24, 10]
STRENGTH = 1e-2
SAMPLED = 100, 1_000
"""Test and training points whose scores are looked up in the store and worked out in memory."""


def synthesised(data: Digits, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits drawn with replacement, with noise on every pixel."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data.x), (count,), generator=generator)
    return data.x[index] + 0.1 * torch.randn(count, data.x.shape[1], generator=generator), data.y[index]


def loader(points: tuple[Tensor, Tensor], batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*points), batch_size=batch_size)


def under_the_ceiling(folder: str, threads: str, train: str, test: str) -> dict[str, Any]:
    """The first part: fit, all scores to a store, and some of them once more in memory."""
    resource.setrlimit(resource.RLIMIT_AS, (CEILING, CEILING))
    torch.set_num_threads(int(threads))
    data = digits()
    net = trained(data, LARGE, steps=50)
    points, held_out = synthesised(data, int(train), 1), synthesised(data, int(test), 2)
    # The ceiling holds: otherwise it would show nothing.
    try:
        torch.ones(CEILING, dtype=torch.uint8)
        raise SystemExit("The ceiling does not hold.")
    except RuntimeError:
        pass
    started = time.perf_counter()
    model = inf.compose(net, LOSS, solver="ekfac", hessian_regularization=STRENGTH)
    model.fit(loader(points, 1_000))
    fitted = time.perf_counter()
    scored = inf.attribute(
        model, loader(held_out, 500), loader(points, 1_000), store=Path(folder) / "scores", progress=True
    )
    done = time.perf_counter()
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(int(test), generator=generator)[: SAMPLED[0]].sort().values
    columns = torch.randperm(int(train), generator=generator)[: SAMPLED[1]].sort().values
    stored = torch.from_numpy(scored.array.get_orthogonal_selection((rows.numpy(), columns.numpy())))
    in_memory = model.influences(*(part[rows] for part in held_out), *(part[columns] for part in points))
    own = [
        model.self_influences(*(part[index] for part in side)).sqrt()
        for side, index in ((held_out, rows), (points, columns))
    ]
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "shape": list(scored.array.shape),
        "fit": fitted - started,
        "scores": done - fitted,
        "resident": memory("VmHWM"),
        "address": memory("VmPeak"),
        "store": size / 1e6,
        "apart": float(((stored - in_memory).abs() / torch.outer(*own)).max()),
        "equal": int((stored == in_memory).sum()) / stored.numel(),
    }


def ceiling(train: int = TRAIN, test: int = TEST) -> Iterator[str]:
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, str(threads), str(train), str(test)]
        # Every thread of the allocator reserves addresses that it does not use.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["shape"] != [test, train] or not found["apart"] < 1e-4:
        raise SystemExit(f"The scores in the store are not those in memory: {found}")
    pairs = train * test
    net = "-".join(map(str, LARGE))
    yield f"`ekfac` on the digits net {net}, λ = {STRENGTH:g}, RLIMIT_AS {CEILING / 1e9:g} GB:"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| training points × test points | {train:,} × {test:,} |"
    yield f"| fit | {found['fit']:.0f} s |"
    rate = pairs / found["scores"] / 1e6
    yield f"| scores, to the store | {found['scores']:.0f} s, {rate:.2f} million a second |"
    yield f"| most memory resident | {found['resident']:.0f} MB |"
    yield f"| most addresses in use | {found['address']:.0f} MB |"
    yield f"| store on disk | {found['store']:.0f} MB |"
    yield (
        f"| {SAMPLED[0] * SAMPLED[1]:,} sampled entries against memory | {found['equal']:.1%} equal to "
        f"the last bit; at most {found['apart']:.0e} apart, relative to √(self-influence · self-influence) |"
    )


class Job:
    """The same scores by both, from loaders, of a model that is fitted already."""

    def __init__(self, widths: list[int], train: int, test: int, ours: Any, theirs: Any) -> None:
        data = digits()
        self.net: nn.Sequential = trained(data, widths, steps=50)
        self.train, self.test = synthesised(data, train, 1), synthesised(data, test, 2)
        fit = loader((data.x, data.y), 500)
        self.mine = inf.compose(self.net, LOSS, hessian_regularization=STRENGTH, **ours).fit(fit)
        self.fitted_peer = theirs(self.net).fit(fit)
        self.peer = SequentialInfluenceCalculator(self.fitted_peer)

    def ours(self) -> Tensor:
        scored = inf.attribute(self.mine, loader(self.test, 500), loader(self.train, 1_000))
        return torch.from_numpy(scored.array)

    def theirs(self, batch_size: int) -> Tensor:
        lazily = self.peer.influences(loader(self.test, batch_size), loader(self.train, batch_size))
        scores: Tensor = lazily.compute(aggregator=NestedTorchCatAggregator())
        return scores

    def row(self, what: str, runs: int, batch_sizes: tuple[int, ...]) -> str:
        def once(size: int) -> float:
            start = time.perf_counter()
            self.theirs(size)
            return time.perf_counter() - start

        best = min(batch_sizes, key=once)
        apart = relative_error(self.theirs(best), self.ours())
        if not apart < 1e-3:
            raise SystemExit(f"{what}: the two do not compute the same, {apart:.1e} apart")
        pairing = paired(self.ours, partial(self.theirs, best), runs)
        pairs = len(self.train[0]) * len(self.test[0])
        return row(
            what,
            pairing,
            f"{pairing.ours.median / pairs * 1e9:.0f} ns a score",
            f"{pairing.peer.median / pairs * 1e9:.0f} ns a score, batches of {best}, scores {apart:.0e} apart",
        )


def exact() -> tuple[str, Job]:
    """``direct`` with the Hessian of a small net: the two compute the same."""
    job = Job(
        SMALL,
        4_000,
        200,
        {"solver": "direct", "source": "hessian"},
        partial(DirectInfluence, loss=LOSS, regularization=STRENGTH),
    )
    return "`direct`, 200 × 4,000, net 64-24-10", job


def kronecker() -> tuple[str, Job]:
    """``ekfac``, with pydvl's pseudo-gradients on both sides: the two compute the same."""
    job = Job(
        MIDDLE,
        1_000,
        100,
        {"solver": "ekfac", "source": PydvlFisher()},
        partial(EkfacInfluence, update_diagonal=True, hessian_regularization=STRENGTH),
    )
    return "`ekfac`, 100 × 1,000, net 64-128-64-10", job


def against_pydvl(runs: int) -> Iterator[str]:
    """``SequentialInfluenceCalculator`` on jobs that it can do, at its best batch size."""
    yield ""
    yield "Scores alone, of models fitted to 1,500 digits, from loader to matrix in memory:"
    yield ""
    yield HEADER.format(peer="SequentialInfluenceCalculator")
    for make, batch_sizes in ((exact, (200, 1_000)), (kronecker, (25, 100))):
        what, job = make()
        yield job.row(what, runs, batch_sizes)


def report(runs: int) -> Iterator[str]:
    yield from ceiling()
    yield from against_pydvl(runs)


if __name__ == "__main__":
    print(json.dumps(under_the_ceiling(*sys.argv[1:])))
