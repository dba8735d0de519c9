"""The executor ``dask`` against one process and against itself, and lazy scores against pydvl's.

Workers are processes of this machine with one thread each. What is timed starts when the cluster stands and the
worker processes have imported everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import dask.array as da
import problems
import torch
from common import HEADER, relative_error, row
from distributed import Client, LocalCluster
from influence_framework_dask import DaskInfluenceCalculator
from pydvl.influence.torch.util import TorchNumpyConverter
from scale import Job, exact, kronecker
from timing import Spread, paired, seconds
from torch import Tensor

import influence_framework as inf

LONG = 60_000
"""Training points of the job that is long enough, their pixels drawn between 0 and 1."""


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

    def job(executor: str, batches: int = len(train)) -> float:
        test, part = [(data.x_test, data.y_test)], train[:batches]
        return seconds(lambda: inf.attribute(model, test, part, output=output, executor=executor))

    found: dict[str, list[float]] = {"sequential": [], "1 worker": [], "2 workers": []}
    job("sequential", batches=4)
    for _ in range(runs):
        found["sequential"].append(job("sequential"))
        for workers in (1, 2):
            with cluster(workers):
                job("dask", batches=4 * workers)
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


def cut(points: tuple[Tensor, Tensor], size: int) -> list[da.Array]:
    """Inputs and targets in chunks."""
    return [da.from_array(part.numpy(), chunks=(size, *part.shape[1:])) for part in points]


def lazily(runs: int) -> Iterator[str]:
    """Scores of arrays, from models that are fitted already, on two workers, each side at its best chunks."""
    yield "Scores of arrays, two workers, the jobs of the part `scale`:"
    yield ""
    yield HEADER.format(peer="DaskInfluenceCalculator of pydvl")
    for what, job in (exact(), kronecker()):
        with cluster(2) as client:
            yield lazy_row(what, job, client, runs)


def lazy_row(what: str, job: Job, client: Client, runs: int) -> str:
    from pydvl.influence import DaskInfluenceCalculator as Peer

    # pydvl's other parameters are its defaults; the mode Up is its default too.
    sides: list[Any] = [
        DaskInfluenceCalculator(job.mine, client),
        Peer(job.fitted_peer, TorchNumpyConverter(device=torch.device("cpu")), client),
    ]

    def scores(side: Any, chunks: tuple[int, int]) -> Tensor:
        arrays = [*cut(job.test, chunks[0]), *cut(job.train, chunks[1])]
        return torch.as_tensor(side.influences(*arrays).compute())

    n_test, n_train = len(job.test[0]), len(job.train[0])
    candidates = [(n_test // a, n_train // b) for a in (1, 2) for b in (2, 4, 10)]
    best = []
    for side in sides:
        scores(side, candidates[0])
        taken = {chunks: seconds(partial(scores, side, chunks)) for chunks in candidates}
        best.append(min(taken, key=taken.__getitem__))
    expected = job.mine.influences(*job.test, *job.train)
    own, apart = (relative_error(scores(*of), expected) for of in zip(sides, best, strict=True))
    if not own < 1e-4 or not apart < 1e-3:
        raise SystemExit(f"{what}: scores are {own:.1e} and {apart:.1e} off")
    pairing = paired(partial(scores, sides[0], best[0]), partial(scores, sides[1], best[1]), runs)
    notes = [
        f"{side.median / (n_test * n_train) * 1e9:.0f} ns a score, chunks of {a} × {b:,}, "
        f"scores {error:.0e} apart"
        for side, (a, b), error in zip((pairing.ours, pairing.peer), best, (own, apart), strict=True)
    ]
    return row(what, pairing, *notes)


def report(runs: int) -> Iterator[str]:
    warnings.simplefilter("ignore")
    data = problems.digits()
    yield from lazily(runs)
    yield ""
    yield from scaling(data, min(runs, 3))
