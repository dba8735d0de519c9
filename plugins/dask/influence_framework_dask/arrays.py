"""Arrays of points: whether their chunks can work, and arrays of a loader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from distributed import Client
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from influence_framework.attribution.blocks import shuffles
from influence_framework.errors import InvalidInputError
from influence_framework_dask.shipping import Reference
from influence_framework_dask.tasks import Chunk, pair, read


def check_points(x: Any, y: Any, dtype: np.dtype[Any] | None, x_name: str, y_name: str) -> None:
    """Raise :class:`InvalidInputError` unless chunk by chunk ``x`` and ``y`` are points with their targets.

    Floating-point arrays must be of ``dtype``, unless it is ``None``.
    """
    for name, array in ((x_name, x), (y_name, y)):
        _check_chunks(name, array)
        if dtype is not None and array.dtype.kind == "f" and array.dtype != dtype:
            raise InvalidInputError(
                f"{name} is {array.dtype} and the model {dtype}: convert it with {name}.astype({str(dtype)!r})."
            )
    if x.shape[0] != y.shape[0]:
        raise InvalidInputError(
            f"{x_name} has {x.shape[0]} samples and {y_name} {y.shape[0]}: every point needs its target."
        )
    if x.chunks[0] != y.chunks[0]:
        raise InvalidInputError(
            f"{x_name} and {y_name} are cut differently over samples, into {_sizes(x)} and {_sizes(y)}: cut "
            f"one like the other, {y_name} = {y_name}.rechunk({{0: {x_name}.chunks[0]}})."
        )


def check_factor_chunks(factors: Any, width: int, dtype: np.dtype[Any]) -> None:
    """Raise :class:`InvalidInputError` unless ``factors`` are whole rows of ``width``."""
    _check_chunks("z_test_factors", factors)
    if factors.ndim != 2 or factors.shape[1] != width or factors.dtype != dtype:
        raise InvalidInputError(
            f"z_test_factors must be (m, {width}) of {dtype}, the rows that influence_factors returns; got "
            f"{factors.shape} of {factors.dtype}."
        )


def _check_chunks(name: str, array: Any) -> None:
    if not isinstance(array, da.Array):
        raise InvalidInputError(
            f"{name} must be a Dask array, got {type(array).__name__}: dask.array.from_array(..., chunks=...) "
            "makes one of an array, and calculator.arrays(loader) two of a loader."
        )
    if array.ndim == 0:
        raise InvalidInputError(f"{name} is a single number: the first dimension must count samples.")
    if any(math.isnan(size) for sizes in array.chunks for size in sizes):
        raise InvalidInputError(
            f"{name} has chunks of unknown sizes: have them computed first, "
            f"{name} = {name}.compute_chunk_sizes()."
        )
    if array.shape[0] == 0:
        raise InvalidInputError(f"{name} has no sample.")
    cut = [axis for axis, sizes in enumerate(array.chunks) if axis and len(sizes) > 1]
    if cut:
        whole = ", ".join(f"{axis}: -1" for axis in cut)
        raise InvalidInputError(
            f"{name} is cut along dimension {', '.join(map(str, cut))}, and a sample must be in one chunk: "
            f"{name} = {name}.rechunk({{{whole}}})."
        )


def _sizes(array: da.Array) -> str:
    shown = ", ".join(map(str, array.chunks[0][:4]))
    return f"chunks of {shown}{', …' if len(array.chunks[0]) > 4 else ''}"


def from_loader(loader: Any, client: Client | None) -> tuple[da.Array, da.Array]:
    """Inputs and targets of a loader's dataset, one chunk a batch, read where they are needed.

    Raises:
        InvalidInputError: The loader shuffles, has no map-style dataset, or its batches are not two tensors.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise InvalidInputError(
            "Workers read samples by their positions: pass a DataLoader over a dataset with dataset[i] and "
            "len(dataset), or stream any loader with inf.attribute(model, test, train, executor='dask')."
        )
    if shuffles(loader):
        raise InvalidInputError("The loader shuffles, so that rows would mean nothing: pass shuffle=False.")
    if loader.batch_sampler is None:
        raise InvalidInputError("The loader has no batches: give it a batch_size.")
    batches = [list(indices) for indices in loader.batch_sampler]
    if not batches:
        raise InvalidInputError("The loader yields no batch.")
    example = loader.collate_fn([loader.dataset[batches[0][0]]])
    if (
        not isinstance(example, tuple | list)
        or len(example) != 2
        or not all(isinstance(e, Tensor) for e in example)
    ):
        raise InvalidInputError(
            "Dask arrays hold batches (x, y) of two tensors: for others, and for identifiers, use "
            "inf.attribute(model, test, train, executor='dask')."
        )
    reference = Reference.to(loader, client)
    sizes = tuple(map(len, batches))
    x, y = (_array(reference, batches, sizes, part, like.numpy()) for part, like in enumerate(example))
    return x, y


def _array(
    reference: Reference,
    batches: list[list[int]],
    sizes: tuple[int, ...],
    part: int,
    like: Chunk,
) -> da.Array:
    name = f"influence-read-{reference.token}-{part}"
    features = like.shape[1:]
    inner = (0,) * len(features)
    graph = {(name, i, *inner): (read, reference, indices, part) for i, indices in enumerate(batches)}
    return da.Array(graph, name, chunks=(sizes, *((size,) for size in features)), dtype=like.dtype)


@dataclass(frozen=True)
class Layers:
    """A layer with all that it is made of.

    Attributes:
        name: Of the layer.
        graph: A ``HighLevelGraph``, whose own annotation of keys run-time checks do not follow.
    """

    name: str
    graph: Any

    @classmethod
    def on(cls, name: str, layer: dict[Any, Any], *parents: Layers) -> Layers:
        """A new layer over others."""
        below = HighLevelGraph.merge(*(parent.graph for parent in parents))
        dependencies = {**below.dependencies, name: {parent.name for parent in parents}}
        return cls(name, HighLevelGraph({**below.layers, name: layer}, dependencies))


def chunks_of(x: da.Array, y: da.Array) -> Layers:
    """The points chunk by chunk, as a layer of its own, so that no task that uses them makes them again."""
    name = f"influence-points-{tokenize(x.name, y.name)}"
    inner = [(0,) * (array.ndim - 1) for array in (x, y)]
    layer = {(name, i): (pair, (x.name, i, *inner[0]), (y.name, i, *inner[1])) for i in range(x.numblocks[0])}
    return Layers.on(name, layer, Layers(x.name, x.dask), Layers(y.name, y.dask))
