"""The conformance kit on a method by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from influence_framework.errors import InvalidInputError
from influence_framework.registry import KINDS, Registry
from influence_framework.testing import (
    ConformanceReport,
    executor_report,
    preconditioner_report,
    solver_report,
    source_report,
)

CheckKind = Literal["solver", "source", "preconditioner", "executor"]
REPORTS: Mapping[CheckKind, Callable[..., ConformanceReport]] = {
    "solver": solver_report,
    "source": source_report,
    "preconditioner": preconditioner_report,
    "executor": executor_report,
}
REGISTERED: Mapping[Literal["solver", "source", "executor"], str] = {
    "solver": "a",
    "source": "a",
    "executor": "an",
}
"""The kinds that a name alone may stand for, each with its article."""


def check(name: str, kind: CheckKind | None, registry: Registry) -> ConformanceReport:
    """Every check of the method of that name, with its default options.

    Args:
        name: As it is registered.
        kind: What to check it as; where left out, what the name is registered as.
        registry: Where it is looked up.

    Raises:
        InvalidInputError: The name is that of methods of several kinds, and ``kind`` is left out.
        UnknownMethodError: No such name.
        UnknownOptionError: The method has options without a default.
    """
    return REPORTS[kind or _kind_of(name, registry)](name, registry=registry)


def _kind_of(name: str, registry: Registry) -> CheckKind:
    known = [kind for kind in REGISTERED if name in registry.names(kind)]
    if len(known) > 1:
        what = " and ".join(
            f"{article} {KINDS[kind][2]}" for kind, article in REGISTERED.items() if kind in known
        )
        options = " or ".join(f"--kind {kind}" for kind in known)
        raise InvalidInputError(f"{name!r} is {what}: add {options}.")
    return known[0] if known else "solver"
