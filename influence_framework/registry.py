"""Where methods are found by name: all that is installed, and the plugins that were set aside."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from influence_framework.errors import PluginConflictError, PluginError, UnknownMethodError, did_you_mean
from influence_framework.loading import (
    CORE,
    KINDS,
    REQUIRED,
    Kind,
    Method,
    Option,
    Origin,
    PluginFailure,
    builtin_plugins,
    given_plugins,
    installed_plugins,
    load,
)

__all__ = [
    "KINDS",
    "OFFICIAL_DISTRIBUTIONS",
    "OFFICIAL_EXECUTORS",
    "REQUIRED",
    "Kind",
    "Method",
    "MethodMapping",
    "Option",
    "PluginFailure",
    "Registry",
    "default_registry",
    "executors",
    "hessian_sources",
    "objectives",
    "solvers",
]

OFFICIAL_DISTRIBUTIONS = {
    "direct": "influence-framework-direct",
    "cg": "influence-framework-cg",
    "jacobi": "influence-framework-cg",
    "lissa": "influence-framework-lissa",
    "arnoldi": "influence-framework-arnoldi",
    "nystroem": "influence-framework-nystroem",
    "ekfac": "influence-framework-ekfac",
    "kfac": "influence-framework-ekfac",
}
"""Which distribution to install for the name of a solver that is documented but absent."""

OFFICIAL_EXECUTORS = {"dask": "influence-framework-dask"}
"""The same for executors."""


@dataclass
class _Catalogue:
    methods: dict[Kind, dict[str, list[Method]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    failures: list[PluginFailure] = field(default_factory=list)


class Registry:
    """Solvers, sources, objectives and executors by name, from core, entry points and plugins given by hand.

    Nothing is imported before the first look-up. Each plugin is loaded on its own: a broken one is set
    aside with the reason and the others work. A name that two plugins claim is an error to whoever asks
    for it, and to nobody else.

    Args:
        plugins: Modules or objects with hook implementations, by name, beside the installed ones.
        installed: Whether to look for entry points.
    """

    def __init__(self, plugins: Mapping[str, Any] | None = None, *, installed: bool = True) -> None:
        self._extra = dict(plugins or {})
        self._installed = installed
        self._lock = threading.RLock()
        self._scanned: _Catalogue | None = None
        self._scanning = False
        self.solvers = MethodMapping(self, "solver")
        self.hessian_sources = MethodMapping(self, "source")
        self.objectives = MethodMapping(self, "objective")
        self.executors = MethodMapping(self, "executor")

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """The plugins that were set aside, and why."""
        return tuple(self._catalogue.failures)

    @property
    def conflicts(self) -> tuple[str, ...]:
        """For each name that several plugins claim, a line that names them."""
        return tuple(
            _conflict(methods)
            for kind in KINDS
            for methods in self._catalogue.methods[kind].values()
            if len(methods) > 1
        )

    def rescan(self) -> None:
        """Forget what was found, so that the next look-up sees newly installed plugins."""
        with self._lock:
            importlib.invalidate_caches()
            self._scanned = None

    @property
    def _catalogue(self) -> _Catalogue:
        with self._lock:
            if self._scanned is None:
                if self._scanning:
                    raise PluginError(
                        "it looks up methods while plugins are loaded, before all of them are known: look "
                        "them up where they are used"
                    )
                self._scanning = True
                try:
                    self._scanned = self._scan()
                finally:
                    self._scanning = False
            return self._scanned

    def _scan(self) -> _Catalogue:
        catalogue = _Catalogue()
        for origin in self._origins():
            found = load(origin)
            if isinstance(found, PluginFailure):
                catalogue.failures.append(found)
                continue
            for method in found:
                claims = catalogue.methods[method.kind].setdefault(method.name, [])
                # One class under one name is no conflict: a plugin under test is often installed as well.
                if all(method.cls is not claim.cls for claim in claims):
                    claims.append(method)
        return catalogue

    def _origins(self) -> Iterator[Origin]:
        yield from builtin_plugins()
        if self._installed:
            yield from installed_plugins()
        yield from given_plugins(self._extra)

    def names(self, kind: Kind) -> list[str]:
        """The names of a kind that can be looked up, sorted: those that several plugins claim are left out."""
        return sorted(name for name, claims in self._catalogue.methods[kind].items() if len(claims) == 1)

    def lookup(self, kind: Kind, name: str) -> Method:
        """The method of that name.

        Raises:
            UnknownMethodError: None is installed; the message lists those that are, suggests the
                nearest, and names plugins that failed to load.
            PluginConflictError: Several plugins claim the name.
        """
        methods = self._catalogue.methods[kind].get(name, []) if isinstance(name, str) else []
        if len(methods) > 1:
            raise PluginConflictError(_conflict(methods))
        if not methods:
            raise UnknownMethodError(self._unknown(kind, name))
        return methods[0]

    def method_of(self, kind: Kind, cls: type[Any]) -> Method | None:
        """The method whose class is ``cls``, under the first of the names that can be looked up."""
        claims = (self._catalogue.methods[kind][name][0] for name in self.names(kind))
        return next((method for method in claims if method.cls is cls), None)

    def _unknown(self, kind: Kind, name: object) -> str:
        known = self.names(kind)
        label = KINDS[kind][2]
        message = (
            f"Unknown {label} {name!r}.{did_you_mean(name, known)} Installed: {', '.join(known) or 'none'}."
        )
        if self.failures:
            message += f" Plugins that failed to load: {'; '.join(map(str, self.failures))}."
        documented = {"solver": OFFICIAL_DISTRIBUTIONS, "executor": OFFICIAL_EXECUTORS}
        official = documented.get(kind, {}).get(str(name))
        if official and official not in [failure.distribution for failure in self.failures]:
            message += f" Install it with: pip install {official}"
        elif kind == "solver" and not known and not self.failures:
            message += " Solvers are plugins of their own; get all with: pip install 'influence-framework[all]'"
        return message


class MethodMapping(Mapping[str, Method]):
    """Read-only mapping from name to :class:`Method` over what can be looked up.

    A name that several plugins claim is not in it; asking for it, also by ``get``, raises
    :class:`PluginConflictError`, which says who claims it.
    """

    def __init__(self, registry: Registry, kind: Kind) -> None:
        self._registry = registry
        self._kind: Kind = kind

    def __getitem__(self, name: str) -> Method:
        return self._registry.lookup(self._kind, name)

    def __contains__(self, name: object) -> bool:
        return name in self._registry.names(self._kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.names(self._kind))

    def __len__(self) -> int:
        return len(self._registry.names(self._kind))

    def __repr__(self) -> str:
        return f"<{KINDS[self._kind][2]}s: {', '.join(self) or 'none installed'}>"


def _conflict(methods: Iterable[Method]) -> str:
    methods = list(methods)
    claims = " and ".join(f"{m.distribution} {m.version} ({m.cls.__qualname__})" for m in methods)
    removable = dict.fromkeys(m.distribution for m in methods if m.distribution != CORE)
    return (
        f"The {KINDS[methods[0].kind][2]} {methods[0].name!r} is claimed by {claims}: uninstall "
        f"{' or '.join(removable)}, or pass an instance of the class you mean."
    )


default_registry = Registry()
solvers = default_registry.solvers
hessian_sources = default_registry.hessian_sources
objectives = default_registry.objectives
executors = default_registry.executors
