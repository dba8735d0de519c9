"""What is installed, as text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from influence_framework.hookspecs import API_VERSION
from influence_framework.registry import REQUIRED, Method, Registry

HEADER = ("NAME", "KIND", "DISTRIBUTION", "VERSION", "DESCRIPTION")
FAILURE_HEADER = ("PLUGIN", "DISTRIBUTION", "VERSION", "REASON")
GAP = "  "
NARROWEST = 24
"""Columns that a wrapped text gets at least, however narrow the terminal."""


def overview(
    registry: Registry, *, verbose: bool = False, tracebacks: bool = False, width: int | None = None
) -> str:
    """The methods of ``registry`` as a table, then the plugins that failed and the names in conflict.

    Args:
        registry: What to describe.
        verbose: Whether to add each method's options with their defaults, the capabilities it needs,
            what it can do for other solvers and with indefinite systems, and the source it is made for.
        tracebacks: Whether to add the full traceback of each plugin that failed.
        width: Columns of the terminal, to which the text is wrapped; not at all where left out.
    """
    sections = []
    methods = list(_methods(registry))
    if methods:
        sections.append(_table(methods, verbose=verbose, width=width))
    if not registry.solvers and not registry.conflicts:
        sections.append(
            "No solver is installed. Solvers are plugins of their own; get all of them with:\n"
            "  pip install 'influence-framework[all]'"
        )
    if registry.failures:
        rows = [(f.plugin, f.distribution, f.version, f.reason) for f in registry.failures]
        table = _aligned([FAILURE_HEADER, *rows], width)
        sections.append(_section("Plugins that failed to load:", table))
        if tracebacks:
            sections += [_section(str(f), [f.details.splitlines()]) for f in registry.failures]
    if registry.conflicts:
        claims = [_wrapped(conflict, width) for conflict in registry.conflicts]
        sections.append(_section("Names that several plugins claim:", claims))
    return "\n\n".join(sections)


def as_json(registry: Registry) -> str:
    """All that :func:`overview` can say, for programs; defaults as their ``repr``, ``null`` where required."""
    return json.dumps(
        {
            "api_version": API_VERSION,
            "methods": [_described(method) for method in _methods(registry)],
            "failures": [asdict(failure) for failure in registry.failures],
            "conflicts": registry.conflicts,
        },
        indent=2,
    )


def _described(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "kind": method.kind,
        "distribution": method.distribution,
        "version": method.version,
        "description": method.description,
        "options": {
            option.name: {
                "annotation": option.annotation,
                "default": None if option.default is REQUIRED else repr(option.default),
            }
            for option in method.options.values()
        },
        "requires": method.requires,
        "preconditioner": method.fixed,
        "refines": method.refines,
        "takes_indefinite": method.takes_indefinite,
        "default_source": method.default_source,
    }


def _methods(registry: Registry) -> Iterator[Method]:
    """Every method, solvers first."""
    yield from registry.solvers.values()
    yield from registry.hessian_sources.values()
    yield from registry.objectives.values()
    yield from registry.executors.values()


def _table(methods: Sequence[Method], *, verbose: bool, width: int | None) -> str:
    rows = [
        (m.name, m.kind, m.distribution, m.version, m.description.replace("``", "") or "(no description)")
        for m in methods
    ]
    header, *described = _aligned([HEADER, *rows], width)
    if verbose:
        described = [
            [*lines, *(f"    {line}" for line in (*_options(method), *_statements(method))), ""]
            for method, lines in zip(methods, described, strict=True)
        ]
    return "\n".join(line for lines in [header, *described] for line in lines).rstrip()


def _options(method: Method) -> Iterator[str]:
    for option in method.options.values():
        default = "(required)" if option.default is REQUIRED else f"= {option.default!r}"
        yield f"{option.name}: {option.annotation} {default}"


def _statements(method: Method) -> Iterator[str]:
    """What its class says about itself, in words, so that none is taken for an option."""
    if method.requires:
        yield f"needs an operator with {', '.join(method.requires)}"
    if method.fixed:
        yield "can precondition other solvers"
    if method.refines:
        yield "can refine the solutions of other solvers"
    if method.takes_indefinite:
        yield "takes indefinite systems"
    if method.default_source is not None:
        yield f"made for the source {method.default_source!r}"


def _aligned(rows: Sequence[Sequence[str]], width: int | None) -> list[list[str]]:
    """The lines of each row: every column but the last padded, the last wrapped under itself."""
    *padded, _ = zip(*rows, strict=True)
    sizes = [max(map(len, column)) for column in padded]
    indent = sum(sizes) + len(GAP) * len(sizes)
    room = None if width is None else max(NARROWEST, width - indent)
    table = []
    for *cells, last in rows:
        start = "".join(cell.ljust(size) + GAP for cell, size in zip(cells, sizes, strict=True))
        first, *others = _wrapped(last, room)
        table.append([start + first, *(" " * indent + other for other in others)])
    return table


def _wrapped(text: str, width: int | None) -> list[str]:
    return (textwrap.wrap(text, width) if width else [text]) or [""]


def _section(title: str, blocks: Iterable[Iterable[str]]) -> str:
    return "\n".join([title, *(f"  {line}" for lines in blocks for line in lines)])
