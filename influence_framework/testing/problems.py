"""Matrices, operators and small training problems to test methods on; none draws from a global random state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence_framework.objective import Loss
from influence_framework.operators import Operator
from influence_framework.problem import Problem

FEATURES, HIDDEN, CLASSES = 3, 2, 3
RAGGED = (8, 8, 4)
"""Sizes of batches whose last is smaller."""


def normal(
    *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Float[Tensor, "..."]:
    """Standard normal numbers of this shape: the same for the same seed, whatever dtype and device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


def symmetric(
    eigenvalues: Float[Tensor, " P"] | Sequence[float],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "P P"]:
    """A symmetric matrix with these eigenvalues and random eigenvectors, symmetric to the last bit.

    It is computed in float64 on the CPU, and rounded to ``dtype`` at the end.
    """
    values = torch.as_tensor(eigenvalues, dtype=torch.float64, device="cpu")
    basis, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    matrix = basis @ torch.diag(values) @ basis.T
    return torch.add(matrix, matrix.T).div_(2).to(device, dtype)


class ProductsOnly(Operator):
    """A matrix that offers nothing but ``@``, and keeps what it was multiplied with.

    Attributes:
        matrix: ``(P, P)``.
        columns: A copy of the columns of every product, in order.
    """

    def __init__(self, matrix: Float[Tensor, "P P"]) -> None:
        self.matrix = matrix
        self.columns: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def widths(self) -> list[int]:
        """How many columns each product had."""
        return [columns.shape[1] for columns in self.columns]

    @property
    def products(self) -> int:
        """How many columns were multiplied in all."""
        return sum(self.widths)

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        self.columns.append(columns.clone())
        return self.matrix @ columns


def network(
    *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", normalized: bool = False
) -> nn.Sequential:
    """A classifier of two linear layers in eval mode, of 17 parameters.

    Args:
        dtype: Of parameters and buffers.
        device: Likewise.
        normalized: Put a BatchNorm between the layers, for 4 parameters more and some buffers.
    """
    # Made without values first, since modules draw theirs from the global random state.
    modules: list[nn.Module] = [nn.Linear(FEATURES, HIDDEN, device="meta"), nn.Tanh()]
    if normalized:
        modules.insert(1, nn.BatchNorm1d(HIDDEN, device="meta"))
    model = nn.Sequential(*modules, nn.Linear(HIDDEN, CLASSES, device="meta"))
    model = model.to_empty(device="cpu").to(device, dtype).eval()
    with torch.no_grad():
        for seed, tensor in enumerate([*model.parameters(), *model.buffers()]):
            if tensor.is_floating_point():
                # Variances among them must be positive.
                tensor.copy_(
                    normal(*tensor.shape, seed=seed).abs() if normalized else normal(*tensor.shape, seed=seed)
                )
            else:
                tensor.zero_()
    return model


def samples(
    count: int, *, seed: int = 7, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "n f"], Int[Tensor, " n"]]:
    """Inputs and labels for :func:`network`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator, device="cpu")
    return normal(count, FEATURES, seed=seed, dtype=dtype, device=device), labels.to(device)


def batches(
    sizes: Sequence[int] = RAGGED,
    *,
    copies: int = 1,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> list[Sequence[Tensor]]:
    """The same samples whatever the sizes of their batches, all of them ``copies`` times.

    Batches are tuples and lists in turn: neighbours of one type would be joined to one batch by ``Problem``.
    """
    x, y = samples(sum(sizes), dtype=dtype, device=device)
    pairs = [*zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)] * copies
    return [list(pair) if index % 2 else pair for index, pair in enumerate(pairs)]


def problem(
    model: nn.Module | None = None,
    data: Sequence[Sequence[Tensor]] | None = None,
    loss: Loss | None = None,
) -> Problem:
    """A training problem: by default :func:`network` with cross-entropy on :func:`batches`, in float64."""
    return Problem.build(model or network(), loss or nn.CrossEntropyLoss(), data or batches())
