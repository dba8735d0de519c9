"""Checks of an executor: in the place of the sequential one, it changes nothing but where work is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence_framework.attribution import SequentialExecutor, attribute
from influence_framework.attribution.blocks import Block, blocks
from influence_framework.attribution.outputs import Array, MatrixCollector, Scored
from influence_framework.compose import compose
from influence_framework.errors import DistributedError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.inverses import Inverse, approximation
from influence_framework.operators import to_dense
from influence_framework.protocols import Executor, Fitting, LinearOperator, Solution
from influence_framework.registry import Kind, Registry
from influence_framework.sources import GaussNewton
from influence_framework.testing.composition import options_make_an_equal_instance
from influence_framework.testing.problems import batches, network, samples
from influence_framework.testing.untouched import changed_model, changed_random_states

BUDGET = 8000
"""Bytes for which there are three groups of test points, and three blocks of training points."""

TEST_POINTS = 60
UNITS = 200
"""More than any executor has workers for."""

AHEAD = 4
"""Units for each worker that may be read before the first of their results is given."""

TOLERANCE = 1e-10
"""What sums in another order may change, relative to the largest number: condition numbers of a few hundred."""

MOMENT = 0.05
"""Seconds that a unit takes which others overtake, and after which work that goes on would show."""

OUTPUTS: tuple[dict[str, Any], ...] = (
    {"name": "matrix"},
    {"name": "top_k", "k": 3, "normalize": "l_relatif"},
    {"name": "mean", "normalize": "theta_relatif"},
    {"name": "self_influence"},
    {"name": "factors"},
)
"""All outputs, and both ways of normalising."""

WITHOUT_TEST_POINTS = ("self_influence", "factors")


@dataclass(frozen=True, eq=False)
class _CholeskyInverse(Inverse):
    base: LinearOperator
    regularization: float
    factor: Float[Tensor, "P P"]

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        return approximation(torch.cholesky_solve(columns, self.factor))


@dataclass(frozen=True)
class _Cholesky:
    """The exact inverse: core has no solver, and executors must not need a plugin to be checked."""

    def fit(self, operator: LinearOperator, regularization: float) -> _CholeskyInverse:
        matrix = to_dense(operator)
        shifted = matrix + regularization * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return _CholeskyInverse(operator, regularization, torch.linalg.cholesky(shifted))


class RefusalError(Exception):
    """What a job or a loader raises under test."""


@dataclass(frozen=True)
class Squaring:
    """Squares numbers; the first takes longer than those after it.

    Attributes:
        refused: The number at which it raises :class:`RefusalError`.
        alone: As of the jobs of core.
    """

    refused: int | None = None
    alone: bool = True

    def __call__(self, unit: int) -> int:
        if unit == self.refused:
            raise RefusalError(f"unit {unit} is refused")
        if unit == 0:
            time.sleep(MOMENT)
        return unit**2


@dataclass(frozen=True)
class Naming:
    """What a job sees of a block: its identifiers, and a number for each of its samples."""

    alone: ClassVar[bool] = True

    def __call__(self, block: Block) -> tuple[list[Any], list[float]]:
        numbers = [x.double().sum(dim=1) for x, _ in block.batches]
        return block.ids.tolist(), torch.cat(numbers).tolist()


@dataclass(eq=False)
class Reading:
    """Units that know how many of them were read.

    Attributes:
        units: What is read.
        failing: After how many units reading fails with :class:`RefusalError`.
    """

    units: Iterable[int]
    failing: int | None = None
    read: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[int]:
        for unit in self.units:
            if self.read == self.failing:
                raise RefusalError(f"nothing to read after {self.failing} units")
            self.read += 1
            yield unit


@dataclass(frozen=True, eq=False)
class ExecutorSubject:
    """An executor under test.

    Attributes:
        executor: The instance.
        registry: Where names are looked up.
    """

    kind: ClassVar[Kind] = "executor"

    executor: Executor
    registry: Registry

    @property
    def method(self) -> Executor:
        """The executor."""
        return self.executor

    @property
    def workers(self) -> int:
        """How many units it says that it works on at the same time."""
        return int(getattr(self.executor, "workers", 1))

    def said(self, error: Exception, refusal: str) -> bool:
        """Whether ``error`` is the refusal as it was raised, or what the other processes raise then."""
        if isinstance(error, DistributedError):
            return self.several and refusal in str(error)
        return type(error) is RefusalError and str(error) == refusal

    @property
    def several(self) -> bool:
        """Whether this process is one of several that all run the same program."""
        processes = self.executor.processes() if isinstance(self.executor, Fitting) else None
        return processes is not None and processes.count > 1


def composed() -> TorchInfluenceFunctionModel:
    """A model of 17 parameters, not fitted yet."""
    return compose(
        network(),
        nn.CrossEntropyLoss(),
        solver=_Cholesky(),
        source=GaussNewton(),
        hessian_regularization=0.1,
        memory_budget=BUDGET,
        on_failure="raise",
        preflight=False,
    )


def scored(
    output: dict[str, Any],
    executor: Executor,
    fitted: TorchInfluenceFunctionModel,
    train: Sequence[Any] | None = None,
) -> tuple[Scored, int]:
    """Scores of fresh data, and how many right-hand sides are reported on."""
    test = None if output["name"] in WITHOUT_TEST_POINTS else [samples(TEST_POINTS, seed=8)]
    found = attribute(fitted, test, train or batches(), output=output, executor=executor)
    return found, len(fitted.report)


@cache
def expected() -> list[tuple[Scored, int]]:
    """Every output by the sequential executor."""
    fitted = composed().fit(batches())
    return [scored(output, SequentialExecutor(), fitted) for output in OUTPUTS]


def each_unit_once_with_its_result(subject: ExecutorSubject) -> Iterator[str]:
    """Each unit comes once with its own result, however long it took; equal units are not one."""
    for alone in (True, False):
        for units in ([*range(30)], [3, 1, 3, 2, 3], []):
            found = list(subject.executor.run(Squaring(alone=alone), iter(units)))
            wanted = sorted((unit, unit**2) for unit in units)
            if sorted(found) != wanted:
                yield f"units {_short(units)} gave {_short(sorted(found))}, expected {_short(wanted)}"


def results_are_the_sequential_ones(subject: ExecutorSubject) -> Iterator[str]:
    """Every output is that of the sequential executor, and reports as many right-hand sides."""
    fitted = composed().fit(batches())
    for output, (wanted, count) in zip(OUTPUTS, expected(), strict=True):
        found, solved = scored(output, subject.executor, fitted)
        yield from _differing(str(output), _arrays(found), _arrays(wanted))
        if solved != count:
            yield f"{output}: {solved} right-hand sides were reported on, expected {count}"


def identifiers_travel_with_their_samples(subject: ExecutorSubject) -> Iterator[str]:
    """A job sees the samples of a block in order under their own identifiers, and scores come with these."""
    x, y = samples(20)
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(4), device="cpu")
    names = [f"sample {index}" for index in order.tolist()]
    shuffled = [(x[part], y[part], [names[i] for i in at]) for part, at in _cut(order, (7, 9, 4))]
    rows = dict(zip(names, x[order].double().sum(dim=1).tolist(), strict=True))
    seen: dict[str, float] = {}
    for block, (ids, numbers) in subject.executor.run(Naming(), blocks(shuffled, 6)):
        if ids != block.ids.tolist():
            yield f"the samples {block.ids.tolist()} were worked on as {ids}"
        seen.update(zip(block.ids.tolist(), numbers, strict=True))
    if seen != rows:
        yield f"of {len(rows)} samples, {sum(seen.get(n) == rows[n] for n in rows)} came with their own number"
    fitted = composed().fit(batches())
    plain, named = (
        scored({"name": "self_influence"}, executor, fitted, train)[0]
        for executor, train in ((SequentialExecutor(), batches()), (subject.executor, shuffled))
    )
    if named.columns["train"].tolist() != names:
        yield f"scores came for {_short(named.columns['train'].tolist())}, expected {_short(names)}"
        return
    yield from _differing(
        "scores", {"score": named.columns["score"]}, {"score": plain.columns["score"][order.numpy()]}
    )


def an_error_in_a_job_reaches_the_caller(subject: ExecutorSubject) -> Iterator[str]:
    """What a job raises is raised as it is, nothing is read after it, and the next run is as ever."""
    units = Reading(range(UNITS))
    yield from _raised(subject, Squaring(refused=3), units, "unit 3 is refused")
    yield from _quiet(units, "the error")
    yield from _as_ever(subject)


def an_error_in_reading_reaches_the_caller(subject: ExecutorSubject) -> Iterator[str]:
    """What reading the units raises is raised as it is, and the next run is as ever."""
    yield from _raised(subject, Squaring(), Reading(range(UNITS), failing=5), "nothing to read after 5 units")
    yield from _as_ever(subject)


def units_are_read_when_they_are_needed(subject: ExecutorSubject) -> Iterator[str]:
    """No more units are read ahead of the results than four for each worker: each may hold much data."""
    units = Reading(range(1, UNITS + 1))
    most = 0
    for given, _ in enumerate(subject.executor.run(Squaring(), units)):
        most = max(most, units.read - given)
    allowed = AHEAD * max(1, subject.workers)
    if most > allowed:
        yield f"{most} units were read ahead, expected at most {allowed}: {AHEAD} a worker"


def nothing_goes_on_after_closing(subject: ExecutorSubject) -> Iterator[str]:
    """Once the iterator is closed nothing more is read, and the next run is as ever."""
    units = Reading(range(1, UNITS + 1))
    results: Any = subject.executor.run(Squaring(), units)
    next(results)
    if not hasattr(results, "close"):
        yield f"run returned a {type(results).__name__} without close(): write it as a generator"
        return
    read = units.read
    results.close()
    if units.read > read:
        yield f"{units.read - read} units were read while it was closed"
    yield from _quiet(units, "closing")
    yield from _as_ever(subject)


def model_left_as_found(subject: ExecutorSubject) -> Iterator[str]:
    """Parameters, gradients, buffers, modes and hooks of the model are as they were."""
    fitted = composed().fit(batches())
    yield from changed_model(fitted.model, lambda: scored({"name": "self_influence"}, subject.executor, fitted))


def global_random_state_untouched(subject: ExecutorSubject) -> Iterator[str]:
    """The global random states of NumPy and torch are left alone in the process that asks."""
    # Within attribute these are set back. Threads of a cluster's client may draw from Python's at any time.
    yield from changed_random_states(
        lambda: list(subject.executor.run(Squaring(), range(5))), of=("NumPy", "torch")
    )


def workers_is_a_count(subject: ExecutorSubject) -> Iterator[str]:
    """Where it says how many ``workers`` it has, that is a positive integer."""
    workers = getattr(subject.executor, "workers", 1)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        yield f"workers is {workers!r}"


def a_fit_is_that_of_one_process(subject: ExecutorSubject) -> Iterator[str]:
    """If it can fit, that gives the scores of a fit in one process."""
    executor = subject.executor
    if not isinstance(executor, Fitting):
        return
    fitted = composed().fit(batches(), executor=executor)
    for output, (wanted, _) in zip(OUTPUTS, expected(), strict=True):
        found, _ = scored(output, executor, fitted)
        yield from _differing(str(output), _arrays(found), _arrays(wanted))


def _raised(
    subject: ExecutorSubject, job: Callable[[int], int], units: Iterable[int], refusal: str
) -> Iterator[str]:
    try:
        results = list(subject.executor.run(job, units))
    except Exception as error:  # which one is what is asked
        if not subject.said(error, refusal):
            yield f"{type(error).__name__}: {error} was raised, expected {RefusalError.__name__}: {refusal}"
    else:
        yield f"nothing was raised, and {len(results)} results were given; expected {refusal!r}"


def _quiet(units: Reading, since: str) -> Iterator[str]:
    read = units.read
    time.sleep(MOMENT)
    if units.read > read:
        yield f"{units.read - read} units were read after {since}"


def _as_ever(subject: ExecutorSubject) -> Iterator[str]:
    found = sorted(subject.executor.run(Squaring(), iter([4, 2])))
    if found != [(2, 4), (4, 16)]:
        yield f"the next run of 2 units gave {_short(found)}"


def _arrays(scored: Scored) -> dict[str, Array]:
    if isinstance(scored.collected, MatrixCollector):
        return {"array": np.asarray(scored.array)}
    return dict(scored.columns)


def _differing(what: str, found: dict[str, Array], wanted: dict[str, Array]) -> Iterator[str]:
    for name, right in wanted.items():
        array = found[name]
        if (array.shape, array.dtype) != (right.shape, right.dtype):
            yield f"{what}, {name}: {array.shape} of {array.dtype}, expected {right.shape} of {right.dtype}"
        elif right.dtype.kind != "f":
            if not np.array_equal(array, right):
                yield f"{what}, {name}: {int((array != right).sum())} of {right.size} differ"
        else:
            off = float(np.abs(array - right).max() / np.abs(right).max())
            if not off <= TOLERANCE:
                yield f"{what}, {name}: off by {off:.1e}, expected at most {TOLERANCE:.0e}"


def _cut(order: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, range]]:
    """Parts of these sizes, and where they stand."""
    start = 0
    for part in order.split(list(sizes)):
        yield part, range(start, start + len(part))
        start += len(part)


def _short(things: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, things[:6]))}{', …' if len(things) > 6 else ''}]"


EXECUTOR_CHECKS = (
    each_unit_once_with_its_result,
    results_are_the_sequential_ones,
    identifiers_travel_with_their_samples,
    an_error_in_a_job_reaches_the_caller,
    an_error_in_reading_reaches_the_caller,
    units_are_read_when_they_are_needed,
    nothing_goes_on_after_closing,
    model_left_as_found,
    global_random_state_untouched,
    workers_is_a_count,
    a_fit_is_that_of_one_process,
    options_make_an_equal_instance,
)
