"""Peak memory of the solver ``ekfac``, and how its time grows with the data and the width."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import problems
import torch
from ekfac import WIDTHS, Setting, dense
from matplotlib.figure import Figure
from timing import Spread, seconds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "ekfac_scaling.png"


def tiled(data: problems.Digits, train: int, test: int) -> problems.Digits:
    """As many points as asked for, repeating those that there are."""
    index, at = torch.arange(train) % len(data.x), torch.arange(test) % len(data.x_test)
    return problems.Digits(data.x[index], data.y[index], data.x_test[at], data.y_test[at])


def peak(setting: Setting, train: int) -> float:
    """MB that a process of its own takes at most above what it holds with model and data.

    Its allocator returns what is freed at once: what it would else keep for later use grows with the data,
    though nothing that is in use does.
    """
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save((setting.net.state_dict(), setting.strength), file.name)
        command = [sys.executable, __file__, file.name, str(train), str(torch.get_num_threads())]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout)


def copies(setting: Setting, train: int) -> float:
    """MB of the copy of the data that a fit keeps, and of the scores."""
    data = tiled(setting.data, train, 50)
    return (data.x.nbytes + data.y.nbytes + 4 * train * len(data.x_test)) / 1e6


def measure_peak(file: str, train: str, threads: str) -> float:
    """What :func:`peak` runs."""
    torch.set_num_threads(int(threads))
    weights, strength = torch.load(file)
    net = problems.dense(WIDTHS)
    net.load_state_dict(weights)
    data = tiled(problems.digits(), int(train), 50)
    # What is loaded at first use, be it of the framework or of torch, is no memory of the method.
    Setting("", problems.dense([64, 8, 10]).eval(), tiled(data, 20, 5), strength).ours(10)
    before = memory("VmRSS")
    Setting("", net.eval(), data, strength).ours(500)
    return memory("VmHWM") - before


def memory(which: str) -> float:
    """MB that this process holds (``VmRSS``) or held at most (``VmHWM``); Linux alone tells.

    ``getrusage`` would do elsewhere, but counts what the parent held when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith(f"{which}:")]
    return int(kilobytes) * 1024 / 1e6


@register_flop_formula(torch.ops.aten._linalg_eigh)
def _eigh_flops(shape: Sequence[int], *_args: Any, **_kwargs: Any) -> int:
    """About 9 n³ with eigenvectors; Golub and Van Loan, "Matrix Computations", §8.3."""
    *batch, size, _ = shape
    return 9 * size**3 * prod(batch)


class Counter(TorchDispatchMode):
    """Adds up the flops of matrix products and eigendecompositions.

    ``FlopCounterMode`` also hooks modules to tell them apart, and some derivatives cannot be taken with these
    hooks in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        self.total += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=found)
        return found


def flops(work: Callable[[], object]) -> int:
    """Of matrix products and eigendecompositions."""
    with Counter() as counter:
        work()
    return counter.total


def draw_scaling(data: problems.Digits, strength: float, runs: int) -> None:
    """Seconds and flops against the number of training points, of test points, and the width."""

    def setting(train: int = 1500, test: int = 50, width: int = 512) -> Setting:
        net = problems.seeded(lambda: problems.dense([64, 2 * width, width, 10]))
        return Setting("", net.eval(), tiled(data, train, test), strength)

    axes: dict[str, tuple[Sequence[int], Callable[[int], Setting]]] = {
        "training points": ((375, 750, 1500, 3000, 6000, 12000), lambda n: setting(train=n)),
        "test points": ((12, 50, 200, 800), lambda n: setting(test=n)),
        "width w of 64-2w-w-10": ((64, 128, 256, 512, 1024), lambda n: setting(width=n)),
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for panel, (label, (values, make)) in zip(figure.subplots(1, 3), axes.items(), strict=True):
        works = [partial(make(value).ours, 500, "gauss_newton") for value in values]
        amounts = [flops(work) / 1e9 for work in works]
        times = [Spread(tuple(seconds(work) for _ in range(runs))).median for work in works]
        panel.loglog(values, times, "o-", label="seconds")
        panel.loglog(values, amounts, "s--", label="Gflop")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle("ekfac: fit and all scores, beside 1,500 training points, 50 test points and w = 512")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def report(runs: int) -> Iterator[str]:
    data = problems.digits()
    setting = dense(data)
    yield from (
        "## Peak memory above model and data",
        "",
        "`ekfac`, fit + all pairwise scores, net 64-1024-512-10, batch 500, in a process of its own.",
        "",
        "| training points | MB | of which a copy of the data, and the scores |",
        "|---|---|---|",
    )
    for train in (1500, 6000, 24000, 96000):
        yield f"| {train:,} | {peak(setting, train):.0f} | {copies(setting, train):.0f} |"
    draw_scaling(data, setting.strength, runs)
    yield from ("", "## Time", "", f"![Seconds and flops](../../docs/images/{PICTURE.name})")


if __name__ == "__main__":
    print(measure_peak(*sys.argv[1:]))
