"""Where methods are found by name: plugins, their hooks, and what is wrong with those that failed."""

from __future__ import annotations

import importlib
import inspect
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, Literal

import pluggy

from influence_framework import hookspecs
from influence_framework.errors import (
    PluginConflictError,
    PluginError,
    UnknownMethodError,
    UnknownOptionError,
    did_you_mean,
)

Kind = Literal["solver", "source"]
KINDS: Mapping[Kind, tuple[str, str, str]] = {
    "solver": ("register_solvers", "fit", "solver"),
    "source": ("register_hessian_sources", "operator", "curvature source"),
}
"""For each kind of method: its hook, the method its classes must have, and its name in messages."""

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
"""Which distribution to install for a name that is documented but absent."""

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One option of a method. ``default`` is ``REQUIRED`` where it must be given."""

    name: str
    default: Any
    annotation: str


@dataclass(frozen=True)
class Method:
    """One solver or source that can be composed by name.

    Attributes:
        name: The name it is registered under.
        kind: ``"solver"`` or ``"source"``.
        cls: Its class.
        distribution: The distribution that ships it.
        version: That distribution's version.
        options: Its options by name, with defaults.
        description: First line of the class's docstring.
    """

    name: str
    kind: Kind
    cls: type[Any]
    distribution: str
    version: str
    options: Mapping[str, Option]
    description: str

    def create(self, **options: Any) -> Any:
        """An instance with these options.

        Raises:
            UnknownOptionError: An option the method does not have, or a required one left out.
        """
        for given in options:
            if given not in self.options:
                raise UnknownOptionError(
                    f"{self.name!r} has no option {given!r}.{did_you_mean(given, self.options)} "
                    f"Its options: {', '.join(self.options) or 'none'}."
                )
        missing = [o.name for o in self.options.values() if o.default is REQUIRED and o.name not in options]
        if missing:
            raise UnknownOptionError(f"{self.name!r} needs the option {', '.join(map(repr, missing))}.")
        return self.cls(**options)


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that was set aside.

    Attributes:
        plugin: Name of its entry point.
        distribution: The distribution it comes from.
        version: That distribution's version.
        reason: What is wrong, in one line.
        details: The traceback, where an exception was raised.
    """

    plugin: str
    distribution: str
    version: str
    reason: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version}): {self.reason}"


@dataclass(frozen=True)
class _Origin:
    plugin: str
    distribution: str
    version: str
    load: Callable[[], Any]


def installed_plugins() -> Iterator[_Origin]:
    """The entry points of group ``influence_framework``, ordered by distribution and name."""
    found = {}
    for entry in metadata.entry_points(group=hookspecs.PROJECT):
        name, version = _identity(entry.dist)
        found[name, entry.name] = _Origin(entry.name, name, version, entry.load)
    for key in sorted(found):
        yield found[key]


def _identity(distribution: metadata.Distribution | None) -> tuple[str, str]:
    """Name and version, as far as they can be read: an interrupted removal leaves folders without them."""
    if distribution is None:
        return "unknown", "unknown"
    try:
        return distribution.name or "unknown", distribution.version or "unknown"
    except Exception:  # what a missing file raises depends on the version of Python
        return "unknown", "unknown"


def _builtin_plugins() -> Iterator[_Origin]:
    try:
        version = metadata.version("influence-framework")
    except metadata.PackageNotFoundError:
        version = "unknown"
    yield _Origin(
        "sources",
        "influence-framework",
        version,
        lambda: importlib.import_module("influence_framework.sources"),
    )


@dataclass
class _Catalogue:
    methods: dict[Kind, dict[str, list[Method]]] = field(default_factory=lambda: {"solver": {}, "source": {}})
    failures: list[PluginFailure] = field(default_factory=list)


class Registry:
    """Solvers and sources by name, from core, from entry points and from plugins given by hand.

    Nothing is imported before the first look-up. Each plugin is loaded on its own: a broken one is set
    aside with the reason and the others work. Two plugins that claim a name make that name an error.

    Args:
        plugins: Modules or objects with hook implementations, by name, beside the installed ones.
        installed: Whether to look for entry points.
    """

    def __init__(self, plugins: Mapping[str, Any] | None = None, *, installed: bool = True) -> None:
        self._extra = dict(plugins or {})
        self._installed = installed
        self._lock = threading.RLock()
        self._scanned: _Catalogue | None = None
        self.solvers = MethodMapping(self, "solver")
        self.hessian_sources = MethodMapping(self, "source")

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
                self._scanned = self._scan()
            return self._scanned

    def _scan(self) -> _Catalogue:
        catalogue = _Catalogue()
        for origin in self._origins():
            try:
                methods = _methods_of(origin)
            except (Exception, SystemExit) as error:
                catalogue.failures.append(
                    PluginFailure(
                        origin.plugin,
                        origin.distribution,
                        origin.version,
                        _reason(error),
                        "".join(traceback.format_exception(error)),
                    )
                )
                continue
            for method in methods:
                claims = catalogue.methods[method.kind].setdefault(method.name, [])
                # One class under one name is no conflict: a plugin under test is often installed as well.
                if all(method.cls is not claim.cls for claim in claims):
                    claims.append(method)
        return catalogue

    def _origins(self) -> Iterator[_Origin]:
        yield from _builtin_plugins()
        if self._installed:
            yield from installed_plugins()
        for name in sorted(self._extra):
            yield _Origin(name, name, "unknown", partial(self._extra.__getitem__, name))

    def names(self, kind: Kind) -> list[str]:
        """All names of a kind, sorted."""
        return sorted(self._catalogue.methods[kind])

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

    def _unknown(self, kind: Kind, name: object) -> str:
        known = self.names(kind)
        label = KINDS[kind][2]
        message = (
            f"Unknown {label} {name!r}.{did_you_mean(name, known)} Installed: {', '.join(known) or 'none'}."
        )
        if self.failures:
            message += f" Plugins that failed to load: {'; '.join(map(str, self.failures))}."
        official = OFFICIAL_DISTRIBUTIONS.get(str(name)) if kind == "solver" else None
        if official and official not in [failure.distribution for failure in self.failures]:
            message += f" Install it with: pip install {official}"
        elif kind == "solver" and not known and not self.failures:
            message += " Solvers are plugins of their own; get all with: pip install 'influence-framework[all]'"
        return message


class MethodMapping(Mapping[str, Method]):
    """Read-only mapping from name to :class:`Method` over what is installed."""

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


def _methods_of(origin: _Origin) -> list[Method]:
    """Load one plugin and call its hooks; anything wrong with it raises."""
    plugin = origin.load()
    # A manager of its own: what one plugin declares wrongly cannot disturb the others.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=origin.plugin)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        hooks = ", ".join(hook for hook, _, _ in KINDS.values())
        raise PluginError(
            f"it implements no hook: decorate a function named {hooks.replace(', ', ' or ')} with "
            "influence_framework.hookimpl"
        )
    methods: list[Method] = []
    for kind, (hook, _, _) in KINDS.items():
        getattr(manager.hook, hook)(register=_collector(kind, origin, methods))
    return methods


def _collector(kind: Kind, origin: _Origin, methods: list[Method]) -> hookspecs.Register:
    _, required, label = KINDS[kind]

    def register(name: str, method: type[Any]) -> None:
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
            raise PluginError(f"{name!r} is no name for a {label}: use a lower-case identifier")
        if not inspect.isclass(method):
            raise PluginError(f"{name!r} must be registered with a class, got {method!r}")
        if not callable(getattr(method, required, None)):
            raise PluginError(f"{method.__qualname__} is no {label}: it has no method {required!r}")
        methods.append(
            Method(
                name,
                kind,
                method,
                origin.distribution,
                origin.version,
                _options(method),
                (inspect.getdoc(method) or "").partition("\n")[0],
            )
        )

    return register


def _options(cls: type[Any]) -> Mapping[str, Option]:
    parameters = inspect.signature(cls).parameters.values()
    return {
        p.name: Option(
            p.name,
            p.default,
            p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation),
        )
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r}) while loading"
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"


def _conflict(methods: Iterable[Method]) -> str:
    methods = list(methods)
    claims = " and ".join(f"{m.distribution} {m.version} ({m.cls.__qualname__})" for m in methods)
    return (
        f"The {KINDS[methods[0].kind][2]} {methods[0].name!r} is claimed by {claims}: uninstall one, or pass "
        "an instance of the class you mean."
    )


default_registry = Registry()
solvers = default_registry.solvers
hessian_sources = default_registry.hessian_sources
