"""The curvature of one batch at fixed parameters, ready to be applied to any number of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import PushForward, pull_back, rows_at_once
from influence_framework.memory import GRAPH
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem

Product: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor | None]]
"""A symmetric matrix: from ``k`` stacked tangents of some leaves to as many cotangents, ``None`` where zero."""

Curve: TypeAlias = Callable[[Problem, Tensor, Sequence[Tensor], Batch], Product]
"""From a batch's outputs, part of a graph, to the curvature of its mean loss with respect to some leaves."""


class Linearization(ABC):
    """The curvature of one batch, whose forward pass is done: every further row costs only its own products.

    Attributes:
        row_bytes: What a product takes for one row.
    """

    row_bytes: int

    def add(
        self, product: Float[Tensor, "k P"], rows: Float[Tensor, "k P"], weight: float, budget: int
    ) -> None:
        """Add ``weight · C_b · rows`` to ``product``, as many rows at a time as pays."""
        workspace = Workspace()
        for part in rows_in_parts(rows, self.row_bytes, budget):
            product[part].add_(self.apply(rows[part], workspace), alpha=weight)

    @abstractmethod
    def apply(self, rows: Float[Tensor, "k P"], workspace: Workspace) -> Float[Tensor, "k P"]:
        """The product of this batch's curvature (of its mean loss) with ``k`` rows."""


class Workspace:
    """Memory that one part of the rows leaves to the next: fresh memory costs as much as writing to it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of that shape, on what was last held under the name where that is large enough."""
        size = prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)


def rows_in_parts(rows: Float[Tensor, "k P"], row_bytes: int, budget: int) -> Iterator[slice]:
    """Slices of as many rows as pay to be worked on together."""
    step = rows_at_once(rows.device, row_bytes, budget)
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


class GraphLinearization(Linearization):
    """The autograd graphs of one batch, for any model that can be differentiated twice."""

    def __init__(self, problem: Problem, parameters: ParameterSpace, curve: Curve, batch: Batch) -> None:
        problem.require_second_derivatives()
        self.parameters = parameters
        # A second backward pass makes about as many tensors as the first, and that as the forward pass.
        self.row_bytes = GRAPH * problem.sample_bytes * problem.objective.size(batch)
        leaves = parameters.leaves(problem.model)
        with torch.enable_grad():
            outputs = problem.outputs(leaves, batch)
            self.product = curve(problem, outputs, list(leaves.values()), batch)

    def apply(self, rows: Float[Tensor, "k P"], workspace: Workspace) -> Float[Tensor, "k P"]:
        return self.parameters.gather_rows(self.product(self.parameters.unflatten_rows(rows)), rows)


def sandwich(outputs: Tensor, leaves: Sequence[Tensor], middle: Callable[[Tensor], Tensor | None]) -> Product:
    """``Jᵀ H J`` with ``J`` the Jacobian of ``outputs`` with respect to ``leaves`` and ``H`` the ``middle``."""
    forward = PushForward(outputs, leaves)

    def product(rows: Sequence[Tensor]) -> list[Tensor | None]:
        tangents = forward(rows)
        cotangents = None if tangents is None else middle(tangents)
        if cotangents is None:
            return [None] * len(leaves)
        return pull_back([outputs], leaves, [cotangents])

    return product
