"""The executor ``dask`` against one process and against itself, and lazy scores against pydvl's.

Workers are processes of this machine with one thread each. What is timed starts when the cluster stands and the
worker processes have imported everything.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask.array as da
import problems
import torch
from common import HEADER, relative_error, row
from distributed import Client, LocalCluster
from influence_framework_dask import DaskInfluenceCalculator
from pydvl.influence.torch import DirectInfluence
from pydvl.influence.torch.util import TorchNumpyConverter
from timing import Spread, paired, seconds
from torch import Tensor

import influence_framework as inf

LONG = 60_000
"""Training points of the job that is long enough, their pixels drawn between 0 and 1."""

LAZY = (200, 20_000)
"""Test and training points of the lazy scores, drawn likewise."""

CHUNKS = (100, 2_000)
"""Test and training points of a chunk of the lazy scores."""


def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Points with random features and classes."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 64, generator=generator), torch.randint(10, (count,), generator=generator)


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local) as client,
    ):
        client.wait_for_workers(workers)
        yield client


def scaling(data: problems.Digits, runs: int) -> Iterator[str]:
    """One process, one worker, two workers, on one job."""
    net = problems.trained(data, [64, 128, 64, 10])
    model = inf.compose(net, problems.LOSS, solver="ekfac", hessian_regularization=1e-2).fit(data.loader(500))
    x, y = drawn(LONG)
    train = list(zip(x.split(1024), y.split(1024), strict=True))
    output = {"name": "mean", "normalize": "theta_relatif"}

    def job(executor: str) -> float:
        return seconds(
            lambda: inf.attribute(model, [(data.x_test, data.y_test)], train, output=output, executor=executor)
        )

    found: dict[str, list[float]] = {"sequential": [], "1 worker": [], "2 workers": []}
    for _ in range(runs):
        found["sequential"].append(job("sequential"))
        for workers in (1, 2):
            with cluster(workers):
                inf.attribute(model, None, train[:8], output="self_influence", executor="dask")
                found[f"{workers} worker{'s' * (workers > 1)}"].append(job("dask"))
    yield f"`attribute`, θ-RelatIF mean of {LONG:,} training over {len(data.y_test)} test points, `ekfac`:"
    yield ""
    yield "| | s |\n|---|---|"
    for what, times in found.items():
        yield f"| {what} | {Spread(tuple(times)):.1f} |"
    alone, one, two = found.values()
    overhead = Spread(tuple(100 * (b / a - 1) for a, b in zip(alone, one, strict=True)))
    ratio = Spread(tuple(a / b for a, b in zip(one, two, strict=True)))
    yield ""
    yield f"Overhead of one worker: **{overhead:.0f} %**. One worker / two workers: **{ratio:.2f}**."


def lazily(data: problems.Digits, runs: int) -> Iterator[str]:
    """Scores of arrays, from fitted models, on two workers."""
    net = problems.trained(data, [64, 16, 16, 10])
    strength = 2.0 * abs(problems.Judge(net, data).most_negative_eigenvalue())
    ours = inf.compose(
        net, problems.LOSS, solver="direct", source="hessian", hessian_regularization=strength
    ).fit(data.loader(500))
    theirs = DirectInfluence(net, problems.LOSS, regularization=strength).fit(data.loader(500))
    test, train = CHUNKS
    queries, points = (drawn(count) for count in LAZY)
    arrays = [
        da.from_array(part.numpy(), chunks=(size, *part.shape[1:]))
        for side, size in ((queries, test), (points, train))
        for part in side
    ]
    yield f"Scores of {LAZY[0]} × {LAZY[1]:,} points, in chunks of {test} × {train}, two workers:"
    yield ""
    yield HEADER.format(peer="pydvl")
    with cluster(2) as client:
        from pydvl.influence import DaskInfluenceCalculator as Peer

        mine = DaskInfluenceCalculator(ours, client)
        peer = Peer(theirs, TorchNumpyConverter(device=torch.device("cpu")), client)
        # pydvl's other parameters are its defaults; the mode Up is its default too.
        of: dict[str, Any] = {"ours": mine, "pydvl": peer}
        scores = {name: torch.as_tensor(one.influences(*arrays).compute()) for name, one in of.items()}
        expected: Tensor = ours.influences(*queries, *points)
        pairing = paired(
            lambda: mine.influences(*arrays).compute(), lambda: peer.influences(*arrays).compute(), runs
        )
    notes = [f"scores off by {relative_error(scores[name], expected):.0e}" for name in of]
    yield row("`direct`, 1,482 parameters", pairing, *notes)
    pairs = LAZY[0] * LAZY[1]
    each = [statistics.median(side.values) / pairs * 1e9 for side in (pairing.ours, pairing.peer)]
    yield ""
    yield f"Time per score: {each[0]:.0f} ns and {each[1]:.0f} ns."


def report(runs: int) -> Iterator[str]:
    warnings.simplefilter("ignore")
    data = problems.digits()
    yield from lazily(data, runs)
    yield ""
    yield from scaling(data, min(runs, 3))
