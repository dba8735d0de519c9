"""The solver ``nystroem``: a randomised low-rank approximation from one pass over the data."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_nystroem.influence import NystroemSketchInfluence
from influence_framework_nystroem.solver import NystroemInverse, NystroemSolver


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``nystroem``."""
    register("nystroem", NystroemSolver)


__all__ = ["NystroemInverse", "NystroemSketchInfluence", "NystroemSolver", "register_solvers"]
