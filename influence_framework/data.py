"""Batches as nested tensors: counting, slicing, joining, and holding them in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from influence_framework.errors import InvalidInputError

Batch = Any
"""What the data yields and the objective understands: tensors, tuples, lists and mappings of them."""


def leaves(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, depth first."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from leaves(value)


def map_leaves(function: Callable[..., Any], batch: Batch, *others: Batch) -> Batch:
    """``function`` of each tensor (and of the tensors at its place in ``others``), nested alike."""
    if isinstance(batch, Tensor):
        return function(batch, *others)
    if isinstance(batch, Mapping):
        return {key: map_leaves(function, value, *(o[key] for o in others)) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_leaves(function, value, *(o[index] for o in others)) for index, value in enumerate(batch)]
        # A named tuple takes its fields one by one.
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def detached(batch: Batch) -> Batch:
    """The batch out of whatever graph its tensors are part of."""
    if not any(tensor.requires_grad for tensor in leaves(batch)):
        return batch
    return map_leaves(lambda tensor: tensor.detach(), batch)


def take(batch: Batch, index: slice | Tensor) -> Batch:
    """The samples at ``index`` of every tensor."""
    return map_leaves(lambda tensor: tensor[index], batch)


def split(batch: Batch, size: int, at_most: int) -> Iterator[Batch]:
    """The batch of ``size`` samples in pieces of at most ``at_most``, as even as can be."""
    if size <= at_most:
        yield batch
        return
    # Buffers of one size can be used again; those of a short last piece fragment the memory.
    step = ceil(size / ceil(size / at_most))
    for start in range(0, size, step):
        yield take(batch, slice(start, start + step))


def layout(batch: Batch) -> Any:
    """What must agree for two batches to be joined."""
    if isinstance(batch, Tensor):
        return (tuple(batch.shape[1:]), batch.dtype, batch.device)
    if isinstance(batch, Mapping):
        return {key: layout(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return (type(batch), [layout(value) for value in batch])
    return batch


class Joiner:
    """Copies of batches: neighbours of the same layout joined to at most ``at_most`` samples, larger ones cut.

    They are joined as they come, so that only those of one joined batch are ever held twice.
    """

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self._joined: list[Batch] = []
        self._group: list[Batch] = []
        self._size = 0

    def add(self, batch: Batch, size: int) -> None:
        """Copy the next batch, of ``size`` samples."""
        if self._group and (self._size + size > self.at_most or layout(batch) != layout(self._group[0])):
            self._close()
        # A copy: the caller may write to these tensors later, or fill one buffer again and again.
        self._group.append(map_leaves(torch.clone, batch))
        self._size += size

    def finish(self) -> list[Batch]:
        """All that was added."""
        self._close()
        return self._joined

    def _close(self) -> None:
        if self._group:
            self._joined += split(concatenate(self._group), self._size, self.at_most)
        self._group, self._size = [], 0


def joined(batches: Iterable[tuple[Batch, int]], at_most: int) -> Iterator[tuple[Batch, int]]:
    """Neighbours of the same layout joined to at most ``at_most`` samples; none is cut."""
    group: list[Batch] = []
    held = 0
    for batch, size in batches:
        if group and (held + size > at_most or layout(batch) != layout(group[0])):
            yield concatenate(group), held
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield concatenate(group), held


def concatenate(group: Sequence[Batch]) -> Batch:
    """Batches of one layout as one batch."""
    return group[0] if len(group) == 1 else map_leaves(lambda *t: torch.cat(t), *group)


def nbytes(batch: Batch) -> int:
    """Memory of all tensors of a batch."""
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(batch))


@dataclass(frozen=True)
class Fingerprint:
    """What a pass held, in whatever order its samples came and however they were cut into batches.

    ``Σ s`` and ``Σ s²`` over the samples, with ``s`` the product of a sample's entries with fixed weights,
    over all its tensors. In float32 one other sample among a hundred thousand shows, and roundings do not.

    Attributes:
        size: Number of samples.
        sums: ``(Σ s, Σ s²)``.
        scales: ``(Σ r, Σ r²)`` with ``r`` the norm of a sample, against which sums are compared.
        precision: The coarsest ``eps`` of the tensors.
    """

    size: int = 0
    sums: tuple[float, float] = (0.0, 0.0)
    scales: tuple[float, float] = (0.0, 0.0)
    precision: float = 0.0

    @classmethod
    def of(cls, batch: Batch, size: int) -> Self:
        """Of one batch of ``size`` samples."""
        products = norms = torch.zeros(size, dtype=torch.float64, device="cpu")
        precision = 0.0
        for position, tensor in enumerate(leaves(batch)):
            rows = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(size, -1)
            if not rows.is_floating_point() or rows.element_size() < 4:
                rows = rows.to(torch.float32)
            # Different for every entry, and for the same entry of two tensors.
            weights = (
                torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).add(position).sin()
            )
            products = products + (rows @ weights).to("cpu", torch.float64)
            norms = norms + torch.linalg.vector_norm(rows, dim=1).to("cpu", torch.float64)
            precision = max(precision, torch.finfo(rows.dtype).eps)
        return cls(
            size,
            (float(products.sum()), float(products.square().sum())),
            (float(norms.sum()), float(norms.square().sum())),
            precision,
        )

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """What ``dataclasses.asdict`` made of one, back from JSON."""
        pairs = {name: tuple(values[name]) for name in ("sums", "scales")}
        return cls(values["size"], **pairs, precision=values["precision"])

    def __add__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(
            self.size + other.size,
            (self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]),
            (self.scales[0] + other.scales[0], self.scales[1] + other.scales[1]),
            max(self.precision, other.precision),
        )

    def agrees(self, other: Fingerprint) -> bool:
        """Whether the two passes held the same samples, roundings aside."""
        return self.size == other.size and all(
            abs(mine - others) <= 64 * self.precision * scale
            for mine, others, scale in zip(self.sums, other.sums, self.scales, strict=True)
        )


class LeftOut:
    """Stands in the place of training data that was not given."""

    def __iter__(self) -> Iterator[Batch]:
        raise InvalidInputError(
            "The model was loaded without its training data, and this needs it: pass the data as well, "
            "load(folder, model, loss, data)."
        )


def check_reiterable(data: Any) -> None:
    """Raise :class:`InvalidInputError` unless ``data`` can be iterated over again and again."""
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise InvalidInputError(
            f"Got the dataset {type(data).__name__} where batches were expected: wrap it, "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if not isinstance(data, Iterable) or isinstance(data, Tensor | str | bytes | Mapping):
        raise InvalidInputError(
            f"Data is a DataLoader or any re-iterable of batches (x, y), not {type(data).__name__}."
        )
    if isinstance(data, Iterator):
        raise InvalidInputError(
            f"Got a one-shot iterator ({type(data).__name__}): the data is read once for every product. "
            "Pass a DataLoader, or a list of batches."
        )


def in_one_batch(batch: Any) -> str:
    """What to do where a tensor came in place of a batch: most likely a pair was given in place of batches."""
    return " All samples in one batch are [(x, y)]." if isinstance(batch, Tensor) else ""


@dataclass(frozen=True, eq=False)
class RandomState:
    """The host's global random states, and those of a loader's own generators."""

    of_python: Any
    of_numpy: Any
    of_torch: Tensor
    own: tuple[tuple[torch.Generator, Tensor], ...]

    def to(self, device: Any) -> RandomState:
        """Itself: these states belong to the host, whatever device the model is on."""
        return self


def random_state(data: Any = None) -> RandomState:
    """The present global random states, and those of the generators that ``data`` was given."""
    own = tuple((generator, generator.get_state()) for generator in _generators(data))
    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), own)


def _generators(data: Any) -> list[torch.Generator]:
    holders = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _set_random_state(state: RandomState) -> None:
    random.setstate(state.of_python)
    np.random.set_state(state.of_numpy)
    torch.set_rng_state(state.of_torch)
    for generator, own in state.own:
        generator.set_state(own)


@contextmanager
def random_state_kept(data: Any = None) -> Iterator[None]:
    """Restore the random states on leaving, those of the accelerators in use included."""
    state = random_state(data)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            _set_random_state(state)


def one_pass(data: Iterable[Batch], state: RandomState) -> Iterator[Batch]:
    """One pass over ``data`` that starts from the random ``state`` and leaves the present one alone.

    A loader draws from the global states, or from a generator of its own, when it shuffles, augments or
    merely starts an iteration. Started from the same state, every pass sees the same samples in the same
    order; and the caller's stream of random numbers is untouched, also between two batches.
    """
    with random_state_kept(data):
        _set_random_state(state)
        iterator = iter(data)
        state = random_state(data)
    while True:
        with random_state_kept(data):
            _set_random_state(state)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            state = random_state(data)
        yield batch
