"""Layers in groups whose factors are held together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch

from influence_framework.layers import Layer


def factor_bytes(layer: Layer, dtype: torch.dtype, work: torch.dtype) -> int:
    """What a layer takes during a fit: its covariances, or its bases and two sets of eigenvalues, if more.

    Args:
        layer: The layer.
        dtype: Of covariances and eigenvalues.
        work: Of eigenvectors.
    """
    covariances, vectors, values = _entries(layer)
    return max(covariances * dtype.itemsize, vectors * work.itemsize + 2 * values * dtype.itemsize)


def basis_bytes(layer: Layer, dtype: torch.dtype, work: torch.dtype) -> int:
    """What eigenvectors and eigenvalues of a layer take in these precisions."""
    _, vectors, values = _entries(layer)
    return vectors * work.itemsize + values * dtype.itemsize


def cubes(layer: Layer) -> int:
    """Of the widths of its covariances, to which eigendecompositions are in proportion."""
    groups, outputs, columns = layer.form.places.shape
    return groups * (outputs**3 + (0 if layer.form.one_hot else columns**3))


def _entries(layer: Layer) -> tuple[int, int, int]:
    """Of covariances, of eigenvectors and of eigenvalues."""
    groups, outputs, columns = layer.form.places.shape
    one_hot = layer.form.one_hot
    covariances = groups * (outputs**2 + (columns if one_hot else columns**2))
    vectors = groups * (outputs**2 + (0 if one_hot else columns**2))
    return covariances, vectors, prod(layer.form.places.shape)


def grouped(
    layers: Sequence[Layer],
    partitions: int | Literal["auto"],
    budget: int,
    dtype: torch.dtype,
    work: torch.dtype,
) -> list[Sequence[Layer]]:
    """The layers in their order, in at most so many groups; or in as few as are within ``budget`` bytes each.

    Of all ways of cutting them, one whose largest group is the smallest. Neighbours are kept together, since a
    pass for the last layers of a model goes back through these alone.
    """
    sizes = [factor_bytes(layer, dtype, work) for layer in layers]
    if not sizes:
        return []
    if partitions == "auto":
        return _cut(layers, sizes, budget)
    # The largest group is some run of neighbours: halve the interval in which its size lies.
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(layers, sizes, middle)) <= partitions:
            high = middle
        else:
            low = middle + 1
    return _cut(layers, sizes, high)


def _cut(layers: Sequence[Layer], sizes: Sequence[int], limit: int) -> list[Sequence[Layer]]:
    """Groups as large as the limit allows, of one layer at least."""
    starts, held = [0], 0
    for position, size in enumerate(sizes):
        if held and held + size > limit:
            starts.append(position)
            held = 0
        held += size
    return [layers[start:stop] for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True)]
