"""A correct source that offers every capability, and the same with one fault each."""

from __future__ import annotations

import pickle
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from influence_framework.data import leaves
from influence_framework.operators import Operator, dense_by_columns
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import HessianSource, LinearOperator
from influence_framework.sources import GaussNewton, Hessian
from influence_framework.testing import ProductsOnly

PARTS: dict[Any, Tensor] = {}


@dataclass(frozen=True, eq=False)
class Curvature(Operator):
    """The Gauss-Newton matrix, formed of one operator of core a batch."""

    problem: Problem
    parameters: ParameterSpace

    positive_semidefinite = True
    source: ClassVar[HessianSource] = GaussNewton()

    @property
    def shape(self) -> tuple[int, int]:
        return (self.parameters.numel, self.parameters.numel)

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        return self.parameters.device

    def weight(self, size: int) -> float:
        return size / self.problem.size

    @cached_property
    def parts(self) -> list[tuple[Tensor, int]]:
        """The matrix of each batch's mean loss, and the number of its samples."""
        found = []
        for batch, size in self.problem.batches():
            found.append((self.part(batch).clone(), size))
        return found

    def part(self, batch: Any) -> Tensor:
        """Of one batch, formed once for all faults: nothing but the numbers of model and batch goes into it."""
        model, objective = self.problem.model, self.problem.objective
        tensors = [*model.state_dict().values(), *leaves(batch)]
        modes = [module.training for module in model.modules()]
        numbers = pickle.dumps([(str(t.dtype), t.tolist()) for t in tensors])
        loss = objective.loss
        means = (type(loss), loss.reduction) if isinstance(loss, nn.modules.loss._Loss) else (loss,)
        names = tuple(self.parameters.names)
        key = (self.source, repr(model), *means, objective.reduction, names, str(self.device), *modes, numbers)
        if key not in PARTS:
            problem = Problem.build(model, objective, [batch])
            PARTS[key] = dense_by_columns(self.source.operator(problem, self.parameters))
        return PARTS[key]

    def matrix(self) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype)
        for part, size in self.parts:
            total += self.weight(size) * part
        return total

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.matrix() @ columns

    def diagonal(self) -> Tensor:
        return self.matrix().diagonal().clone()

    def trace(self) -> float:
        return self.matrix().trace().item()

    def to_dense(self) -> Tensor:
        return self.matrix()

    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]:
        while True:
            for index in torch.randperm(len(self.parts), generator=generator).tolist():
                yield ProductsOnly(self.parts[index][0])


@dataclass(frozen=True)
class Source:
    """A correct source; a faulty one makes another kind of operator."""

    curvature: type[Curvature] = Curvature

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        return self.curvature(problem, parameters)


def by_name(parameters: ParameterSpace, seed: int) -> Tensor:
    """Numbers that belong to the parameters, whichever of them are asked for."""
    parts = []
    for name, size in zip(parameters.names, parameters.sizes, strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        parts.append(torch.randn(size, generator=generator, dtype=torch.float64))
    return torch.cat(parts).to(parameters.dtype)


class Skew(Curvature):
    @cached_property
    def parts(self) -> list[tuple[Tensor, int]]:
        u, v = by_name(self.parameters, 0), by_name(self.parameters, 1)
        skew = 1e-6 * (torch.outer(u, v) - torch.outer(v, u))
        return [(part + skew, size) for part, size in Curvature(self.problem, self.parameters).parts]


class LosesDtype(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns).double()


class SurplusAsZeros(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        product = super()._matmat(columns)
        product[:, len(columns) :] = 0.0
        return product


class VectorsAsColumns(Curvature):
    def __matmul__(self, columns: Tensor) -> Tensor:
        return super().__matmul__(columns[:, None] if columns.ndim == 1 else columns)


class BatchesUnweighted(Curvature):
    """Averaged over batches, whatever their sizes."""

    def weight(self, size: int) -> float:
        return 1 / len(self.parts)


class SumOfLosses(Curvature):
    @cached_property
    def parts(self) -> list[tuple[Tensor, int]]:
        parts = Curvature(self.problem, self.parameters).parts
        return [(self.problem.size * part, size) for part, size in parts]


class Unseeded(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        noise = torch.rand((), generator=generator, dtype=torch.float64).item()
        return super()._matmat(columns) * (1 + 1e-12 * noise)


class TorchDrawing(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        torch.rand(1)
        return super()._matmat(columns)


class PythonDrawing(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        random.random()
        return super()._matmat(columns)


class LeavesGradients(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        for parameter in self.problem.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return super()._matmat(columns)


class LeavesHooks(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        next(self.problem.model.children()).register_forward_hook(lambda *_: None)
        return super()._matmat(columns)


class CountsInBuffers(Curvature):
    """As BatchNorm does in train mode."""

    def _matmat(self, columns: Tensor) -> Tensor:
        for buffer in self.problem.model.buffers():
            if not buffer.is_floating_point():
                buffer += 1
        return super()._matmat(columns)


class SwitchesModes(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        list(self.problem.model.children())[-1].train()
        return super()._matmat(columns)


class ClaimsToBeSemidefinite(Curvature):
    source: ClassVar[HessianSource] = Hessian()


class DiagonalOfSquares(Curvature):
    def diagonal(self) -> Tensor:
        return self.matrix().square().sum(0).sqrt()


class TraceOfOneBatch(Curvature):
    def trace(self) -> float:
        return self.parts[0][0].trace().item()


class DenseOfOneBatch(Curvature):
    def to_dense(self) -> Tensor:
        return self.parts[0][0].clone()


@dataclass(frozen=True, eq=False)
class HandsOutItsMemory(Curvature):
    kept: list[Tensor] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        self.kept.append(self.matrix())
        return self.kept[0]


class SummedMinibatches(Curvature):
    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]:
        for batch in super().minibatches(generator):
            yield ProductsOnly(dense_by_columns(batch) * 5)


class MinibatchesWithReplacement(Curvature):
    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]:
        while True:
            index = int(torch.randint(len(self.parts), (), generator=generator))
            yield ProductsOnly(self.parts[index][0])


class MinibatchesFromGlobalState(Curvature):
    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]:
        return super().minibatches(torch.Generator().manual_seed(torch.seed()))


class ModelOrder(Curvature):
    """The parameters in the order of the model, not of the block."""

    @cached_property
    def parts(self) -> list[tuple[Tensor, int]]:
        names = [name for name in self.problem.parameters.names if name in self.parameters.names]
        return Curvature(self.problem, self.problem.parameters.subset(names)).parts


class PerParameterOfTheModel(Curvature):
    """Divided by the number of all parameters, frozen ones included, and multiplied by that of the others."""

    def weight(self, size: int) -> float:
        every = sum(parameter.numel() for parameter in self.problem.model.parameters())
        return super().weight(size) * self.problem.parameters.numel / every


class WritesToItsInput(Curvature):
    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns.div_(3.0).mul_(3.0))


class WithoutEquality:
    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        return Curvature(problem, parameters)

    def __repr__(self) -> str:
        return "WithoutEquality()"


FAULTS: dict[str, list[Any]] = {
    "symmetric": [Source(Skew)],
    "shape_dtype_and_device": [Source(LosesDtype)],
    "products_are_columnwise": [Source(SurplusAsZeros)],
    "vectors_and_no_columns": [Source(VectorsAsColumns)],
    "batches_do_not_matter": [Source(BatchesUnweighted)],
    "mean_not_sum": [Source(SumOfLosses)],
    "deterministic": [Source(Unseeded)],
    "global_random_state_untouched": [Source(TorchDrawing), Source(PythonDrawing)],
    "model_left_as_found": [
        Source(LeavesGradients),
        Source(LeavesHooks),
        Source(CountsInBuffers),
        Source(SwitchesModes),
    ],
    "positive_semidefinite_is_true": [Source(ClaimsToBeSemidefinite)],
    "diagonal_is_exact": [Source(DiagonalOfSquares)],
    "trace_is_close": [Source(TraceOfOneBatch)],
    "dense_is_exact": [Source(DenseOfOneBatch), Source(HandsOutItsMemory)],
    "minibatches_average_to_it": [
        Source(SummedMinibatches),
        Source(MinibatchesWithReplacement),
        Source(MinibatchesFromGlobalState),
    ],
    "blocks_are_principal_submatrices": [Source(ModelOrder)],
    "frozen_parameters_are_left_out": [Source(PerParameterOfTheModel)],
    "columns_not_written_to": [Source(WritesToItsInput)],
    "options_make_an_equal_instance": [WithoutEquality()],
}
