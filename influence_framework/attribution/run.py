"""Scores between two loaders: the test side once, then one pass over the training data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from influence_framework.attribution.blocks import Block, blocks
from influence_framework.attribution.fingerprints import Survey
from influence_framework.attribution.outputs import (
    MEASURED_UNITS,
    Collector,
    Factors,
    Matrix,
    Output,
    Scored,
    resolve_output,
)
from influence_framework.attribution.places import Forgetting, Place
from influence_framework.attribution.queries import (
    FactorNorms,
    FactorRows,
    Job,
    Preparation,
    QueryScores,
    SelfScores,
    check_query_rank,
    points_at_once,
)
from influence_framework.attribution.store import FORMAT, Store
from influence_framework.data import random_state_kept
from influence_framework.errors import InvalidInputError
from influence_framework.fingerprints import fingerprint
from influence_framework.fitted import Fitted
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.measurement import Measurement, measured
from influence_framework.points import checked_points
from influence_framework.protocols import Executor, Fitting, Solver
from influence_framework.registry import Registry, default_registry
from influence_framework.solving import SolveLog
from influence_framework.specs import Spec, resolve

LARGEST = 1024
"""Training points a block at most: larger ones gain nothing."""


def attribute(
    model: TorchInfluenceFunctionModel,
    test: Iterable[Any] | None,
    train: Iterable[Any],
    *,
    output: str | Mapping[str, Any] | Output = "matrix",
    measurement: Measurement | None = None,
    query_rank: int | None = None,
    executor: Spec | Executor = "sequential",
    store: str | os.PathLike[str] | None = None,
    progress: bool = False,
    registry: Registry = default_registry,
) -> Scored:
    """Scores in mode Up of every training point with every test point, from loaders, in bounded memory.

    Test points are solved for once, as many at a time as half of the model's ``memory_budget`` holds; for
    each such group there is one pass over ``train``, and one more for all of them where scores are normalised.
    Beside the budget, the memory taken is that of the result, or none with a store and the output
    ``"matrix"``, and some 60 bytes for each point that is solved for, with which the report is written.
    Before that, both loaders are read once without the model, for identifiers and fingerprints.

    Args:
        model: Fitted.
        test: Re-iterable of batches ``(x, y)`` or ``(x, y, identifiers)`` of the test points; ``None`` where
            the output needs none.
        train: The same of the training points.
        output: What to keep: ``"matrix"``, ``"top_k"``, ``"mean"``, ``"self_influence"``, ``"factors"``, a
            mapping with ``name`` and options (``{"name": "top_k", "k": 20, "normalize": "l_relatif"}``), or an
            :class:`Output`.
        measurement: ``m(outputs, batch)`` of the test points in place of their loss, as ``model.influences``
            takes it. A store knows it by its name and by what it measures at the first test point.
        query_rank: Compress the factor of every test point to this rank in each layer, as
            ``model.query_factors`` does, so that more of them share a pass over ``train``: in a layer of ``o``
            outputs and ``e`` inputs one takes ``query_rank·(o + e)`` numbers in place of ``o·e``. What is lost
            is in ``query_error`` of the result.
        executor: Where test points are solved for and blocks are computed: ``"sequential"``, one after the
            other in this process; the name of another one that is installed (``list(inf.executors)``), a
            mapping with ``name`` and options, or an instance.
        store: A folder to write to. A run that was killed goes on there when it is called again.
        progress: Show a bar that counts scores.
        registry: Where an executor's name is looked up.

    Returns:
        The scores with the identifiers of their points.

    Raises:
        NotFittedError: Before ``fit``.
        UnknownMethodError: No executor of that name; the message lists what exists.
        InvalidInputError: What does not fit, with the remedy; a store that holds scores of something else.
    """
    if not isinstance(model, TorchInfluenceFunctionModel):
        raise InvalidInputError(
            f"The first argument is a fitted influence model, got {type(model).__name__}: "
            "attribute(model, test, train)."
        )
    fitted = model.fitted
    chosen = resolve_output(output)
    worker = resolve("executor", executor, registry)
    if chosen.pairs and test is None:
        raise InvalidInputError(f"The output {chosen.name!r} is of pairs: pass test points too.")
    if not chosen.pairs and test is not None:
        raise InvalidInputError(f"The output {chosen.name!r} is of training points alone: pass test=None.")
    if not chosen.pairs and measurement is not None:
        raise InvalidInputError(
            f"A measurement is of test points, and the output {chosen.name!r} of training points alone: "
            "leave it out."
        )
    check_query_rank(query_rank, chosen)
    processes = worker.processes() if isinstance(worker, Fitting) else None
    processes = processes or fitted.problem.processes
    with nullcontext() if processes is None else processes.together():
        surveys = {"training points": Survey.of(train, "training points")}
        if test is not None:
            surveys["test points"] = Survey.of(test, "test points")
        known = None if measurement is None or test is None else described(fitted, measurement, test)
        place = Place.of(processes, surveys)
        run = _Run(model, fitted, chosen, worker, surveys, place, measurement, known, query_rank)
        with model.solving() as log:
            return run.into(run.place.store(store, run.manifest()), test, train, log, progress)


@dataclass(frozen=True)
class _Run:
    """One call of :func:`attribute`, with all that its parts have in common."""

    model: TorchInfluenceFunctionModel
    fitted: Fitted
    output: Output
    executor: Executor
    surveys: Mapping[str, Survey]
    place: Place
    measurement: Measurement | None
    known: Mapping[str, Any] | None
    """What tells the measurement from others."""
    query_rank: int | None

    @property
    def shape(self) -> tuple[int, int]:
        test = self.surveys.get("test points")
        alone = self.fitted.problem.parameters.numel if isinstance(self.output, Factors) else 1
        return (alone if test is None else len(test.ids), len(self.surveys["training points"].ids))

    @cached_property
    def chunks(self) -> tuple[int, int]:
        """Test and training points of a block: half of the budget for the ones, a quarter for the scores."""
        rows = (
            min(self.shape[0], points_at_once(self.fitted, self.query_rank))
            if self.output.pairs
            else self.shape[0]
        )
        room = self.fitted.problem.memory_budget // (4 * 8 * rows)
        return rows, max(1, min(self.shape[1], LARGEST, room))

    @property
    def dtype(self) -> np.dtype[Any]:
        return torch.empty(0, dtype=self._precision).numpy().dtype

    @property
    def _precision(self) -> torch.dtype:
        # NumPy has no bfloat16, and a score of half precision would hardly have two digits.
        return torch.promote_types(self.fitted.problem.parameters.dtype, torch.float32)

    def manifest(self) -> dict[str, Any]:
        """What the scores are of."""
        asked = {"measurement": self.known, "query_rank": self.query_rank}
        return {key: value for key, value in asked.items() if value is not None} | {
            "format": FORMAT,
            "output": {"name": self.output.name, **asdict(self.output)},
            **composition(self.model),
            "model": fingerprint(self.fitted.state),
            "fitted to": asdict(self.fitted.problem.fingerprint),
            **{what: {"count": len(s.ids), "fingerprint": s.digest} for what, s in self.surveys.items()},
            "shape": list(self.shape),
            "chunks": list(self.chunks),
            "dtype": str(self.dtype),
            "units": self.output.units if self.known is None else MEASURED_UNITS,
        }

    def into(
        self,
        store: Store | None,
        test: Iterable[Any] | None,
        train: Iterable[Any],
        log: SolveLog,
        progress: bool,
    ) -> Scored:
        """Collect what is not in the store yet."""
        collector = self._collector(store)
        lost = {} if self.query_rank is None else {"query_error": np.full(self.shape[0], np.nan)}
        if store is not None:
            store.resume(collector, lost)
        done = self.place.resumed(store, collector, lost)
        total = self.shape[0] * self.shape[1]
        quiet = not (progress and self.place.leads)
        with tqdm(total=total, desc="Scores", unit="score", unit_scale=True, disable=quiet) as bar:
            sizes: Tensor | None = None
            for rows, points in self._groups(test):
                count = rows.stop - rows.start
                wanted = [c for c in range(0, self.shape[1], self.chunks[1]) if (rows.start, c) not in done]
                bar.update(count * (self.shape[1] - self._width(wanted)))
                if not wanted:
                    continue
                if sizes is None and self.output.normalize is not None:
                    sizes = self._sizes(train, log)
                job = self._job(points, log)
                if isinstance(job, QueryScores):
                    lost["query_error"][rows] = job.factors.error.cpu().numpy()
                for block, computed in self.executor.run(job, self._blocks(train, set(wanted))):
                    values = computed.values.to("cpu", self._precision)
                    if sizes is not None:
                        own = sizes[block.columns]
                        values = torch.where(own > 0, values / own, 0.0)
                    collector.add(rows, block.columns, values.numpy())
                    log.absorb(computed.report)
                    bar.update(count * len(block))
                    if store is not None:
                        store.finished(rows, block.columns, collector, log)
        ids = {what: survey.ids for what, survey in self.surveys.items()}
        tested = ids.get("test points", np.arange(0))
        scored = Scored(self.output, tested, ids["training points"], collector, self.known, **lost)
        if store is not None:
            store.conclude(collector, scored.test_ids, scored.train_ids, log)
        return self.place.concluded(scored)

    def _collector(self, store: Store | None) -> Collector:
        if isinstance(self.output, Matrix | Factors):
            if store is not None:
                return store.matrix(self.output, self.shape, self.chunks, self.dtype)
            if self.place.folder is not None:
                return Forgetting()
        return self.output.collector(*self.shape, self.dtype)

    def _groups(self, test: Iterable[Any] | None) -> Iterator[tuple[slice, Block | None]]:
        """The rows of each group with its test points, in one pass over them."""
        if test is None:
            yield slice(0, self.shape[0]), None
            return
        read = 0
        for block in blocks(test, self.chunks[0]):
            self.surveys["test points"].check(block.start, block.ids, "test points")
            read += len(block)
            yield block.columns, block
        _check_read(read, self.shape[0], "test points")

    def _width(self, starts: list[int]) -> int:
        return sum(min(self.chunks[1], self.shape[1] - start) for start in starts)

    def _blocks(self, train: Iterable[Any], wanted: set[int]) -> Iterator[Block]:
        read = 0
        for block in blocks(train, self.chunks[1]):
            self.surveys["training points"].check(block.start, block.ids, "training points")
            read += len(block)
            if block.start in wanted:
                yield block
        _check_read(read, self.shape[1], "training points")

    def _job(self, points: Block | None, log: SolveLog) -> Job:
        """The job of a group of test points, or of none."""
        if points is None:
            return FactorRows(self.fitted) if isinstance(self.output, Factors) else SelfScores(self.fitted)
        return self._prepared(points, log)

    def _sizes(self, train: Iterable[Any], log: SolveLog) -> Float[Tensor, " n"]:
        """What the scores of each training point are divided by, once for all groups of test points."""
        relative = self.output.normalize == "l_relatif"
        job: Job = SelfScores(self.fitted) if relative else FactorNorms(self.fitted)
        sizes = torch.empty(self.shape[1], dtype=self._precision, device="cpu")
        everything = set(range(0, self.shape[1], self.chunks[1]))
        for block, (values, report) in self.executor.run(job, self._blocks(train, everything)):
            sizes[block.columns] = values[0].to("cpu", self._precision)
            log.absorb(report)
        return sizes.clamp(min=0).sqrt() if relative else sizes

    def _prepared(self, block: Block, log: SolveLog) -> Job:
        preparation = Preparation(self.fitted, self.measurement, self.query_rank)
        # What is done by all processes together is best done at once.
        pieces = getattr(self.executor, "workers", 1) if preparation.alone else 1
        done = list(self.executor.run(preparation, block.pieces(pieces)))
        parts = [part for _, part in sorted(done, key=lambda pair: pair[0].start)]
        for part in parts:
            log.absorb(part.report)
        return preparation.job(parts, len(block))


def _check_read(read: int, before: int, what: str) -> None:
    if read != before:
        raise InvalidInputError(
            f"The loader of the {what} yielded {before} points when first read and {read} now: it must yield "
            "the same ones in every pass."
        )


def described(fitted: Fitted, measurement: Measurement, test: Iterable[Any]) -> dict[str, Any]:
    """What tells a measurement from others: its name, and what it measures at the first test point.

    Raises:
        InvalidInputError: It is none, or the test point does not fit.
    """
    problem = measured(fitted.problem, measurement)
    first = next(blocks(test, 1))
    ((x, y),) = first.batches
    point = checked_points(fitted, x, y, "test points", measurement)
    with random_state_kept(), torch.no_grad():
        value = problem.sample_losses({}, point).double().item()
    while isinstance(measurement, partial):
        measurement = measurement.func
    name = getattr(measurement, "__qualname__", type(measurement).__qualname__)
    return {"name": f"{measurement.__module__}.{name}", "value": value}


def composition(model: TorchInfluenceFunctionModel) -> dict[str, Any]:
    """What a fitted model is put together from: solver and source as text, and λ of every block."""
    return {
        "solver": repr(_quiet(model.solver)),
        "source": repr(model.source),
        "blocks": {name: block.regularization for name, block in model.fitted.blocks.items()},
    }


def _quiet(solver: Solver) -> Solver:
    """The solver without its bar, which is no part of what is computed."""
    if is_dataclass(solver) and any(field.name == "progress" for field in fields(solver)):
        return cast(Solver, replace(solver, progress=False))
    return solver
