"""Where work is done, when nothing else is asked for: here. Registered through the same hook as anyone's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from influence_framework.hookspecs import Register, hookimpl
from influence_framework.protocols import Result, Unit


@dataclass(frozen=True)
class SequentialExecutor:
    """One unit after the other, in this process."""

    def run(self, job: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Every unit with its result, in order."""
        for unit in units:
            yield unit, job(unit)


@hookimpl
def register_executors(register: Register) -> None:
    """Announce core's own executor."""
    register("sequential", SequentialExecutor)
