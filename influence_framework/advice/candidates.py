"""Which compositions come into question: every solver that is installed, with each preconditioner it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from influence_framework.costs import Workload
from influence_framework.errors import InfluenceError
from influence_framework.registry import Method, Registry
from influence_framework.specs import solver_options

PRECONDITIONER = "preconditioner"
"""The option that takes a solver whose inverse is one fixed matrix."""

Options = Mapping[str, Any]


def advised(method: Method, workload: Workload) -> list[Options]:
    """The options that the method itself thinks worth considering."""
    ask = getattr(method.cls, "advised", None)
    if ask is None:
        return [{}]
    try:
        return list(ask(workload))
    except InfluenceError:
        return [{}]  # the cost with these options says why it cannot


def solver_specs(registry: Registry, workload: Workload) -> Iterator[Options]:
    """Mappings with ``name`` and options, by name, those without a preconditioner first."""
    methods = [registry.solvers[name] for name in registry.solvers]
    fixed = [
        {"name": method.name, **options}
        for method in methods
        if getattr(method.cls, "fixed", False)
        for options in advised(method, workload)
    ]
    for method in methods:
        plain = [{"name": method.name, **options} for options in advised(method, workload)]
        yield from plain
        if PRECONDITIONER in solver_options(method.cls):
            yield from ({**spec, PRECONDITIONER: other} for spec in plain for other in fixed)


def in_words(spec: Options) -> str:
    """``cg (rtol=0.0001) with nystroem (rank=50)``."""
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key not in ("name", PRECONDITIONER))
    said = f"{spec['name']} ({options})" if options else str(spec["name"])
    return f"{said} with {in_words(spec[PRECONDITIONER])}" if PRECONDITIONER in spec else said
