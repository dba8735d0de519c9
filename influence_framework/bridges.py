"""Bridges to and from SciPy's ``LinearOperator``, so that its solvers serve as ours and ours as its."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import InvalidInputError
from influence_framework.operators import Operator
from influence_framework.protocols import LinearOperator


def to_scipy(operator: LinearOperator) -> scipy.sparse.linalg.LinearOperator:
    """The same matrix as a SciPy operator on NumPy arrays.

    ``matmat`` passes all columns in one product. Arrays are converted to the operator's dtype and
    device on the way in and come back on the host. bfloat16 and float16 appear as float32, since
    NumPy has no bfloat16 and SciPy's solvers no float16.
    """
    half = operator.dtype in (torch.bfloat16, torch.float16)
    host_dtype = torch.float32 if half else operator.dtype

    def product(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        columns = _tensor(array).to(operator.device, operator.dtype)
        return np.asarray((operator @ columns).to("cpu", host_dtype).contiguous().numpy())

    return scipy.sparse.linalg.LinearOperator(
        shape=operator.shape,
        matvec=lambda v: product(v.reshape(-1)),
        rmatvec=lambda v: product(v.reshape(-1)),
        matmat=product,
        rmatmat=product,
        dtype=torch.empty(0, dtype=host_dtype).numpy().dtype,
    )


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """The array as a tensor, copied where torch could not hold it: negative strides, or read-only."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


@dataclass(frozen=True, eq=False)
class ScipyOperator(Operator):
    """A SciPy operator (or matrix) on torch tensors of a given dtype and device."""

    base: Any
    torch_dtype: torch.dtype
    torch_device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self.base.shape[0]), int(self.base.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.torch_dtype

    @property
    def device(self) -> torch.device:
        return self.torch_device

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        half = columns.dtype in (torch.bfloat16, torch.float16)
        array = columns.detach().to("cpu", torch.float32 if half else columns.dtype).numpy()
        return _tensor(self.base.matmat(array)).to(columns)


def from_scipy(
    operator: Any, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> ScipyOperator:
    """A SciPy ``LinearOperator``, sparse matrix or array as an operator on torch tensors.

    Args:
        operator: Symmetric and square; whatever ``scipy.sparse.linalg.aslinearoperator`` takes.
        dtype: Of the tensors taken and returned; the operator's own where left out.
        device: Of the tensors taken and returned.

    Raises:
        InvalidInputError: The operator is not square, or its dtype is not a real floating one.
    """
    base = scipy.sparse.linalg.aslinearoperator(operator)
    if base.shape[0] != base.shape[1]:
        raise InvalidInputError(f"Expected a square operator, got shape {tuple(base.shape)}.")
    if dtype is None:
        dtype = torch.as_tensor(np.empty(0, dtype=base.dtype)).dtype
    if not dtype.is_floating_point:
        raise InvalidInputError(f"Expected a real floating-point operator, got {dtype}.")
    return ScipyOperator(base, dtype, torch.device(device))
