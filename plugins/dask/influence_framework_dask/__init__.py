"""Influence scores on a Dask cluster: the executor ``dask``, and lazy scores of Dask arrays."""

from influence_framework import hookimpl
from influence_framework.hookspecs import Register
from influence_framework_dask.calculator import DaskInfluenceCalculator
from influence_framework_dask.executor import DaskExecutor


@hookimpl
def register_executors(register: Register) -> None:
    """Register ``dask``."""
    register("dask", DaskExecutor)


__all__ = ["DaskExecutor", "DaskInfluenceCalculator", "register_executors"]
