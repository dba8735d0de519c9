"""Some rows of a square root of a curvature, and their inner products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RootRows:
    """Rows of an ``A`` with ``AᵀA = C``.

    Attributes:
        rows: ``(m, P)``.
    """

    rows: Float[Tensor, "m P"]

    def __len__(self) -> int:
        return len(self.rows)

    def inner(self) -> Float[Tensor, "m m"]:
        """The rows' inner products, in float64: of rows in float32 to far below their own rounding."""
        result = self.rows.new_zeros(len(self), len(self), dtype=torch.float64)
        for part in self.rows.split(max(1, 2**20 // max(1, len(self))), dim=1):
            wide = part.double()
            result.addmm_(wide, wide.T)
        return result
