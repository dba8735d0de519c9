"""Extreme eigenvalues from a few products: what a scale is chosen by, and what a divergence is explained by."""

from __future__ import annotations

from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import NonFiniteError
from influence_framework.protocols import LinearOperator, Minibatches

SAMPLED = 12
"""Mini-batches whose spectrum is looked at."""
STEPS = 4
"""Power iterations on each."""
WIDTH = 2
"""Random vectors they start from."""


def ritz_values(operator: LinearOperator, start: Float[Tensor, "P w"], steps: int) -> Float[Tensor, " m"]:
    """Ascending Ritz values of ``operator`` over the block Krylov space of ``steps`` power iterations.

    Each lies within the spectrum, so that a negative one proves a negative eigenvalue. The outermost come
    much nearer to the extreme eigenvalues than the power iterations alone: Saad (2011), "Numerical
    Methods for Large Eigenvalue Problems", §6.5 and §6.6.
    """
    basis = start.new_empty(len(start), 0)
    images = basis
    block = start
    for _ in range(steps):
        fresh = _orthonormal(block, basis)
        if fresh.shape[1] == 0:  # the space is invariant
            break
        block = operator @ fresh
        basis, images = torch.cat([basis, fresh], dim=1), torch.cat([images, block], dim=1)
    projected = basis.T @ images
    if not torch.isfinite(projected).all():
        raise NonFiniteError(
            "A curvature product contains NaN or infinity: check the scale of data and parameters, or use "
            "float64."
        )
    values: Tensor = torch.linalg.eigvalsh((projected + projected.T).double() / 2)
    return values


def _orthonormal(block: Float[Tensor, "P w"], basis: Float[Tensor, "P m"]) -> Float[Tensor, "P v"]:
    """The directions of ``block`` that ``basis`` lacks; those that it holds to half the digits are dropped."""
    block = block / torch.linalg.vector_norm(block, dim=0).clamp_min(torch.finfo(block.dtype).tiny)
    for _ in range(2):  # once loses orthogonality to rounding
        block = block - basis @ (basis.T @ block)
    directions, triangle = torch.linalg.qr(block)
    kept: Tensor = directions[:, triangle.diagonal().abs() > torch.finfo(block.dtype).eps ** 0.5]
    return kept - basis @ (basis.T @ kept)


def typical_largest(operator: LinearOperator, batches: Minibatches, seed: int) -> float:
    """``E[Λ_b²] / E[Λ_b]`` with ``Λ_b`` the spectral radius of a mini-batch's ``C_b``; at least that of ``C``.

    Where mini-batches share their leading direction, the recursion is stable in mean square for scales
    above half of this, while ``max Λ_b``, which rare mini-batches decide, would be needlessly slow.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (operator.shape[0], min(WIDTH, operator.shape[0]))
    start = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    start = start.to(operator.device, operator.dtype)
    sampled = islice(batches.minibatches(generator), SAMPLED)
    radii = torch.stack([ritz_values(batch, start, STEPS).abs().max() for batch in sampled])
    whole = ritz_values(operator, start, STEPS).abs().max()
    weighted = radii.square().sum() / radii.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.maximum(weighted, whole).item()
