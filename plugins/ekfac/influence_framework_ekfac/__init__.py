"""The solvers ``ekfac`` and ``kfac``: Kronecker-factored curvature of each layer, and scores from it."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_ekfac.influence import EkfacInfluence
from influence_framework_ekfac.inverse import EkfacInverse
from influence_framework_ekfac.solver import EkfacSolver, KfacSolver


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``ekfac`` and ``kfac``."""
    register("ekfac", EkfacSolver)
    register("kfac", KfacSolver)


__all__ = ["EkfacInfluence", "EkfacInverse", "EkfacSolver", "KfacSolver", "register_solvers"]
