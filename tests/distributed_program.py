"""What each process of ``tests/test_distributed.py`` does, and what one process does by itself.

``torchrun --nproc-per-node 2 -m tests.distributed_program FOLDER`` writes what each has found to FOLDER.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import influence_framework as inf
from influence_framework.attribution import TorchDistributedExecutor, run
from influence_framework.attribution.queries import FactorScores, LayerScores
from influence_framework.cli.main import main as command
from influence_framework.processes import Processes
from influence_framework.testing import executor_report
from tests import nets

Points = tuple[Tensor, Tensor]
Results = dict[str, Any]
MANY = "torch_distributed"


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, TEST = points(61, 1), points(7, 2)


def batches(data: Points, size: int) -> list[Points]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nets.mlp(4, 5, 3).double().eval()


def composed(solver: Any = "cg", module: nn.Module | None = None, **options: Any) -> Any:
    options = {"hessian_regularization": 1e-2, "preflight": False, **options}
    if solver == "cg":
        solver = {"name": "cg", "rtol": 1e-12, "atol": 0.0}
    return inf.compose(module or net(), nn.CrossEntropyLoss(), solver=solver, **options)


@dataclass(frozen=True)
class Counted:
    """Counts how many samples were scored in this process."""

    samples: list[int]

    def of(self, kind: Any) -> Any:
        original = kind.__call__

        def call(job: Any, block: Any) -> Any:
            self.samples.append(len(block))
            return original(job, block)

        return mock.patch.object(kind, "__call__", call)


def streamed() -> Any:
    """Within it, no data is held in memory."""
    return mock.patch("influence_framework.problem.nbytes", return_value=2**40)


def scored(executor: str, solver: Any, *, stream: bool = False, **options: Any) -> Results:
    """All kinds of scores of one composition."""
    with streamed() if stream else nullcontext():
        model = composed(solver, **options).fit(batches(TRAIN, 17), executor=executor)
    assert model.fitted.problem.cached is not stream
    found = {"influences": model.influences(*TEST, *TRAIN).cpu().numpy()}
    counted = Counted([])
    with counted.of(FactorScores), counted.of(LayerScores), mock.patch.object(run, "LARGEST", 16):
        settings = {"test": batches(TEST, 4), "train": batches(TRAIN, 17), "executor": executor}
        found["matrix"] = inf.attribute(model, **settings).array
    found["compressed"] = inf.attribute(model, **settings, query_rank=100).array
    top = inf.attribute(model, **settings, output={"name": "top_k", "k": 3, "normalize": "l_relatif"})
    found["top_k"], found["which"] = top.columns["score"], top.columns["position"]
    own = inf.attribute(model, None, batches(TRAIN, 17), output="self_influence", executor=executor)
    found["self"] = own.columns["score"]
    found["read"] = sum(size for _, size in model.fitted.problem.batches())
    found["scored"] = sum(counted.samples)
    return found


SOLVERS: dict[str, Callable[[str], Results]] = {
    "cg": lambda executor: scored(executor, "cg"),
    "direct": lambda executor: scored(executor, "direct", preflight=True),
    "direct, relative λ by layer": lambda executor: scored(
        executor,
        "direct",
        source="hessian",
        blocks="per_layer",
        stream=True,
        hessian_regularization=inf.RelativeRegularization(20.0),
    ),
    "ekfac": lambda executor: scored(executor, {"name": "ekfac", "samples": "exact"}),
    "ekfac of true labels": lambda executor: scored(executor, "ekfac", source="empirical_fisher", stream=True),
    "nystroem": lambda executor: scored(executor, {"name": "nystroem", "rank": 30}),
    "jacobi": lambda executor: scored(executor, "jacobi"),
}
RANDOM: dict[str, Callable[[str], np.ndarray]] = {
    "lissa": lambda executor: drawn(executor, {"name": "lissa", "rtol": 1e-2}),
    "ekfac of drawn labels": lambda executor: drawn(executor, "ekfac"),
}


class Scarce(nn.Module):
    """Has room for three samples at a time, in the second of several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        if distributed.is_initialized() and rank() == 1 and len(x) > 3:
            raise MemoryError
        logits: Tensor = self.inner(x)
        return logits


def scarce(executor: str) -> np.ndarray:
    """Scores where memory runs out in one process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inf.SmallerBatchWarning)
        model = composed(module=Scarce().double().eval()).fit(batches(TRAIN, 17), executor=executor)
        scores: np.ndarray = model.influences(*TEST, *TRAIN).numpy()
    return scores


def drawn(executor: str, solver: Any) -> np.ndarray:
    """Scores by a method that draws."""
    model = composed(solver, hessian_regularization=0.3).fit(batches(TRAIN, 17), executor=executor)
    scores: np.ndarray = model.influences(*TEST, *TRAIN).numpy()
    return scores


class Nth:
    """Batches whose ``n``-th pass ends with an error, in the second process."""

    def __init__(self, data: Points, at: int) -> None:
        self.data, self.at, self.passes = data, at, 0

    def __iter__(self) -> Iterator[Points]:
        self.passes += 1
        yield from batches(self.data, 17)
        if self.passes == self.at and rank() == 1:
            raise OSError("the disk is gone")


def rank() -> int:
    return distributed.get_rank()


def with_nan(at: int) -> Points:
    x = TRAIN[0].clone()
    x[at] = float("nan")
    return x, TRAIN[1]


def reordered(data: Points) -> Points:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(rank()))
    return data[0][order], data[1][order]


@dataclass(frozen=True)
class Failing:
    """A job that fails for the unit that comes to the second process."""

    alone = True

    def __call__(self, unit: int) -> int:
        if unit == 3:
            raise OSError("the disk is gone")
        return unit


def sampled(count: int) -> DataLoader[Any]:
    data = TensorDataset(TRAIN[0][:count], TRAIN[1][:count])
    return DataLoader(data, batch_size=9, sampler=DistributedSampler(data, shuffle=False))


def disturbed(data: Nth) -> None:
    with streamed():
        fit(data).influences(*TEST)


def other_net() -> nn.Module:
    module = net()
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-3 * rank()  # type: ignore[index,operator,union-attr]
    return module


def refused_store(folder: Path) -> None:
    path = folder / "thesis"
    path.mkdir(exist_ok=True)
    (path / "thesis.txt").write_text("all of it")
    model = composed("direct").fit(batches(TRAIN, 17), executor=MANY)
    inf.attribute(model, batches(TEST, 4), batches(TRAIN, 17), executor=MANY, store=path)


def stored(folder: Path) -> Results:
    model = composed("direct", memory_budget=8000).fit(batches(TRAIN, 17), executor=MANY)
    settings = {"test": batches(TEST, 4), "train": batches(TRAIN, 17), "executor": MANY}
    plain = inf.attribute(model, **settings).array
    first = inf.attribute(model, **settings, store=folder / "matrix").array[:]
    again = inf.attribute(model, **settings, store=folder / "matrix").array[:]
    table = inf.attribute(model, **settings, output="top_k", store=folder / "top").columns["score"]
    resumed = inf.attribute(model, **settings, output="top_k", store=folder / "top").columns["score"]
    lost = [
        inf.attribute(model, **settings, output="mean", query_rank=1, store=folder / "low").query_error
        for _ in range(2)
    ]
    stores = {"plain": plain, "first": first, "again": again, "table": table, "resumed": resumed}
    return stores | {"lost": lost[0], "lost again": lost[1]}


SAVED = ("cg", "direct", "ekfac")


def saved(folder: Path) -> Results:
    """All processes save to one folder, more than once; the scores of what they save."""
    found = {}
    for solver in SAVED:
        model = composed(solver).fit(batches(TRAIN, 17), executor=MANY)
        for _ in range(3):
            model.save(folder / "saved" / solver)
        found[solver] = model.influences(*TEST, *TRAIN).numpy()
    return found


def refused_folder(folder: Path) -> None:
    path = folder / "letters"
    path.mkdir(exist_ok=True)
    (path / "letter.txt").write_text("Dear all")
    fit(batches(TRAIN, 17)).save(path)


PROJECT = """
from torch import nn
from tests.distributed_program import TEST, TRAIN, batches, net

train, test = batches(TRAIN, 17), batches(TEST, 4)
"""
CONFIG = """
model = "project_of_processes:net"
loss = "torch.nn:CrossEntropyLoss"
train = "project_of_processes:train"
test = "project_of_processes:test"
store = "{store}"
solver = "direct"
hessian_regularization = 1e-2
preflight = false
executor = "torch_distributed"
"""


def commanded(folder: Path) -> Results:
    """``influence run``, in a folder for each process with a store for all."""
    own = folder / f"project-{rank()}"
    own.mkdir()
    (own / "project_of_processes.py").write_text(PROJECT)
    (own / "config.toml").write_text(CONFIG.format(store=folder / "by-command"))
    said, warned = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(warned):
        status = command(["run", str(own / "config.toml")])
    return {"status": status, "out": said.getvalue(), "err": warned.getvalue()}


def lost() -> None:
    """The second process ends without a word. This comes last."""
    model = composed().fit(batches(TRAIN, 17), executor=MANY)
    if rank() == 1:
        os._exit(0)
    model.influences(*TEST)


def fit(data: Any, **options: Any) -> Any:
    return composed(**options).fit(data, executor=MANY)


def by_rank(*things: Any) -> Any:
    return things[rank()]


def cases(folder: Path) -> dict[str, Callable[[], Any]]:
    """What several processes do, in this order."""
    half = {"name": MANY, "divided": True}
    return {
        **{name: lambda case=case: case(MANY) for name, case in {**SOLVERS, **RANDOM}.items()},
        "scarce": lambda: scarce(MANY),
        "NaN in one share": lambda: fit(batches(with_nan(21), 17)),
        "an error in a later pass": lambda: disturbed(Nth(TRAIN, 3)),
        "an error in the first pass": lambda: fit(Nth(TRAIN, 1)),
        "another order": lambda: fit(batches(reordered(TRAIN), 17)),
        "another number": lambda: fit(batches(by_rank(TRAIN, points(60, 1)), 17)),
        "another model": lambda: fit(batches(TRAIN, 17), module=other_net()),
        "other points": lambda: fit(batches(TRAIN, 17)).influences(*by_rank(TEST, points(7, 3))),
        "more points": lambda: fit(batches(TRAIN, 17)).influences(*by_rank(TEST, points(8, 2))),
        "other points to score": lambda: inf.attribute(
            fit(batches(TRAIN, 17)), batches(TEST, 4), batches(by_rank(TRAIN, TEST), 17), executor=MANY
        ),
        "another call": lambda: by_rank(fit, inf.attribute)(
            *by_rank(
                (batches(TRAIN, 17),), (composed("direct").fit(batches(TRAIN, 17)), batches(TEST, 4), [TRAIN])
            ),
            **by_rank({}, {"executor": MANY}),
        ),
        "fewer samples than processes": lambda: fit(batches((TRAIN[0][:1], TRAIN[1][:1]), 17)),
        "a store that is refused": lambda: refused_store(folder),
        "samples repeated by the sampler": lambda: composed().fit(sampled(61), executor=half),
        "a share each": lambda: composed().fit(sampled(60), executor=half).influences(*TEST).numpy(),
        "a store": lambda: stored(folder),
        "the kit": lambda: str(executor_report(MANY)),
        "an error in one job": lambda: list(TorchDistributedExecutor().run(Failing(), iter(range(5)))),
        "saved": lambda: saved(folder),
        "a folder that is refused": lambda: refused_folder(folder),
        "the command": lambda: commanded(folder),
        "no all-reduce": lambda: unreduced(),
        "lost": lost,
    }


def unreduced() -> Tensor:
    with mock.patch.object(Processes, "_sum", lambda _, tensor: tensor):
        return fit(batches(TRAIN, 17), solver="direct").influences(*TEST, *TRAIN).numpy()


def tried(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except (inf.InfluenceError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for name, case in cases(folder).items():
        start = time.perf_counter()
        found[name] = tried(case)
        if rank() == 0:
            print(f"{name}: {time.perf_counter() - start:.2f} s", flush=True)
        (folder / f"{rank()}.pickle").write_bytes(pickle.dumps(found))
    # The other process is gone: nothing may wait for it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
