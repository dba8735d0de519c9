"""Scores from layer inputs and output gradients, for inverses that need no per-sample gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.layers import Layer, layer_batch, samples_at_once, true_gradients
from influence_framework.memory import in_pieces
from influence_framework.problem import Problem
from influence_framework.protocols import (
    InverseOperator,
    LayerScoring,
    LayerStatistics,
    LinearOperator,
    Weighing,
)

R = TypeVar("R")

Sides = Mapping[str, Any]
"""By block, what its inverse made of some samples."""


def suits(operators: Mapping[str, LinearOperator], inverses: Mapping[str, InverseOperator]) -> bool:
    """Whether every block can be scored this way."""
    return all(
        isinstance(inverse, LayerScoring)
        and inverse.scores_layers
        and isinstance(operators[name], LayerStatistics)
        for name, inverse in inverses.items()
    )


class LayerScorer:
    """Scores by block, from one pass over the model for all blocks.

    Args:
        problem: Model and objective.
        operators: Of every block, each with ``LayerStatistics``.
        inverses: Of every block, each with ``LayerScoring``.
    """

    def __init__(
        self,
        problem: Problem,
        operators: Mapping[str, LinearOperator],
        inverses: Mapping[str, InverseOperator],
    ) -> None:
        self.problem = problem
        self.inverses = cast("Mapping[str, LayerScoring]", inverses)
        self.layers: dict[str, Sequence[Layer]] = {
            name: cast(LayerStatistics, operator).cover().layers for name, operator in operators.items()
        }

    def scores(
        self,
        test: Batch,
        train: Batch,
        at: Sequence[Mapping[str, InverseOperator]] | None = None,
        problems: Sequence[Problem] | None = None,
    ) -> list[dict[str, Float[Tensor, "m n"]]]:
        """``g_mᵀ (C + λI)⁻¹ g_n`` of every pair by block, with the inverses ``at`` each of several λ.

        ``problems`` are those whose losses are differentiated for the test and for the training points.
        """
        of_test, of_train = problems or (self.problem, self.problem)
        chosen = [self.inverses] if at is None else cast("Sequence[Mapping[str, LayerScoring]]", at)
        size = self.problem.objective.size
        # Filled piece by piece: parts that are put together at the end would take as much again.
        found: list[dict[str, Tensor]] = [{} for _ in chosen]
        row = 0
        for held, rows in self._held(test, of_test, weigh=at is None):
            place = slice(row, row + rows)
            self._fill(found, place, size(test), held, train, chosen, of_train)
            # Else it were held until the next ones have been worked out.
            del held
            row += rows
        return found

    def with_held(self, held: Sides, rows: int, train: Batch) -> dict[str, Float[Tensor, "m n"]]:
        """Scores of every sample of ``train`` with the ``rows`` that ``held`` was made of, by block."""
        found: list[dict[str, Tensor]] = [{}]
        self._fill(found, slice(0, rows), rows, held, train, [self.inverses])
        return found[0]

    def _fill(
        self,
        found: Sequence[dict[str, Tensor]],
        rows: slice,
        height: int,
        held: Sides,
        train: Batch,
        chosen: Sequence[Mapping[str, LayerScoring]],
        problem: Problem | None = None,
    ) -> None:
        """Write the scores of ``held`` with ``train`` into ``rows`` of matrices that are ``height`` high."""
        width, column = self.problem.objective.size(train), 0

        def work(piece: Batch) -> list[dict[str, Tensor]]:
            sides = self._sides(piece, problem or self.problem)
            return [{name: i.scores(held[name], sides[name]) for name, i in at.items()} for at in chosen]

        for columns, parts in self._pieces(train, work, self._at_once(nbytes(held))):
            place = rows, slice(column, column + columns)
            for part, scores in zip(parts, found, strict=True):
                for name, of_block in part.items():
                    if name not in scores:
                        scores[name] = of_block.new_empty(height, width)
                    scores[name][place] = of_block
            column += columns

    def self_scores(self, batch: Batch) -> dict[str, Float[Tensor, " n"]]:
        """``gᵀ (C + λI)⁻¹ g`` of every sample with itself, by block."""

        def work(piece: Batch) -> dict[str, Tensor]:
            sides = self._sides(piece, self.problem)
            return {name: inverse.self_scores(sides[name]) for name, inverse in self.inverses.items()}

        parts = [part for _, part in self._pieces(batch, work, self._at_once())]
        return {name: torch.cat([part[name] for part in parts]) for name in self.inverses}

    def prepared(
        self, batch: Batch, problem: Problem | None = None, *, weigh: bool = True
    ) -> Iterator[tuple[int, Sides]]:
        """The test side in pieces that memory allows: samples of each, and what scores need of them.

        With ``weigh``, of scores at the inverses' own λ alone.
        """

        def work(piece: Batch) -> Sides:
            sides = self._sides(piece, problem or self.problem)
            if not weigh:
                return sides
            return {
                name: inverse.weighed(sides[name]) if isinstance(inverse, Weighing) else sides[name]
                for name, inverse in self.inverses.items()
            }

        yield from self._pieces(batch, work, self._at_once(self._room))

    @property
    def _room(self) -> int:
        """Bytes for what is held of the test side: the rest of the budget is for work on the training side."""
        return 3 * self.problem.memory_budget // 4

    def _at_once(self, held: int = 0) -> int:
        """Samples to bring into matrix form together, where so many bytes of the budget are taken."""
        every = [layer for layers in self.layers.values() for layer in layers]
        budget = max(self.problem.memory_budget - held, self.problem.memory_budget - self._room)
        return samples_at_once(replace(self.problem, memory_budget=budget), layers=every)

    def _pieces(self, batch: Batch, work: Callable[[Batch], R], at_once: int) -> Iterator[tuple[int, R]]:
        """``work`` of the batch in pieces that memory allows, each with its number of samples."""
        size_of = self.problem.objective.size
        for piece, found in in_pieces(self.problem.room, batch, size_of, at_once, work):
            yield size_of(piece), found

    def combined(self, found: Sequence[Sides]) -> Sides:
        """What scores need of several pieces together."""
        if len(found) == 1:
            return found[0]
        return {name: i.join([sides[name] for sides in found]) for name, i in self.inverses.items()}

    def _sides(self, batch: Batch, problem: Problem) -> dict[str, Any]:
        every = [layer for layers in self.layers.values() for layer in layers]
        found = layer_batch(problem, every, batch, partial(checked_gradients, problem))
        size = self.problem.objective.size(batch)
        return {
            name: inverse.side({x.name: found[x] for x in self.layers[name] if x in found}, size)
            for name, inverse in self.inverses.items()
        }

    def _held(self, batch: Batch, problem: Problem, *, weigh: bool) -> Iterator[tuple[Sides, int]]:
        """The samples of one side with their number, as many at a time as three quarters of the budget hold."""
        found: list[Sides] = []
        held = count = 0
        for samples, sides in self.prepared(batch, problem, weigh=weigh):
            size = nbytes(sides)
            if found and held + size > self._room:
                yield self._taken(found), count
                held = count = 0
            found.append(sides)
            del sides
            held += size
            count += samples
        yield self._taken(found), count

    def _taken(self, found: list[Sides]) -> Sides:
        """What scores need of several pieces together, which are not held beside it while it is used."""
        joined = self.combined(found)
        found.clear()
        return joined


def nbytes(sides: Sides) -> int:
    """Memory that ``sides`` hold."""
    return sum(side.nbytes for side in sides.values())


def checked_gradients(problem: Problem, outputs: Tensor, batch: Batch) -> Tensor:
    """Gradients of the losses in the outputs, of points whose outputs nobody has looked at yet."""
    problem.judged(outputs, batch, "points")
    return true_gradients(problem)(outputs, batch)
