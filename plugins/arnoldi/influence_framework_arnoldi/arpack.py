"""The backend ``arpack``: SciPy's implicitly restarted Lanczos method, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
from torch import Tensor

from influence_framework.bridges import to_scipy
from influence_framework.errors import InvalidInputError
from influence_framework.operators import ScaledOperator
from influence_framework.protocols import LinearOperator
from influence_framework_arnoldi.pairs import ATTAINABLE, CAUTION, Eigenpairs, Wanted


def arpack(operator: LinearOperator, wanted: Wanted) -> Eigenpairs:
    """The wanted eigenpairs, one column a product; where ARPACK gives up, those that had converged.

    Vectors travel between host and device for every product. Of multiple eigenvalues some copies may
    be overlooked. ARPACK takes eigenvalues below ``ε^(2/3)`` for zero when it judges residuals, and
    therefore gets ``C`` divided by an estimate of its norm.
    """
    start = wanted.start(operator)
    norm = (_length(operator @ start) / _length(start)).item()
    if norm == 0:  # a random vector would not be in the null space of anything else
        axes = torch.eye(len(start), wanted.rank, dtype=start.dtype, device=start.device)
        return Eigenpairs.largest(wanted.rank, torch.zeros_like(start[: wanted.rank]), axes)
    try:
        values, vectors = eigsh(
            to_scipy(ScaledOperator(operator, 1.0 / norm)),
            k=wanted.rank,
            which="LM",
            v0=start.cpu().numpy(),
            ncv=wanted.krylov_dimension,
            maxiter=wanted.max_iter,
            tol=CAUTION * max(wanted.tol, ATTAINABLE * torch.finfo(operator.dtype).eps),
        )
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    except ArpackError as error:
        raise InvalidInputError(f"{error} Use the backend 'torch', which goes on here.") from error

    def tensor(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(operator.device)

    return Eigenpairs.largest(wanted.rank, norm * tensor(values).double(), tensor(vectors))


def _length(vector: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length
