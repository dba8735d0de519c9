"""The conformance kit on a method by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from influence_framework.errors import InvalidInputError
from influence_framework.registry import Registry
from influence_framework.testing import (
    ConformanceReport,
    preconditioner_report,
    solver_report,
    source_report,
)

CheckKind = Literal["solver", "source", "preconditioner"]
REPORTS: Mapping[CheckKind, Callable[..., ConformanceReport]] = {
    "solver": solver_report,
    "source": source_report,
    "preconditioner": preconditioner_report,
}


def check(name: str, kind: CheckKind | None, registry: Registry) -> ConformanceReport:
    """Every check of the method of that name, with its default options.

    Args:
        name: As it is registered.
        kind: What to check it as; where left out, what the name is registered as.
        registry: Where it is looked up.

    Raises:
        InvalidInputError: The name is that of a solver and of a source, and ``kind`` is left out.
        UnknownMethodError: No such name.
        UnknownOptionError: The method has options without a default.
    """
    return REPORTS[kind or _kind_of(name, registry)](name, registry=registry)


def _kind_of(name: str, registry: Registry) -> CheckKind:
    if name not in registry.hessian_sources:
        return "solver"
    if name in registry.solvers:
        raise InvalidInputError(
            f"{name!r} is a solver and a curvature source: add --kind solver or --kind source."
        )
    return "source"
