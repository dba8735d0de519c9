"""Where work is done: here, or by several processes alike. Registered through the same hook as anyone's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from influence_framework.devices import to_device
from influence_framework.errors import InvalidInputError
from influence_framework.hookspecs import Register, hookimpl
from influence_framework.processes import Processes
from influence_framework.protocols import Result, Unit


@dataclass(frozen=True)
class SequentialExecutor:
    """One unit after the other, in this process."""

    def run(self, job: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Every unit with its result, in order."""
        for unit in units:
            yield unit, job(unit)

    def processes(self) -> None:
        """The training data is not divided."""


@dataclass(frozen=True)
class TorchDistributedExecutor:
    """The processes of ``torch.distributed``, all of which run the same program: under ``torchrun``, say.

    In a fit each has its share of the training data, and sums over the data are summed over the processes.
    Units are dealt out one by one, and each process gets all results. What takes products with the curvature
    of data that is divided is done by all processes together.

    Attributes:
        group: The process group; the default one where left out.
        divided: Whether the training data that each process gives to ``fit`` is its own share already, as with
            a ``DistributedSampler``; without it each gives all of the data.
    """

    group: Any = None
    divided: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.divided, bool):
            raise InvalidInputError(f"divided must be true or false, got {self.divided!r}.")

    @property
    def workers(self) -> int:
        """The number of processes."""
        return self.processes().count

    def processes(self) -> Processes:
        """The processes of the group.

        Raises:
            InvalidInputError: No group has been made.
        """
        return Processes(self.group, self.divided)

    def run(self, job: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Every unit with its result, in order, in every process."""
        if not getattr(job, "alone", False):
            yield from SequentialExecutor().run(job, units)
            return
        processes, rest = self.processes(), iter(units)
        while True:
            # Where a job or the reading fails in one process, the others must not wait for it.
            with processes.together():
                dealt = list(islice(rest, processes.count))
                own = [job(unit) for unit in dealt[processes.rank : processes.rank + 1]]
                place = f"blocks from {getattr(next(iter(dealt), None), 'start', 0)} on, {len(dealt)} of them"
                results = processes.gather(to_device(own, torch.device("cpu")), place)
            if not dealt:
                return
            yield from zip(dealt, (result for of_one in results for result in of_one), strict=True)


@hookimpl
def register_executors(register: Register) -> None:
    """Announce core's own executors."""
    register("sequential", SequentialExecutor)
    register("torch_distributed", TorchDistributedExecutor)
