"""What is installed, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from influence_framework.errors import PluginConflictError
from influence_framework.registry import KINDS, REQUIRED, Method, Registry

HEADER = ("NAME", "KIND", "DISTRIBUTION", "VERSION", "DESCRIPTION")
FAILURE_HEADER = ("PLUGIN", "DISTRIBUTION", "VERSION", "REASON")
GAP = "  "
NARROWEST = 24
"""Columns that a wrapped text gets at least, however narrow the terminal."""


def overview(registry: Registry, *, verbose: bool = False, width: int | None = None) -> str:
    """The methods of ``registry`` as a table, then the plugins that failed and the names in conflict.

    Args:
        registry: What to describe.
        verbose: Whether to add each method's options with their defaults.
        width: Columns of the terminal, to which the text is wrapped; not at all where left out.
    """
    sections = []
    methods = list(_methods(registry))
    if methods:
        sections.append(_table(methods, verbose=verbose, width=width))
    if not registry.solvers:
        sections.append(
            "No solver is installed. Solvers are plugins of their own; get all of them with:\n"
            "  pip install 'influence-framework[all]'"
        )
    if registry.failures:
        rows = [(f.plugin, f.distribution, f.version, f.reason) for f in registry.failures]
        table = _aligned([FAILURE_HEADER, *rows], width)
        sections.append(_section("Plugins that failed to load:", table))
    if registry.conflicts:
        claims = [_wrapped(conflict, width) for conflict in registry.conflicts]
        sections.append(_section("Names that several plugins claim:", claims))
    return "\n\n".join(sections)


def _methods(registry: Registry) -> Iterator[Method]:
    """Every method whose name is claimed once, solvers first."""
    for kind in KINDS:
        for name in registry.names(kind):
            try:
                yield registry.lookup(kind, name)
            except PluginConflictError:
                continue


def _table(methods: Sequence[Method], *, verbose: bool, width: int | None) -> str:
    rows = [
        (m.name, m.kind, m.distribution, m.version, m.description.replace("``", "") or "(no description)")
        for m in methods
    ]
    header, *described = _aligned([HEADER, *rows], width)
    if verbose:
        described = [
            [*lines, *(f"    {option}" for option in _options(method)), ""]
            for method, lines in zip(methods, described, strict=True)
        ]
    return "\n".join(line for lines in [header, *described] for line in lines).rstrip()


def _options(method: Method) -> Iterator[str]:
    for option in method.options.values():
        default = "(required)" if option.default is REQUIRED else f"= {option.default!r}"
        yield f"{option.name}: {option.annotation} {default}"


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
