"""Curvature as a sum over parts of the data, each held by a worker: fits as a map and a reduction."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from math import ceil
from typing import Any, ClassVar

import dask
import dask.array as da
import torch
from dask.base import compute
from distributed import Client, Future, futures_of
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from influence_framework.data import Batch, LeftOut, random_state_kept, split
from influence_framework.errors import InvalidInputError
from influence_framework.layers import Cover, Layer, LayerBatch, Samples, cover
from influence_framework.operators import Operator, to_dense
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import (
    Dense,
    Diagonal,
    HessianSource,
    LayerStatistics,
    LinearOperator,
    Trace,
)
from influence_framework.specs import resolve
from influence_framework_dask.allocation import memory_kept
from influence_framework_dask.arrays import check_points, chunks_of, from_loader
from influence_framework_dask.executor import check_address, client_at
from influence_framework_dask.shipping import WORK, dumps, loads, ship
from influence_framework_dask.shipping import resolve as held_as
from influence_framework_dask.tasks import as_tensor, points_of

FAN_IN = 8
"""Partial sums that are added up at a time."""

Collect = Callable[[Iterator[tuple[Mapping[Layer, LayerBatch], int]]], Sequence[Tensor]]


class DaskBatches:
    """Dask arrays as training data: batches ``(x, y)``, chunk by chunk, for ``fit``.

    Args:
        x: Inputs; the first dimension counts samples.
        y: Their targets, chunked alike.

    Raises:
        InvalidInputError: Chunks that cannot work, with the remedy.
    """

    def __init__(self, x: da.Array, y: da.Array) -> None:
        check_points(x, y, None, "x", "y")
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.blocks, self.y.blocks, strict=True):
            first, second = compute(x, y)
            yield as_tensor(first), as_tensor(second)

    def __len__(self) -> int:
        return int(self.x.numblocks[0])


@dataclass(frozen=True)
class DaskSource:
    """The curvature of another source, summed over parts of the data that workers hold.

    ``C = Σ_p (n_p / N) C_p``, with ``C_p`` the curvature of the ``n_p`` samples of a part, worked out where
    these are. Products, the diagonal, the trace, the dense matrix and the statistics of layers (EK-FAC) are one
    task a part and a tree of sums, whose order is fixed; they are those of the source itself up to rounding.
    Pseudo-gradients that are drawn are drawn for each part by itself. A part that is lost with
    its worker is sent or read again.

    The parts are the chunks of :class:`DaskBatches` or the batches of a ``DataLoader`` that does not shuffle,
    read by the workers, where the data exceeds the model's memory budget; else what the fit holds in memory is
    divided among the workers.

    Attributes:
        source: Whose curvature, by name, by mapping with options, or as an instance.
        address: Of the scheduler; left out, the client that is in use.
        least: Data of fewer samples is summed in this process, as in the preflight.
    """

    source: Any = "gauss_newton"
    address: str | None = None
    least: int = 512

    def __post_init__(self) -> None:
        check_address(self.address)
        if not isinstance(self.least, int) or isinstance(self.least, bool) or self.least < 1:
            raise InvalidInputError(f"least must be a positive number of samples, got {self.least!r}.")

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The curvature with respect to ``parameters``.

        Raises:
            InvalidInputError: No client; or data that workers cannot read.
        """
        source: HessianSource = resolve("source", self.source)
        # Without its data the curvature cannot be summed anywhere, and what was saved of it needs no cluster.
        if problem.size < self.least or isinstance(problem.data, LeftOut):
            return source.operator(problem, parameters)
        client = client_at(self.address)
        example = source.operator(problem.first(2), parameters)
        offered = tuple(c for c in (Diagonal, Trace, Dense, LayerStatistics) if isinstance(example, c))
        skeleton = Skeleton(replace(problem, data=[], cached=True), parameters, source)
        parts = _parts(client, problem)
        made: LinearOperator = _class_of(offered)(
            problem,
            parameters,
            getattr(example, "positive_semidefinite", False),
            Sums(client, skeleton, ship(client, skeleton), parts),
        )
        return made


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What the curvature of a part takes beside its samples; and, on a worker, what was made of them.

    Attributes:
        problem: The whole problem, without data.
        parameters: What is differentiated with respect to.
        source: Which curvature.
        made: The operator of each part that this process has worked on.
    """

    problem: Problem
    parameters: ParameterSpace
    source: HessianSource
    made: dict[int, LinearOperator] = field(default_factory=dict)

    def part(self, index: int, points: Batch) -> tuple[LinearOperator, int]:
        """The curvature of one part and its number of samples."""
        device = self.problem.parameters.device
        batch = points_of(points, device)
        size = self.problem.objective.size(batch)
        if index not in self.made:
            data = list(split(batch, size, self.problem.max_batch))
            share = replace(self.problem, data=data, cached=True, size=size)
            self.made[index] = self.source.operator(share, self.parameters)
        return self.made[index], size


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the parts of the data.

    Attributes:
        client: Of the cluster that holds the parts.
        skeleton: Held, so that the workers hold it too.
        token: Its name there.
        parts: The samples of each, as futures.
    """

    client: Client | None
    skeleton: Skeleton | None
    token: str
    parts: Sequence[Future[Any]]

    def total(
        self, work: Callable[[LinearOperator, int, int], Sequence[Tensor]], what: str
    ) -> Sequence[Tensor]:
        """The sum over parts of ``work(C_p, n_p, p)``: as many tensors, of the same shapes, for every part.

        Tasks are shown under the name of ``what``.

        Raises:
            InvalidInputError: This is a worker.
        """
        if self.client is None:
            raise InvalidInputError(
                "This curvature is summed on the cluster, for the process that fitted the model: solve there, "
                "by the model's own methods or by inf.attribute."
            )
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
            sent = _submit(self.client, f"{what}-sent", _as_it_is, dumps(work)[0])
            sums = [
                _submit(self.client, what, _partial, self.token, index, part, sent)
                for index, part in enumerate(self.parts)
            ]
            while len(sums) > 1:
                groups = [sums[i : i + FAN_IN] for i in range(0, len(sums), FAN_IN)]
                sums = [_submit(self.client, f"{what}-sum", _added, group) for group in groups]
        found: Sequence[Tensor] = sums[0].result()
        return found

    def to(self, device: Any) -> Sums:
        """Itself: parts stay where they are."""
        return self

    def __reduce__(self) -> Any:
        return Sums, (None, None, self.token, ())


def _submit(client: Client, label: str, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A task that is shown under ``label``."""
    return client.submit(work, *arguments, key=f"influence-{label}-{uuid.uuid4().hex}", pure=False)


def _as_it_is(thing: Any) -> Any:
    return thing


def _partial(token: str, index: int, points: Batch, work: bytes) -> Sequence[Tensor]:
    with WORK, memory_kept(), random_state_kept():
        operator, size = held_as(token).part(index, points)
        return list(loads(work)(operator, size, index))


def _added(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [sum(same[1:], start=same[0].clone()) for same in zip(*parts, strict=True)]


@dataclass(frozen=True, eq=False)
class SummedOperator(Operator):
    """``C = Σ_p (n_p / N) C_p``.

    Attributes:
        problem: All data.
        parameters: What is differentiated with respect to.
        positive_semidefinite: Whether the source says so.
        sums: Over the parts.
    """

    problem: Problem
    parameters: ParameterSpace
    positive_semidefinite: bool
    sums: Sums

    divided: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return (self.parameters.numel, self.parameters.numel)

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        return self.parameters.device

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self._mean(partial(_times, columns), "product")

    def _mean(self, work: Callable[[Any], Tensor], what: str) -> Tensor:
        (total,) = self.sums.total(partial(_weighted, work), what)
        return total.to(self.device) / self.problem.size


def _weighted(work: Callable[[Any], Tensor], operator: Any, size: int, index: int) -> list[Tensor]:
    return [work(operator) * size]


def _times(columns: Tensor, operator: Any) -> Tensor:
    found: Tensor = operator @ columns
    return found


def _diagonal(operator: Any) -> Tensor:
    found: Tensor = operator.diagonal()
    return found


def _trace(operator: Any) -> Tensor:
    return torch.tensor(operator.trace(), dtype=torch.float64)


class _WithDiagonal(SummedOperator):
    def diagonal(self) -> Float[Tensor, " P"]:
        """The sum of the parts' diagonals."""
        return self._mean(_diagonal, "diagonal")


class _WithTrace(SummedOperator):
    def trace(self) -> float:
        """The sum of the parts' traces."""
        return float(self._mean(_trace, "trace"))


class _WithDense(SummedOperator):
    def to_dense(self) -> Float[Tensor, "P P"]:
        """The sum of the parts' matrices."""
        return self._mean(to_dense, "matrix")


class _WithLayerStatistics(SummedOperator):
    def cover(self) -> Cover:
        """The layers whose gradients have a matrix form, and the parameters outside them."""
        return self._cover

    @cached_property
    def _cover(self) -> Cover:
        return cover(self.problem, self.parameters)

    def layer_sums(
        self, layers: Sequence[Layer], samples: Samples, generator: torch.Generator, collect: Collect
    ) -> Sequence[Tensor]:
        """Sums over inputs and output gradients of ``layers``; see :class:`LayerStatistics`."""
        # Draws of the parts must not repeat each other's.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        found = self.sums.total(partial(_layer_sums, tuple(layers), samples, seed, collect), "layers")
        return [total.to(self.device) for total in found]


def _layer_sums(
    layers: Sequence[Layer], samples: Samples, seed: int, collect: Collect, operator: Any, size: int, index: int
) -> Sequence[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed + index)
    found: Sequence[Tensor] = operator.layer_sums(layers, samples, generator, collect)
    return found


OFFERS: Mapping[type[Any], type[SummedOperator]] = {
    Diagonal: _WithDiagonal,
    Trace: _WithTrace,
    Dense: _WithDense,
    LayerStatistics: _WithLayerStatistics,
}


@cache
def _class_of(offered: tuple[type[Any], ...]) -> type[SummedOperator]:
    """An operator that offers these capabilities and no others, which is told by its methods."""
    return type("SummedOperator", tuple(OFFERS[capability] for capability in offered) or (SummedOperator,), {})


def _parts(client: Client, problem: Problem) -> list[Future[Any]]:
    """The samples of each part, as tasks, so that those that are lost can be made again."""
    data = problem.data
    if not problem.cached:
        if isinstance(data, DataLoader):
            data = DaskBatches(*from_loader(data, client))
        if not isinstance(data, DaskBatches):
            raise InvalidInputError(
                f"The data exceeds memory_budget, {problem.memory_budget} bytes, and workers cannot read "
                f"{type(data).__name__} themselves: pass DaskBatches(x, y), a DataLoader without shuffling, "
                "or a larger budget."
            )
        return _chunks(client, data)
    workers = max(1, len(client.nthreads()))
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
        return [
            _submit(client, "data", loads, dumps(piece)[0])
            for piece in _pieces(problem, ceil(problem.size / workers))
        ]


def _pieces(problem: Problem, size: int) -> Iterable[Batch]:
    for batch, count in problem.batches():
        yield from split(batch, count, size)


def _chunks(client: Client, data: DaskBatches) -> list[Future[Any]]:
    layers = chunks_of(data.x, data.y)
    array = da.Array(layers.graph, layers.name, (data.x.chunks[0],), dtype=object)
    held = client.persist(array)
    by_key = {future.key: future for future in futures_of(held, client=client)}
    return [by_key[key] for key in held.__dask_keys__()]
