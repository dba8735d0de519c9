"""The solver ``lissa``, and the documented class made of it."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_lissa.influence import LissaInfluence
from influence_framework_lissa.solver import LissaInverse, LissaSolver


@hookimpl
def register_solvers(register: Register) -> None:
    """Register ``lissa``."""
    register("lissa", LissaSolver)


__all__ = ["LissaInfluence", "LissaInverse", "LissaSolver", "register_solvers"]
