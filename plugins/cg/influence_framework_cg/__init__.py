"""The solver ``cg``, the diagonal preconditioner ``jacobi``, and the model ``CgInfluence``."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_cg.influence import CgInfluence
from influence_framework_cg.jacobi import JacobiInverse, JacobiSolver
from influence_framework_cg.solver import CgInverse, CgSolver


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``cg`` and ``jacobi``."""
    register("cg", CgSolver)
    register("jacobi", JacobiSolver)


__all__ = ["CgInfluence", "CgInverse", "CgSolver", "JacobiInverse", "JacobiSolver", "register_solvers"]
