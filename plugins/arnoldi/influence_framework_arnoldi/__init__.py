"""The solver ``arnoldi``: a low-rank inverse from the largest eigenpairs of the curvature."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_arnoldi.influence import ArnoldiInfluence
from influence_framework_arnoldi.solver import ArnoldiInverse, ArnoldiSolver


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``arnoldi``."""
    register("arnoldi", ArnoldiSolver)


__all__ = ["ArnoldiInfluence", "ArnoldiInverse", "ArnoldiSolver", "register_solvers"]
