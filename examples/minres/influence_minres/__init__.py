"""MINRES for systems that are symmetric but not positive definite, as the Hessian of a trained net gives."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_minres.solver import MinresInverse, MinresSolver

__all__ = ["INFLUENCE_API_VERSION", "MinresInverse", "MinresSolver", "register_solvers"]

INFLUENCE_API_VERSION = 1


@hookimpl
def register_solvers(register: Register) -> None:
    """Announce the solver ``minres``."""
    register("minres", MinresSolver)
