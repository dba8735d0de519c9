"""What is done on a worker with chunks of arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import distributed
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from influence_framework.attribution.blocks import Block
from influence_framework.attribution.queries import Preparation, Prepared
from influence_framework.data import Batch, map_leaves, random_state_kept
from influence_framework.fitted import Fitted
from influence_framework.measurement import Measurement, measured
from influence_framework.points import check_factors, checked_points
from influence_framework.protocols import InfluenceMode
from influence_framework.solving import SolveLog, act_on_failures
from influence_framework_dask.allocation import memory_kept
from influence_framework_dask.shipping import WORK, Reference

Chunk = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Settings:
    """What every task needs.

    Attributes:
        model: What the fit left behind.
        on_failure: What becomes of right-hand sides that were not solved.
        device: Where the model is.
    """

    model: Reference
    on_failure: Any
    device: torch.device


@contextmanager
def working(settings: Settings) -> Iterator[Fitted]:
    """The model, for this thread alone; warnings go to the client too."""
    with WORK, memory_kept(), warnings.catch_warnings(record=True) as caught, random_state_kept():
        warnings.simplefilter("always")
        yield settings.model.resolve()
    for warning in caught:
        tell(str(warning.message), warning.category)


def tell(message: str, category: type[Warning]) -> None:
    """Warn here, and on the client where this is a worker."""
    try:
        distributed.get_worker()
    except ValueError:
        warnings.warn(message, category, stacklevel=2)
    else:
        distributed.warn(message, category=category)


def as_tensor(chunk: Chunk) -> Tensor:
    """The chunk as a tensor."""
    # PyTorch takes no array that may not be written to.
    return torch.from_numpy(np.require(chunk, requirements=["C", "W"]))


def points_of(points: Batch, device: torch.device) -> Batch:
    """A batch, of arrays or of tensors, where the model is."""
    if all(isinstance(part, np.ndarray) for part in points):
        points = tuple(map(as_tensor, points))
    return map_leaves(lambda tensor: tensor.to(device), points)


def pair(x: Chunk, y: Chunk) -> tuple[Chunk, Chunk]:
    """Both, computed once for all that they are scored with."""
    return x, y


def _block(settings: Settings, points: tuple[Chunk, Chunk], start: int) -> Block:
    x, y = points_of(points, settings.device)
    return Block(start, ((x, y),), np.arange(start, start + len(x)))


def solve(
    settings: Settings, points: tuple[Chunk, Chunk], start: int, measurement: Measurement | None = None
) -> Prepared:
    """What scores need of test points, of which the first is number ``start``."""
    with working(settings) as fitted:
        prepared = Preparation(fitted, measurement)(_block(settings, points, start))
        act_on_failures(prepared.report, settings.on_failure)
        return prepared


def solve_factors(
    settings: Settings, points: tuple[Chunk, Chunk], start: int, measurement: Measurement | None = None
) -> Chunk:
    """Factors of points, of which the first is number ``start``, ``(n, P)``."""
    with working(settings) as fitted:
        log = SolveLog()
        ((x, y),) = _block(settings, points, start).batches
        batch = checked_points(fitted, x, y, f"points from {start} on", measurement)
        factors = fitted.assemble(fitted.factors(batch, log, measured(fitted.problem, measurement)))
        act_on_failures(log.report(), settings.on_failure)
        return factors.cpu().numpy()


def score(
    settings: Settings, held: list[Prepared], points: tuple[Chunk, Chunk], start: int, count: int
) -> Chunk:
    """Scores of points, of which the first is number ``start``, with ``count`` test points."""
    with working(settings) as fitted:
        block = _block(settings, points, start)
        return Preparation(fitted).job(held, count)(block).values.cpu().numpy()


def score_factors(
    settings: Settings, factors: list[Chunk], points: tuple[Chunk, Chunk], start: int, mode: InfluenceMode
) -> Chunk:
    """Scores of points, of which the first is number ``start``, with factors: ``(m, n)`` or ``(m, n, …)``."""
    with working(settings) as fitted:
        rows = as_tensor(np.concatenate(factors)).to(settings.device)
        check_factors(fitted, rows, fitted.problem.parameters.numel, "z_test_factors")
        ((x, y),) = _block(settings, points, start).batches
        batch = checked_points(fitted, x, y, f"points from {start} on")
        return fitted.contract_whole(rows, batch, mode).cpu().numpy()


def read(loader: Reference, indices: Sequence[int], part: int) -> Chunk:
    """The inputs (0) or targets (1) of the samples of one batch of a loader."""
    found: DataLoader[Any] = loader.resolve()
    collate: Callable[..., Any] = found.collate_fn
    batch = collate([found.dataset[index] for index in indices])
    return np.asarray(batch[part])
