"""Loaders as blocks of a fixed number of samples, each sample with its identifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from influence_framework.data import (
    Batch,
    Joiner,
    check_reiterable,
    detached,
    in_one_batch,
    leaves,
    one_pass,
    random_state,
    take,
)
from influence_framework.errors import InvalidInputError

Identifiers = np.ndarray[Any, np.dtype[Any]]
"""One identifier for each sample: integers or strings."""

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Block:
    """Some consecutive samples of a loader.

    Attributes:
        start: Position of the first one.
        batches: ``(x, y)``, as few as their shapes allow.
        ids: Their identifiers; their positions where the loader gives none.
    """

    start: int
    batches: tuple[Batch, ...]
    ids: Identifiers

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def columns(self) -> slice:
        """Their positions."""
        return slice(self.start, self.start + len(self))

    def pieces(self, count: int) -> Iterator[Block]:
        """The same samples as at most ``count`` blocks of about the same size."""
        if count <= 1:
            yield self
            return
        size = ceil(len(self) / count)
        start, waiting, seen = self.start, [], 0
        for batch in self.batches:
            length = len(next(leaves(batch)))
            waiting.append((batch, self.ids[seen : seen + length]))
            seen += length
        left = len(self)
        while left:
            piece, waiting = _cut(waiting, min(size, left))
            yield Block(start, *piece)
            start += size
            left -= len(piece[1])


def blocks(loader: Iterable[Any], size: int) -> Iterator[Block]:
    """One pass over ``loader`` in blocks of ``size`` samples, the last one smaller.

    Batches are ``(x, y)``, ``(x, y, ids)`` or fields, which stand for ``(fields, None)``. Without
    identifiers the position of a sample stands for it, which
    means something only where every pass has the same order.

    Raises:
        InvalidInputError: A batch is neither, or identifiers and samples differ in number, or the loader
            shuffles and gives no identifiers.
    """
    check_reiterable(loader)
    waiting: list[tuple[Batch, Identifiers]] = []
    held = start = seen = 0
    for raw in one_pass(loader, random_state(loader)):
        batch, ids = _identified(detached(raw), seen, loader)
        waiting.append((batch, ids))
        held += len(ids)
        seen += len(ids)
        while held >= size:
            block, waiting = _cut(waiting, size)
            yield Block(start, *block)
            start += size
            held -= size
    if held:
        block, _ = _cut(waiting, held)
        yield Block(start, *block)


def _identified(raw: Any, seen: int, loader: Iterable[Any]) -> tuple[Batch, Identifiers]:
    if isinstance(raw, Mapping):
        raw = (raw, None)
    if not isinstance(raw, tuple | list) or len(raw) not in (2, 3):
        got = f"{len(raw)} parts" if isinstance(raw, tuple | list) else type(raw).__name__
        raise InvalidInputError(
            f"Expected batches (x, y) or (x, y, identifiers), got {got}.{in_one_batch(raw)}"
        )
    batch = (raw[0], raw[1])
    count = len(next(leaves(batch)))
    if len(raw) == 2:
        if shuffles(loader):
            raise InvalidInputError(
                "The loader shuffles, so that the position of a sample says nothing about which it is: pass "
                "shuffle=False, or yield batches (x, y, identifiers)."
            )
        return batch, np.arange(seen, seen + count)
    ids = raw[2].cpu().numpy() if isinstance(raw[2], Tensor) else np.asarray(raw[2])
    if ids.shape != (count,) or ids.dtype.kind not in "iuU":
        raise InvalidInputError(
            f"Identifiers are integers or strings, one for each of the {count} samples of a batch; got shape "
            f"{ids.shape} of {ids.dtype}."
        )
    return batch, ids


def shuffles(loader: Iterable[Any]) -> bool:
    """Whether a ``DataLoader`` is known to draw its order at random."""
    samplers = (
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    return any(
        isinstance(sampler, RANDOM) or getattr(sampler, "shuffle", False) is True for sampler in samplers
    )


def _cut(
    waiting: Sequence[tuple[Batch, Identifiers]], size: int
) -> tuple[tuple[tuple[Batch, ...], Identifiers], list[tuple[Batch, Identifiers]]]:
    """The first ``size`` samples, and what is left."""
    taken, ids_taken = Joiner(size), []
    rest: list[tuple[Batch, Identifiers]] = []
    missing = size
    for batch, ids in waiting:
        here = min(missing, len(ids))
        missing -= here
        if here:
            taken.add(take(batch, slice(0, here)), here)
            ids_taken.append(ids[:here])
        if here < len(ids):
            rest.append((take(batch, slice(here, len(ids))), ids[here:]))
    return (tuple(taken.finish()), np.concatenate(ids_taken)), rest
