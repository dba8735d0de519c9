"""Influence on a Dask cluster: the executor and the source ``dask``, and lazy scores of Dask arrays."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_dask.calculator import DaskInfluenceCalculator
from influence_framework_dask.executor import DaskExecutor
from influence_framework_dask.sums import DaskBatches, DaskSource


@hookimpl
def register_executors(register: Register) -> None:
    """Register ``dask``."""
    register("dask", DaskExecutor)


@hookimpl
def register_hessian_sources(register: Register) -> None:
    """Register ``dask``: the curvature of another source, summed on a cluster."""
    register("dask", DaskSource)


__all__ = [
    "DaskBatches",
    "DaskExecutor",
    "DaskInfluenceCalculator",
    "DaskSource",
    "register_executors",
    "register_hessian_sources",
]
