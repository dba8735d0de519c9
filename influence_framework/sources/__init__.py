"""Curvature sources that come with core, registered through the same hook as anyone's."""

from __future__ import annotations

from influence_framework.hookspecs import Register, hookimpl
from influence_framework.sources.empirical_fisher import EmpiricalFisher
from influence_framework.sources.gauss_newton import GaussNewton
from influence_framework.sources.hessian import Hessian


@hookimpl
def register_hessian_sources(register: Register) -> None:
    """The exact Hessian, the Gauss-Newton matrix and the empirical Fisher."""
    register("hessian", Hessian)
    register("gauss_newton", GaussNewton)
    register("empirical_fisher", EmpiricalFisher)


__all__ = ["EmpiricalFisher", "GaussNewton", "Hessian"]
