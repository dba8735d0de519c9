"""The solver ``direct``: one factorisation of ``C + λI`` for all right-hand sides."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_direct.influence import DirectInfluence
from influence_framework_direct.solver import DirectInverse, DirectSolver


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``direct``."""
    register("direct", DirectSolver)


__all__ = ["DirectInfluence", "DirectInverse", "DirectSolver", "register_solvers"]
