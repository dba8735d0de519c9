"""Runs the methods of one library on one case, each in a process of its own, and writes scores and timings.

An adapter is a module ``peers/<library>.py`` with ``METHODS``: names and generators. A generator takes a
:class:`Task` and λ, fits, yields once, scores, and yields the scores ``(n_test, n_train)``; or, where the task
asks for self-influences, ``(n_train,)``; see :func:`fitted_once` for those that fit once for all λ. It runs in
the library's own environment and imports nothing of ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Task:
    """One case, as an adapter sees it.

    Attributes:
        folder: Where it lies.
        kind: ``"classification"`` or ``"regression"``.
        measure: ``"pairs"``, or ``"self"`` for self-influences of the training points.
        checkpoints: Parameters by name, of nets that differ in their seed.
        net: Description of the net.
        x: Training inputs, float32.
        y: Their targets.
        x_test: Test inputs.
        y_test: Their targets.
    """

    folder: Path
    kind: str
    measure: str
    checkpoints: list[dict[str, Tensor]]
    net: dict[str, Any]
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def read(cls, folder: Path) -> Task:
        described = json.loads((folder / "task.json").read_text())
        with np.load(folder / "data.npz") as arrays:
            data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        states = []
        for path in sorted(folder.glob("checkpoint*.npz")):
            with np.load(path) as arrays:
                states.append({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        return cls(folder, described["kind"], described["measure"], states, described["net"], **data)

    def model(self, checkpoint: int = 0) -> nn.Sequential:
        net = nets.build(self.net)
        net.load_state_dict(self.checkpoints[checkpoint])
        return net.eval()

    def loss(self, reduction: str = "mean") -> nn.Module:
        kind = nn.CrossEntropyLoss if self.kind == "classification" else nn.MSELoss
        return kind(reduction=reduction)

    @property
    def train(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    @property
    def test(self) -> TensorDataset:
        """Test points; the training points where self-influences are asked for."""
        return self.train if self.measure == "self" else TensorDataset(self.x_test, self.y_test)

    def loader(self, size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=size or len(self.x))

    def pairs(self, scores: Tensor) -> Tensor:
        """What the task asks for, of a matrix of all pairs."""
        return scores.diagonal() if self.measure == "self" else scores


Method = Callable[..., Iterator[Any]]


class Late(BaseException):
    """Time is up."""


def late(*_: Any) -> None:
    raise Late


def fitted_once(method: Method) -> Method:
    """Mark a method ``(task)`` whose fit serves every λ: it yields, is sent λ and yields scores, and so on."""
    method.fitted_once = True  # type: ignore[attr-defined]
    return method


def memory(key: str) -> float:
    """A size of this process in MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) / 1024
    raise KeyError(key)


def measured(method: Method, task: Task, strengths: list[float]) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Scores for each λ, with seconds to fit and to score, and the peak of memory."""
    once = hasattr(method, "fitted_once")
    steps: Any = None
    for strength in strengths:
        if steps is None or not once:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = memory("VmRSS")
            start = time.perf_counter()
            steps = method(task) if once else method(task, strength)
            next(steps)
            fit = time.perf_counter() - start
        start = time.perf_counter()
        scores = (steps.send(strength) if once else next(steps)).detach()
        score = time.perf_counter() - start
        if once:
            next(steps)
        expected = (len(task.x),) if task.measure == "self" else (len(task.x_test), len(task.x))
        if tuple(scores.shape) != expected:
            raise ValueError(f"scores of shape {tuple(scores.shape)}, expected {expected}")
        if not torch.isfinite(scores).all():
            raise ValueError("scores contain NaN or infinity")
        yield scores, {"fit": fit, "score": score, "memory": max(0.0, memory("VmHWM") - before)}


def run(method: Method, task: Task, strengths: list[float], target: str) -> None:
    """All λ of one method, after one run to warm up; an error of one λ leaves the others."""
    torch.manual_seed(0)
    scores, notes = {}, {}
    waiting = list(strengths)
    error = None
    try:
        with suppress(Exception):  # said again below
            next(measured(method, task, strengths[:1]))
        while waiting:
            try:
                for found, timing in measured(method, task, list(waiting)):
                    strength = waiting.pop(0)
                    scores[f"{strength:g}"] = found.numpy().astype(np.float32)
                    notes[f"{strength:g}"] = timing
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}".splitlines()[0][:300]
                waiting.pop(0)
    except Late:
        error = f"took too long for all λ; of {len(strengths)}, {len(notes)} were scored"
    np.savez(target + ".npz", **scores)
    Path(target + ".json").write_text(json.dumps({"by strength": notes, "error": error}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--strengths", nargs="+", type=float, required=True)
    parser.add_argument("--limit", type=float, required=True, help="seconds for all λ of one method")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    methods: dict[str, Method] = importlib.import_module(f"peers.{arguments.library}").METHODS
    for folder in arguments.folders:
        for name, method in methods.items():
            target = str(folder / "results" / f"{arguments.library}.{name}")
            (folder / "results").mkdir(exist_ok=True)
            if Path(target + ".json").exists():
                continue
            child = os.fork()
            if not child:
                try:
                    signal.signal(signal.SIGALRM, late)
                    signal.alarm(int(arguments.limit))
                    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                        run(method, Task.read(folder), arguments.strengths, target)
                except BaseException:
                    traceback.print_exc(file=sys.__stderr__)
                    os._exit(1)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status:
                reason = (
                    f"took more than {arguments.limit:g} s"
                    if status == -signal.SIGALRM
                    else f"ended with {status}"
                )
                np.savez(target + ".npz")
                Path(target + ".json").write_text(json.dumps({"by strength": {}, "error": reason}))


if __name__ == "__main__":
    main()
