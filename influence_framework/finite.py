"""Whether numbers are finite, told from their sum: one read of them, and no mask as large as they are."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; integers and empty tensors are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    values = tensor.detach()
    if bool(values.sum().isfinite()):
        return True
    # Finite numbers may have a sum that is not, in half precision soon.
    real = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(real))


def finite_rows(rows: Shaped[Tensor, "n _P"]) -> Bool[Tensor, " n"]:
    """Whether each row is finite, ``(n,)``, on the device of ``rows``."""
    values = rows.detach()
    found = values.sum(dim=1).isfinite()
    doubtful = torch.nonzero(~found).flatten().tolist()
    for place in doubtful:
        found[place] = all_finite(values[place])
    return found
