"""What units of work take here, with one problem: each measured on a few samples when it is first asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from influence_framework.costs import Work
from influence_framework.data import take
from influence_framework.gradients import Factors, contract_up, sample_gradients
from influence_framework.layers import Layer, LayerBatch
from influence_framework.problem import Problem
from influence_framework.protocols import Diagonal, HessianSource, LayerStatistics, LinearOperator, Minibatches

DIAGONAL = 64
"""Samples whose diagonal is timed: of fewer, what a batch costs by itself would be most of it."""

SEVERAL = 12
"""Columns of the product that is timed beside that of one."""

POINTS = 32
"""Samples whose gradients are timed."""

FACTOR_BYTES = 64 * 2**20
"""What random factors may take for a timing."""

MATRIX = 640
"""Size of the matrices whose product is timed."""

EIGH = (16, 64, 256)
"""Sizes of the matrices that are decomposed."""

LONG = 0.2
"""Seconds from which on a run is not repeated."""

COPIED = 2**25
"""Bytes that are copied."""


def seconds(work: Callable[[], object], device: torch.device, times: int = 2) -> float:
    """The least time of several runs, or of those until one was long enough: what else happens adds to it."""
    found: list[float] = []
    while len(found) < times and (not found or min(found) < LONG):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


@dataclass(frozen=True, eq=False)
class Rates:
    """Seconds of :class:`Work` with one curvature, from what its units take on a few samples.

    Attributes:
        problem: All data.
        few: Some of its samples.
        source: The curvature.
        operator: Of all data.
        sample: Of these samples, which was multiplied before.
        draws: Of whatever random numbers there are.
    """

    problem: Problem
    few: Problem
    source: HessianSource
    operator: LinearOperator
    sample: LinearOperator
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_generator", torch.Generator("cpu").manual_seed(self.seed))

    def seconds(self, work: Work) -> float:
        """What the work takes, once the graphs of the data are there."""
        total = sum(count * self._product(columns) for count, columns in work.products)
        total += sum(count * self._minibatch(columns) for count, columns in work.minibatches)
        if work.passes:
            total += work.passes * self._pass
        if work.diagonals:
            total += work.diagonals * self._diagonal
        total += work.flops / self._flops + work.traffic / self._bandwidth
        return total + sum(self._eigh(size) for size in work.eigh)

    @property
    def _device(self) -> torch.device:
        return self.operator.device

    @property
    def _scale(self) -> float:
        return self.problem.size / self.few.size

    def _random(self, count: int) -> Tensor:
        columns = torch.randn(self.operator.shape[0], count, generator=self._generator, device="cpu")
        return columns.to(self._device, self.operator.dtype)

    @cached_property
    def _products(self) -> tuple[float, float]:
        """Seconds of a product with the few samples: of the first column, and of each further one."""
        one, several = self._random(1), self._random(SEVERAL)
        first = seconds(lambda: self.sample @ one, self._device, 3)
        all_of_them = seconds(lambda: self.sample @ several, self._device)
        return first, max(0.0, all_of_them - first) / (SEVERAL - 1)

    def _product(self, columns: float) -> float:
        first, further = self._products
        again = 0.0 if self.keeps_graphs else self._linearized
        return self._scale * (first + further * max(0.0, columns - 1)) + again

    @property
    def keeps_graphs(self) -> bool:
        return bool(getattr(self.operator, "keeps_graphs", True))

    @cached_property
    def _linearized(self) -> float:
        """Seconds until the graphs of all data are there."""
        fresh = self.source.operator(self.few, self.few.parameters)
        if isinstance(fresh, LayerStatistics):
            fresh.cover()
        one = self._random(1)
        cold = seconds(lambda: fresh @ one, self._device, 1)
        return self._scale * max(0.0, cold - self._products[0])

    @property
    def graphs(self) -> float:
        """What the first product takes beyond a later one."""
        return self._linearized if self.keeps_graphs else 0.0

    @cached_property
    def _minibatches(self) -> tuple[float, float]:
        if not isinstance(self.sample, Minibatches):
            return self._products
        stream = self.sample.minibatches(torch.Generator("cpu").manual_seed(self.seed))
        batch = next(stream)
        ratio = min(self.problem.batch_size, self.problem.size) / min(self.few.batch_size, self.few.size)
        one, several = self._random(1), self._random(SEVERAL)
        first = ratio * seconds(lambda: batch @ one, self._device, 3)
        all_of_them = ratio * seconds(lambda: batch @ several, self._device)
        return first, max(0.0, all_of_them - first) / (SEVERAL - 1)

    def _minibatch(self, columns: float) -> float:
        first, further = self._minibatches
        return first + further * max(0.0, columns - 1)

    @cached_property
    def _pass(self) -> float:
        """Of a pass for inputs and output gradients of layers, with one draw."""
        assert isinstance(self.sample, LayerStatistics)
        sample, layers = self.sample, self.sample.cover().layers

        def work() -> None:
            sample.layer_sums(layers, 1, torch.Generator("cpu").manual_seed(self.seed), _read)

        return self._scale * seconds(work, self._device)

    @cached_property
    def _diagonal(self) -> float:
        few = self.few.first(DIAGONAL)
        operator = self.source.operator(few, few.parameters)
        assert isinstance(operator, Diagonal)
        return self.problem.size / few.size * seconds(operator.diagonal, self._device)

    @cached_property
    def _flops(self) -> float:
        """Flops a second."""
        dtype = self.operator.dtype if self.operator.dtype.itemsize >= 4 else torch.float32
        matrix = torch.randn(MATRIX, MATRIX, generator=self._generator, device="cpu").to(self._device, dtype)
        return 2.0 * MATRIX**3 / seconds(lambda: matrix @ matrix, self._device, 3)

    @cached_property
    def _bandwidth(self) -> float:
        """Bytes read and written a second."""
        block = torch.zeros(COPIED // 4, device=self._device)
        return 2 * COPIED / seconds(block.clone, self._device, 3)

    @cached_property
    def _decompositions(self) -> Mapping[int, float]:
        found = {}
        for size in EIGH:
            half = torch.randn(size, size, generator=self._generator, dtype=torch.float64, device="cpu")
            matrix = (half + half.T).to(self._device)
            found[size] = seconds(partial(torch.linalg.eigh, matrix), self._device)
        return found

    def _eigh(self, size: int) -> float:
        """By powers of the size between those measured, by its cube beyond."""
        found = self._decompositions
        if size <= EIGH[0]:
            return found[EIGH[0]]
        for low, high in pairwise(EIGH):
            if size <= high:
                share = (torch.tensor(size / low).log() / torch.tensor(high / low).log()).item()
                return found[low] ** (1 - share) * found[high] ** share
        return found[EIGH[-1]] * (size / EIGH[-1]) ** 3

    @cached_property
    def _points(self) -> tuple[object, int]:
        batch, size = next(self.few.batches())
        count = min(size, POINTS)
        return take(batch, slice(0, count)), count

    @cached_property
    def gradient(self) -> float:
        """Of a sample's gradient."""
        batch, count = self._points
        return seconds(lambda: sample_gradients(self.few, self.few.parameters, batch), self._device) / count

    def contraction(self, columns: int) -> float:
        """Of the products of a sample's gradient with so many factors."""
        element = torch.empty(0, dtype=self.operator.dtype).element_size()
        held = min(columns, max(1, FACTOR_BYTES // (self.operator.shape[0] * element)))
        batch, count = self._points
        factors = {"all": Factors(self._random(held).T.contiguous())}
        return columns / held * seconds(lambda: contract_up(factors, self.few, batch), self._device) / count


def _read(passed: Iterator[tuple[Mapping[Layer, LayerBatch], int]]) -> Sequence[Tensor]:
    return [torch.tensor(float(sum(size for _, size in passed)), dtype=torch.float64, device="cpu")]
