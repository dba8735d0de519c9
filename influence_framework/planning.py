"""What a fit, or scores, will take before they begin: passes, time, memory and disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch

from influence_framework.attribution.blocks import Block, blocks
from influence_framework.attribution.outputs import Matrix, Output, resolve_output
from influence_framework.attribution.queries import Preparation, SelfScores, check_query_rank, points_at_once
from influence_framework.data import Batch, leaves, nbytes, one_pass, random_state, random_state_kept
from influence_framework.errors import InvalidInputError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.parameters import Blocks
from influence_framework.problem import Problem
from influence_framework.protocols import Needs, Planning

TRIED = 64
"""Training points at most that are worked on to measure the time of one."""

TESTS = 8
"""Test points at most with which scores are tried."""


@dataclass(frozen=True)
class Plan:
    """What a fit or scores take; ``str()`` of it is in words.

    Counted are passes, disk, factors and test points; the time is that of a few samples, scaled; and memory is
    the sum of what is counted and of what batches may take.

    Attributes:
        what: A fit or scores, and of how many points.
        passes: Over the training data; ``None`` where the iterations of a solver decide.
        seconds: Predicted; ``None`` where ``passes`` is.
        peak: Bytes on the device at any one time, the model included.
        held: Bytes of that which are factors of layers, or of test points.
        host: Bytes in the memory of the host, where that is another, or chosen as storage.
        disk: Bytes in files.
        tried: Samples that were timed.
    """

    what: str
    passes: int | None
    seconds: float | None
    peak: int
    held: int
    host: int
    disk: int
    tried: int

    def __str__(self) -> str:
        passes = "a number of passes that the solver's iterations decide"
        if self.passes is not None:
            passes = f"{self.passes} pass{'' if self.passes == 1 else 'es'} over the training data"
        duration = "not known beforehand"
        if self.seconds is not None:
            duration = f"about {_duration(self.seconds)}, by {self.tried} samples tried"
        return "\n".join(
            (
                f"{self.what}: {passes}.",
                f"  time     {duration}",
                f"  memory   {_size(self.peak)} on the device, of which {_size(self.held)} factors; "
                f"{_size(self.host)} on the host",
                f"  disk     {_size(self.disk)}",
            )
        )


def plan(
    model: TorchInfluenceFunctionModel,
    train: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    output: Any = "matrix",
    query_rank: int | None = None,
    store: bool = False,
) -> Plan:
    """What ``model.fit(train)`` will take; or, of a fitted model, ``inf.attribute(model, test, train)``.

    A few samples are worked on as they will be, and timed; the loaders are read without the model, and counted.

    Args:
        model: Not fitted, for the plan of a fit; fitted, for that of scores.
        train: The training data.
        test: The test points of scores.
        output: What will be kept of them, as for ``inf.attribute``.
        query_rank: What factors of the test points will be compressed to, as for ``inf.attribute``.
        store: Whether they will be written to disk.

    Returns:
        The plan; printed, it is in words.

    Raises:
        InvalidInputError: What does not fit, as the fit or the scores themselves would find it; test points for
            a fit, or none for scores of pairs.
    """
    with random_state_kept():
        if model.is_fitted:
            return _of_scores(model, train, test, resolve_output(output), query_rank, store=store)
        if test is not None or query_rank is not None:
            raise InvalidInputError("The model is not fitted: plan the fit first, without test points.")
        return _of_fit(model, train)


def _of_fit(model: TorchInfluenceFunctionModel, train: Iterable[Any]) -> Plan:
    first: list[Batch] = []
    count = size = 0
    for batch in one_pass(train, random_state(train)):
        count, size = count + len(next(leaves(batch))), size + nbytes(batch)
        if len(first) < 2:
            first.append(batch)
    problem = Problem.build(model.model, model.loss, first, memory_budget=model.memory_budget)
    few = problem.first(min(TRIED, problem.max_batch))
    names = Blocks.resolve(model.blocks, problem.parameters)
    parts = {name: problem.parameters.subset(members) for name, members in names.items()}
    operators = {name: model.source.operator(few, part) for name, part in parts.items()}
    solver, needs, seconds = model.solver, Needs(0, 0, 0), None
    if isinstance(solver, Planning):
        needs, fixed = solver.needs(operators), []

        def work() -> None:
            # The first pass, of a forward each, checks the data.
            for batch, _ in few.batches():
                few.validated(batch, "training data")
            fixed.append(solver.trial(operators))

        seconds = _timed(work, problem) / few.size * count + fixed[-1]
    return Plan(
        what=f"Fit of {type(solver).__name__} to {count} samples",
        passes=needs.passes or None,
        seconds=seconds,
        peak=_beside(problem, len(parts), count) + (size if size <= model.memory_budget else 0) + needs.peak,
        held=needs.peak,
        host=needs.host,
        disk=needs.disk,
        tried=few.size,
    )


def _of_scores(
    model: TorchInfluenceFunctionModel,
    train: Iterable[Any],
    test: Iterable[Any] | None,
    output: Output,
    query_rank: int | None,
    *,
    store: bool,
) -> Plan:
    check_query_rank(query_rank, output)
    fitted, problem = model.fitted, model.fitted.problem
    if output.pairs is (test is None):
        needed = "pairs: pass test points too" if output.pairs else "training points alone: pass test=None"
        raise InvalidInputError(f"The output {output.name!r} is of {needed}.")
    columns, block = _count(train), _few(train, min(TRIED, problem.max_batch))
    passes, held = 1, 0
    if test is None:
        rows, what = 1, f"Scores of {columns} training points"
        seconds = _timed(lambda: SelfScores(fitted)(block), problem) / len(block) * columns
    else:
        rows, most = _count(test), points_at_once(fitted, query_rank)
        at_once = min(rows, most)
        passes, held = ceil(rows / at_once), at_once * problem.memory_budget // (2 * most)
        what = f"Scores of {columns} training points with {rows} test points, {at_once} of these at a time"
        preparation = Preparation(fitted, rank=query_rank)
        seconds = _of_pairs(preparation, _few(test, min(TESTS, at_once)), block, rows, columns, passes)
    kept = rows * columns * problem.parameters.dtype.itemsize if isinstance(output, Matrix) else 0
    operators = {name: fitted_block.operator for name, fitted_block in fitted.blocks.items()}
    left = model.solver.needs(operators) if isinstance(model.solver, Planning) else Needs(0, 0, 0)
    return Plan(
        what=what,
        passes=passes,
        seconds=seconds,
        peak=_beside(problem, len(fitted.blocks), columns) + held + left.device,
        held=held + left.device,
        host=left.host + (0 if store else kept),
        disk=left.disk + (kept if store else 0),
        tried=len(block),
    )


def _of_pairs(
    preparation: Preparation, tests: Block, block: Block, rows: int, columns: int, passes: int
) -> float:
    """Seconds of ``rows`` test points with ``columns`` training points, from a few of each."""
    problem = preparation.fitted.problem
    solved = _timed(lambda: preparation(tests), problem) / len(tests)
    taken = []
    for some in (next(tests.pieces(len(tests))), tests):
        job = preparation.job([preparation(some)], len(some))
        taken.append(_timed(partial(job, block), problem) / len(block))
    # So much for each training point, and so much more for each further test point that it meets.
    further = max(0.0, taken[1] - taken[0]) / max(1, len(tests) - 1)
    return rows * solved + columns * (passes * taken[0] + (rows - passes) * further)


def _beside(problem: Problem, blocks: int, samples: int) -> int:
    """Bytes of parameters and buffers, of the parameters' places in the flat vector, and of a batch at work."""
    tensors = [*problem.model.parameters(), *problem.model.buffers()]
    places = 8 * problem.parameters.numel * (1 if blocks == 1 else 2)
    batch = min(problem.memory_budget, 8 * problem.sample_bytes * min(samples, problem.max_batch))
    return sum(tensor.nbytes for tensor in tensors) + places + batch


def _count(loader: Iterable[Any]) -> int:
    return sum(len(block) for block in blocks(loader, 1024))


def _few(loader: Iterable[Any], count: int) -> Block:
    found = next(blocks(loader, count), None)
    if found is None:
        raise InvalidInputError("A loader yielded no point: is its dataset empty?")
    return found


def _timed(work: Callable[[], object], problem: Problem) -> float:
    """Seconds of the second of two runs: the first one finds kernels and memory."""
    device = problem.parameters.device
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
