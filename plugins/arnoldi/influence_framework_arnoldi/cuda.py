"""The backend ``cupy``: CuPy's thick-restart Lanczos method, on an NVIDIA GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from influence_framework.errors import InvalidInputError
from influence_framework.protocols import LinearOperator
from influence_framework_arnoldi.pairs import ATTAINABLE, CAUTION, Eigenpairs, Wanted

ELSEWHERE = "Or use the backend 'torch', which runs on any device."


def cupy(operator: LinearOperator, wanted: Wanted) -> Eigenpairs:
    """The wanted eigenpairs, one column a product; vectors are shared by DLPack and never copied.

    CuPy's tolerance is an absolute bound on the residuals of all pairs together. To make it relative to
    the smallest eigenvalue that is wanted, the basis is filled once to estimate that, and the iteration
    proper starts from the sum of the Ritz vectors found so. Of multiple eigenvalues some copies may be
    overlooked.

    Raises:
        InvalidInputError: No CuPy, no CUDA device, or an operator on another device.
    """
    package, linalg = cupy_for(operator)
    start = wanted.start(operator)
    with package.cuda.Device(start.device.index):

        def product(vector: Any) -> Any:
            column = operator @ from_dlpack(vector)
            return package.from_dlpack(column.contiguous())

        element = str(operator.dtype).removeprefix("torch.")
        matrix = linalg.LinearOperator(operator.shape, matvec=product, dtype=np.dtype(element))

        def largest(initial: Any, tol: float, fillings: int) -> tuple[Any, Any]:
            values, vectors = linalg.eigsh(
                matrix,
                k=wanted.rank,
                which="LM",
                v0=initial,
                ncv=wanted.krylov_dimension,
                maxiter=fillings * wanted.krylov_dimension,
                tol=tol,
            )
            return values, vectors

        values, vectors = largest(package.from_dlpack(start), float("inf"), 1)
        if wanted.max_iter > 1:
            magnitudes = abs(values)
            rounding = ATTAINABLE * torch.finfo(operator.dtype).eps * float(magnitudes.max())
            limit = CAUTION * max(wanted.tol * float(magnitudes.min()), rounding)
            values, vectors = largest(vectors.sum(axis=1), limit, wanted.max_iter - 1)
        found: list[Tensor] = [from_dlpack(array) for array in (values, vectors)]
    return Eigenpairs.largest(wanted.rank, *found)


def cupy_for(operator: LinearOperator) -> tuple[Any, Any]:
    """CuPy and its sparse linear algebra.

    Raises:
        InvalidInputError: They cannot work on this operator.
    """
    if not torch.cuda.is_available():
        raise InvalidInputError(f"The backend 'cupy' needs a CUDA device, and PyTorch finds none. {ELSEWHERE}")
    if operator.device.type != "cuda":
        raise InvalidInputError(
            f"The backend 'cupy' works on CUDA devices and the curvature is on {operator.device}: move the "
            f"model and its data with .to('cuda'). {ELSEWHERE}"
        )
    try:
        return import_module("cupy"), import_module("cupyx.scipy.sparse.linalg")
    except ImportError as error:
        raise InvalidInputError(
            f"The backend 'cupy' needs CuPy, which cannot be imported ({error}). Install the package for your "
            f"version of CUDA, such as cupy-cuda12x. {ELSEWHERE}"
        ) from error
