"""Influence of Dask arrays, lazily, chunked over both sides."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import ceil, inf, prod
from typing import Any

import dask.array as da
import numpy as np
import torch
from dask.base import tokenize
from distributed import Client

from influence_framework.attribution.queries import points_at_once, solves_alone
from influence_framework.errors import InvalidInputError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.measurement import Measurement, measured
from influence_framework.protocols import InfluenceMode
from influence_framework_dask.arrays import Layers, check_factor_chunks, check_points, chunks_of, from_loader
from influence_framework_dask.progress import computed
from influence_framework_dask.shipping import Reference
from influence_framework_dask.tasks import Settings, score, score_factors, solve, solve_factors

TASKS_EACH = 4
"""Tasks for each thread of the workers at least, where the chunks allow it, so that none is idle for long."""


class DaskInfluenceCalculator:
    """Factors and scores of Dask arrays: built at once, computed when asked for, chunk by chunk.

    A chunk of test points is solved for once; a chunk of the result is the scores of a chunk of test points
    with a chunk of training points. Arrays are chunked over samples alone. In mode Up as many chunks of test
    points as half of the model's ``memory_budget`` holds are scored with a chunk of training points in one
    task, whose gradients are formed once then. Scores are those of the model's own methods up to rounding;
    where test points are solved for iteratively, chunk by chunk, up to the solver's
    tolerance.

    Args:
        influence_function_model: Fitted. It is sent to each worker once, here.
        client: Of the cluster that will compute; left out, the one in use, or this process where there is none.

    Raises:
        NotFittedError: Before ``fit``.
        InvalidInputError: A model in a dtype that NumPy does not have.
    """

    def __init__(
        self, influence_function_model: TorchInfluenceFunctionModel, client: Client | None = None
    ) -> None:
        self.influence_function_model = influence_function_model
        fitted = influence_function_model.fitted
        if client is None:
            try:
                client = Client.current()
            except ValueError:
                client = None
        self.client = client
        parameters = fitted.problem.parameters
        try:
            self.dtype: np.dtype[Any] = torch.empty(0, dtype=parameters.dtype).numpy().dtype
        except TypeError:
            raise InvalidInputError(
                f"The model is {parameters.dtype}, which NumPy arrays cannot hold: convert it to float32."
            ) from None
        self._width = parameters.numel
        reference = Reference.to(fitted, client)
        self._settings = Settings(reference, influence_function_model.on_failure, parameters.device)

    def _check_solvable(self) -> None:
        if not solves_alone(self.influence_function_model.fitted):
            raise InvalidInputError(
                "The curvature is summed on the cluster, whose workers cannot solve with it while they work on "
                "chunks: use inf.attribute(model, test, train, executor='dask'), or influences_from_factors "
                "with the model's own influence_factors."
            )

    def influence_factors(
        self, x: da.Array, y: da.Array, *, measurement: Measurement | None = None
    ) -> da.Array:
        """``(C + λI)⁻¹ ∇ℓ(z)`` of every point, ``(n, P)``, chunked like ``x`` over samples.

        Args:
            x: Inputs; the first dimension counts samples.
            y: Their targets, chunked alike.
            measurement: In place of the loss, as the model's own method takes it.

        Raises:
            InvalidInputError: Chunks that cannot work, with the remedy.
        """
        self._check_solvable()
        check_points(x, y, self.dtype, "x", "y")
        self._check_room((max(x.chunks[0]), self._width), "x and y")
        solved = self._solved(solve_factors, x, y, measurement, "influence-factors", 0)
        return da.Array(solved.graph, solved.name, (x.chunks[0], (self._width,)), dtype=self.dtype)

    def influences(
        self,
        x_test: da.Array,
        y_test: da.Array,
        x: da.Array | None = None,
        y: da.Array | None = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
    ) -> da.Array:
        """Scores of every training point ``(x, y)`` for every test point, chunked over both.

        Args:
            x_test: Inputs of the test points; the first dimension counts them.
            y_test: Their targets, chunked alike.
            x: Inputs of the training points; with ``y`` left out too, the test points stand in.
            y: Their targets, chunked alike.
            mode: A member of :class:`InfluenceMode` or its value.
            measurement: Of the test points, in place of their loss.

        Returns:
            ``(n_test, n_train)`` in mode Up, ``(n_test, n_train, *features)`` in mode Perturbation.

        Raises:
            InvalidInputError: Chunks that cannot work, with the remedy.
        """
        mode = InfluenceMode.parse(mode)
        self._check_solvable()
        check_points(x_test, y_test, self.dtype, "x_test", "y_test")
        if (x is None) != (y is None):
            raise InvalidInputError("Pass both x and y, or neither to score the test points on each other.")
        if x is None or y is None:
            x, y = x_test, y_test
        check_points(x, y, self.dtype, "x", "y")
        sizes = x_test.chunks[0]
        if mode is InfluenceMode.Perturbation:
            factors = self._solved(solve_factors, x_test, y_test, measurement, "influence-factors", 0)
            return self._pairs(score_factors, factors, sizes, x, y, mode)
        held = self._solved(solve, x_test, y_test, measurement, "influence-solve")
        return self._pairs(score, held, sizes, x, y, mode, points_at_once(self.influence_function_model.fitted))

    def influences_from_factors(
        self,
        z_test_factors: da.Array,
        x: da.Array,
        y: da.Array,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> da.Array:
        """Scores of training points from factors computed earlier.

        Args:
            z_test_factors: Rows of :meth:`influence_factors`, ``(m, P)``, in chunks of whole rows.
            x: Inputs of the training points.
            y: Their targets, chunked alike.
            mode: A member of :class:`InfluenceMode` or its value.

        Returns:
            ``(m, n)`` in mode Up, ``(m, n, *features)`` in mode Perturbation.

        Raises:
            InvalidInputError: Chunks that cannot work, with the remedy.
        """
        mode = InfluenceMode.parse(mode)
        check_factor_chunks(z_test_factors, self._width, self.dtype)
        check_points(x, y, self.dtype, "x", "y")
        factors = Layers(z_test_factors.name, z_test_factors.dask)
        budget = self.influence_function_model.fitted.problem.memory_budget
        room = budget // (2 * self._width * self.dtype.itemsize) if mode is InfluenceMode.Up else 1
        return self._pairs(score_factors, factors, z_test_factors.chunks[0], x, y, mode, room)

    def arrays(self, loader: Any) -> tuple[da.Array, da.Array]:
        """Inputs and targets of a ``DataLoader``, one chunk a batch, read by the workers where they are needed.

        Raises:
            InvalidInputError: The loader shuffles, has no map-style dataset, or batches other than two tensors.
        """
        return from_loader(loader, self.client)

    def compute(self, array: da.Array, *, progress: bool = True) -> np.ndarray[Any, np.dtype[Any]]:
        """The array's numbers, with a bar that counts its chunks; Dask's dashboard shows every task."""
        return computed(array, self.client, progress)

    def _solved(
        self,
        work: Callable[..., Any],
        x: da.Array,
        y: da.Array,
        measurement: Measurement | None,
        label: str,
        *inner: int,
    ) -> Layers:
        """``work`` on every chunk of points: each of them is solved for once."""
        measured(self.influence_function_model.fitted.problem, measurement)  # refuses what is none
        points = chunks_of(x, y)
        name = f"{label}-{tokenize(self._settings, points.name, measurement)}"
        layer = {
            (name, i, *inner): (work, self._settings, (points.name, i), start, measurement)
            for i, start in enumerate(_starts(x))
        }
        return Layers.on(name, layer, points)

    def _pairs(
        self,
        work: Callable[..., Any],
        test: Layers,
        sizes: tuple[int, ...],
        x: da.Array,
        y: da.Array,
        mode: InfluenceMode,
        room: int = 1,
    ) -> da.Array:
        """``work`` on chunks of at most ``room`` test points together, or on one, with every chunk of ``x``.

        What goes together is scored as one, and then cut again.
        """
        points = chunks_of(x, y)
        features = x.shape[1:] if mode is InfluenceMode.Perturbation else ()
        zeros = (0,) * len(features)
        factors = work is score_factors
        self._check_room((max(sizes), max(x.chunks[0]), *features), "test points, or x and y,")
        groups = self._groups(sizes, x, room)
        counts = tuple(sum(sizes[i] for i in group) for group in groups)
        name = f"influence-scores-{tokenize(self._settings, test.name, points.name, mode, counts)}"
        layer = {
            (name, g, j, *zeros): (
                work,
                self._settings,
                [(test.name, i, 0) if factors else (test.name, i) for i in group],
                (points.name, j),
                start,
                mode if factors else counts[g],
            )
            for j, start in enumerate(_starts(x))
            for g, group in enumerate(groups)
        }
        chunks = (counts, x.chunks[0], *((size,) for size in features))
        scores = da.Array(Layers.on(name, layer, test, points).graph, name, chunks, dtype=self.dtype)
        return scores if counts == sizes else scores.rechunk({0: sizes}, method="tasks")

    def _check_room(self, shape: tuple[int, ...], what: str) -> None:
        """Raise :class:`InvalidInputError` for a chunk of a result that no worker has memory for."""
        workers = {} if self.client is None else self.client.scheduler_info()["workers"]
        limits = [worker["memory_limit"] or inf for worker in workers.values()]
        needed = prod(shape) * self.dtype.itemsize
        if needed > max(limits, default=inf):
            raise InvalidInputError(
                f"A chunk of the result would be {' x '.join(map(str, shape))} of {self.dtype}, "
                f"{needed / 1e9:.3g} GB, and no worker has more than {max(limits) / 1e9:.3g} GB of memory: cut "
                f"the {what} into smaller chunks over samples."
            )

    def _groups(self, sizes: tuple[int, ...], x: da.Array, room: int) -> list[list[int]]:
        """Consecutive chunks of at most ``room`` test points together, or one alone; enough for all workers."""
        budget = self.influence_function_model.fitted.problem.memory_budget
        room = min(room, budget // (4 * self.dtype.itemsize * max(x.chunks[0])))
        threads = 1 if self.client is None else sum(self.client.nthreads().values())
        room = min(room, ceil(sum(sizes) / ceil(TASKS_EACH * threads / x.numblocks[0])))
        groups: list[list[int]] = []
        held = 0
        for i, size in enumerate(sizes):
            if not groups or held + size > room:
                groups.append([])
                held = 0
            groups[-1].append(i)
            held += size
        return groups


def _starts(array: da.Array) -> list[int]:
    """The first sample of every chunk."""
    return [0, *accumulate(array.chunks[0])][:-1]
