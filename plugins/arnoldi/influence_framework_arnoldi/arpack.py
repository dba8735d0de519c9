"""The backend ``arpack``: SciPy's implicitly restarted Lanczos method, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh

from influence_framework.bridges import to_scipy
from influence_framework.errors import InvalidInputError
from influence_framework.protocols import LinearOperator
from influence_framework_arnoldi.pairs import ATTAINABLE, CAUTION, Eigenpairs, Wanted


def arpack(operator: LinearOperator, wanted: Wanted) -> Eigenpairs:
    """The wanted eigenpairs, one column a product; where ARPACK gives up, those that had converged.

    Vectors travel between host and device for every product. Of multiple eigenvalues some copies may
    be overlooked.
    """
    try:
        values, vectors = eigsh(
            to_scipy(operator),
            k=wanted.rank,
            which="LM",
            v0=wanted.start(operator).cpu().numpy(),
            ncv=wanted.krylov_dimension,
            maxiter=wanted.max_iter,
            tol=CAUTION * max(wanted.tol, ATTAINABLE * torch.finfo(operator.dtype).eps),
        )
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    except ArpackError as error:
        raise InvalidInputError(f"{error} Use the backend 'torch', which goes on here.") from error

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(operator.device)

    return Eigenpairs.largest(wanted.rank, tensor(values), tensor(vectors))
