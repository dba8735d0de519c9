"""Executors that are correct, each in its own way, and the same with one fault each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from influence_framework.attribution.blocks import Block
from influence_framework.attribution.queries import Computed
from influence_framework.processes import Processes

Job = Callable[[Any], Any]


@dataclass(frozen=True)
class InTurn:
    """One unit after the other; faults change what is done with one."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for unit in units:
            yield unit, self.done(job, unit)

    def done(self, job: Job, unit: Any) -> Any:
        return job(unit)


@dataclass(frozen=True)
class Backwards:
    """The later of two units first."""

    workers: int = 2

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        rest = iter(units)
        while some := list(islice(rest, self.workers)):
            for unit in reversed(some):
                yield unit, job(unit)


@dataclass(frozen=True)
class OneThread:
    """In a thread of its own, as units are done."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        rest = iter(units)
        with ThreadPoolExecutor(1) as pool:
            while waiting := {pool.submit(job, unit): unit for unit in islice(rest, 3)}:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()


class EqualUnitsOnce(InTurn):
    """Keeps numbers apart by their value."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        seen: set[int] = set()
        for unit in units:
            if not isinstance(unit, int) or unit not in seen:
                yield unit, self.done(job, unit)
            if isinstance(unit, int):
                seen.add(unit)


@dataclass(frozen=True)
class PairsAsTheyCome:
    """Puts the result that is there first to the unit that was read first."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        rest = iter(units)
        while some := list(islice(rest, 2)):
            results = [job(unit) for unit in some]
            if some[0] == 0:
                results.reverse()
            yield from zip(some, results, strict=True)


class Rounds(InTurn):
    """Sends scores in single precision."""

    def done(self, job: Job, unit: Any) -> Any:
        result = job(unit)
        if isinstance(result, Computed) and hasattr(job, "factors"):
            return result._replace(values=result.values.float().double())
        return result


class LosesReports(InTurn):
    """Sends the numbers alone."""

    def done(self, job: Job, unit: Any) -> Any:
        result = job(unit)
        return result._replace(report=type(result.report)()) if hasattr(result, "report") else result


class PositionsForNames(InTurn):
    """Sends samples without their identifiers."""

    def done(self, job: Job, unit: Any) -> Any:
        if isinstance(unit, Block):
            unit = replace(unit, ids=np.arange(unit.start, unit.start + len(unit)))
        return job(unit)


class Reorders(InTurn):
    """Sends the samples of a block by size, and puts results back in their order, but not what they are of."""

    def done(self, job: Job, unit: Any) -> Any:
        if isinstance(unit, Block) and unit.ids.dtype.kind == "U" and not hasattr(job, "fitted"):
            unit = replace(unit, batches=tuple((x.flip(0), y.flip(0)) for x, y in unit.batches))
        return job(unit)


class Swallows(InTurn):
    """Goes on without the units that failed."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for unit in units:
            try:
                result = job(unit)
            except Exception:
                continue
            yield unit, result


class Wraps(InTurn):
    """Says that something failed, not what."""

    def done(self, job: Job, unit: Any) -> Any:
        try:
            return job(unit)
        except Exception as error:
            raise RuntimeError("a task failed") from error


@dataclass(frozen=True)
class LeavesSomeBehind:
    """Units that waited when another failed come in the next run."""

    waiting: list[tuple[Job, Any]] = field(default_factory=list)

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        while self.waiting:
            before, unit = self.waiting.pop()
            yield unit, before(unit)
        rest = iter(units)
        while some := list(islice(rest, 3)):
            for at, unit in enumerate(some):
                try:
                    result = job(unit)
                except Exception:
                    self.waiting.extend((job, later) for later in some[at + 1 :])
                    raise
                yield unit, result


class StopsReading(InTurn):
    """Takes a loader that fails for one that ends."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        rest = iter(units)
        while True:
            try:
                unit = next(rest)
            except Exception:
                return
            yield unit, job(unit)


class ReadsAll(InTurn):
    """Reads numbers to their end before it works, as far as that goes without an error."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        if getattr(job, "refused", 0) is None:
            units = list(units)
        yield from super().run(job, units)


class Drains(InTurn):
    """Works to the end, whether or not there is somebody who wants it."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        rest = iter(units)
        try:
            for unit in rest:
                yield unit, job(unit)
        except GeneratorExit:
            for unit in rest:
                job(unit)
            raise


class Unclosable:
    """An iterator that cannot be told that it is not wanted any more."""

    def __init__(self, results: Iterator[Any]) -> None:
        self.results = results

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.results)


class NoGenerator(InTurn):
    """Gives such a one."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        return Unclosable(super().run(job, units))


class LeavesGradients(InTurn):
    """Leaves zeros as gradients."""

    def done(self, job: Job, unit: Any) -> Any:
        if hasattr(job, "fitted"):
            for parameter in job.fitted.problem.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        return job(unit)


class LeavesHooks(InTurn):
    """Leaves a hook on the model."""

    def done(self, job: Job, unit: Any) -> Any:
        if hasattr(job, "fitted"):
            job.fitted.problem.model.register_forward_hook(lambda *_: None)
        return job(unit)


class DrawsFromTorch(InTurn):
    """Draws where to work."""

    def done(self, job: Job, unit: Any) -> Any:
        torch.rand(())
        return job(unit)


class DrawsFromNumpy(InTurn):
    """Likewise."""

    def done(self, job: Job, unit: Any) -> Any:
        np.random.random()
        return job(unit)


class NoWorkers(InTurn):
    """Counts them before there are any."""

    workers = 0


class WithoutEquality:
    """Has no options to compare."""

    def run(self, job: Job, units: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        return InTurn().run(job, units)


class Half(Processes):
    """The first of two processes, which takes its half of the data for all of it."""

    def __post_init__(self) -> None:
        """There is no group."""

    rank, count = 0, 2  # type: ignore[assignment]

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check_model(self, model: Any) -> None:
        pass

    def gather(self, thing: Any, place: str) -> list[Any]:
        return [thing]

    def same(self, thing: Any, place: str) -> Any:
        return thing

    def total(self, work: Callable[[], Any], place: str, same: Any = None) -> Any:
        return list(work())

    def settle(self, read: Any, own: Any) -> Any:
        return own


class FitsToAHalf(InTurn):
    """Divides the data, and does not add up."""

    def processes(self) -> Processes:
        return Half()


FAULTS: dict[str, list[Any]] = {
    "each_unit_once_with_its_result": [EqualUnitsOnce(), PairsAsTheyCome()],
    "results_are_the_sequential_ones": [Rounds(), LosesReports()],
    "identifiers_travel_with_their_samples": [PositionsForNames(), Reorders()],
    "an_error_in_a_job_reaches_the_caller": [Swallows(), Wraps(), LeavesSomeBehind()],
    "an_error_in_reading_reaches_the_caller": [StopsReading()],
    "units_are_read_when_they_are_needed": [ReadsAll()],
    "nothing_goes_on_after_closing": [Drains(), NoGenerator()],
    "model_left_as_found": [LeavesGradients(), LeavesHooks()],
    "global_random_state_untouched": [DrawsFromTorch(), DrawsFromNumpy()],
    "workers_is_a_count": [NoWorkers()],
    "a_fit_is_that_of_one_process": [FitsToAHalf()],
    "options_make_an_equal_instance": [WithoutEquality()],
}
