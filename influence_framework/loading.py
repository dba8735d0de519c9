"""Loading plugins one by one: what each offers, or what is wrong with it and what to do about it."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

import pluggy

from influence_framework import hookspecs
from influence_framework.errors import PluginError, UnknownOptionError, did_you_mean

CORE = "influence-framework"
"""The distribution of this package."""

UNKNOWN = "unknown"
"""In place of a distribution's name or version that cannot be read."""

Kind = Literal["solver", "source", "objective", "executor"]
KINDS: Mapping[Kind, tuple[str, str, str]] = {
    "solver": ("register_solvers", "fit", "solver"),
    "source": ("register_hessian_sources", "operator", "curvature source"),
    "objective": ("register_objectives", "sample_losses", "objective"),
    "executor": ("register_executors", "run", "executor"),
}
"""For each kind of method: its hook, the method its classes must have, and its name in messages."""

BUILTIN = {
    "sources": "influence_framework.sources",
    "objectives": "influence_framework.objectives",
    "executors": "influence_framework.attribution.executors",
}
"""Core's own plugins and their modules."""

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One option of a method. ``default`` is ``REQUIRED`` where it must be given."""

    name: str
    default: Any
    annotation: str


@dataclass(frozen=True)
class Method:
    """One solver, source, objective or executor that can be had by name.

    Attributes:
        name: The name it is registered under.
        kind: ``"solver"``, ``"source"``, ``"objective"`` or ``"executor"``.
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

    def create(self, /, **options: Any) -> Any:
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

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the capabilities that the operator must offer, where the class states them."""
        stated = getattr(self.cls, "requires", ())
        # A property depends on the options, and is checked at fit.
        return () if isinstance(stated, property) else tuple(capability.__name__ for capability in stated)

    @property
    def fixed(self) -> bool:
        """Whether it can serve as a preconditioner."""
        return getattr(self.cls, "fixed", False) is True

    @property
    def refines(self) -> bool:
        """Whether it can refine the solutions of another solver."""
        return getattr(self.cls, "refines", False) is True

    @property
    def takes_indefinite(self) -> bool:
        """Whether negative eigenvalues are no failure of it."""
        return getattr(self.cls, "takes_indefinite", False) is True

    @property
    def default_source(self) -> str | None:
        """Name of the curvature source it is made for, where the class states one."""
        stated = getattr(self.cls, "default_source", None)
        return stated if isinstance(stated, str) else None


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that was set aside.

    Attributes:
        plugin: Name of its entry point.
        distribution: The distribution it comes from.
        version: That distribution's version.
        reason: What is wrong, and then what to do about it, in one line.
        details: The traceback.
    """

    plugin: str
    distribution: str
    version: str
    reason: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version}): {self.reason}"


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from.

    Attributes:
        plugin: Name of its entry point.
        distribution: The distribution that ships it.
        version: That distribution's version.
        removal: How to be rid of it, as the end of a sentence.
        load: Imports it.
    """

    plugin: str
    distribution: str
    version: str
    removal: str
    load: Callable[[], Any]


class _LaterInterfaceError(PluginError):
    """The plugin is written for an interface that core does not have yet."""


def installed_plugins() -> Iterator[Origin]:
    """The entry points of group ``influence_framework``, ordered by distribution and name."""
    found = {}
    for entry in metadata.entry_points(group=hookspecs.PROJECT):
        name, version = _field(entry.dist, "name"), _field(entry.dist, "version")
        removal = f"uninstall it: pip uninstall {name}"
        if name == UNKNOWN:
            folder = entry.dist.locate_file("") if entry.dist else "the path"
            removal = f"remove the metadata folder (.dist-info) that declares {entry.name!r} from {folder}"
        found[name, entry.name] = Origin(entry.name, name, version, removal, entry.load)
    for key in sorted(found):
        yield found[key]


def _field(distribution: Any, name: Literal["name", "version"]) -> str:
    """A field of the metadata, as far as it can be read: an interrupted removal leaves folders without.

    Once a backport of ``importlib.metadata`` is imported, as Dask does, distributions are of its class.
    """
    try:
        return getattr(distribution, name, None) or UNKNOWN
    except Exception:  # what a missing file or field raises depends on the version of Python
        return UNKNOWN


def builtin_plugins() -> Iterator[Origin]:
    """Core's own methods, which are registered through the same hooks as anyone's."""
    for name, module in BUILTIN.items():
        removal = f"reinstall it: pip install --force-reinstall {CORE}"
        yield Origin(name, CORE, core_version(), removal, partial(importlib.import_module, module))


def given_plugins(plugins: Mapping[str, Any]) -> Iterator[Origin]:
    """Modules or objects handed over by name, ordered by it."""
    for name in sorted(plugins):
        removal = "leave it out of the registry's plugins"
        yield Origin(name, name, UNKNOWN, removal, partial(plugins.__getitem__, name))


def core_version() -> str:
    """Version of this package, as far as it is installed."""
    try:
        return metadata.version(CORE)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def load(origin: Origin) -> list[Method] | PluginFailure:
    """What the plugin offers, or why it is set aside. Only an interruption by the user gets through."""
    try:
        return _methods_of(origin)
    except KeyboardInterrupt:
        raise
    # SystemExit and the like too: what an import raises is in the hands of strangers.
    except BaseException as error:
        details = "".join(traceback.format_exception(error))
        return PluginFailure(
            origin.plugin, origin.distribution, origin.version, _reason(error, origin), details
        )


def _methods_of(origin: Origin) -> list[Method]:
    """Load one plugin and call its hooks; anything wrong with it raises."""
    plugin = origin.load()
    _check_interface(plugin)
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


def _check_interface(plugin: Any) -> None:
    """Before anything else is looked at: what a later interface has would be taken for a mistake."""
    stated = getattr(plugin, hookspecs.API_VERSION_ATTRIBUTE, hookspecs.API_VERSION)
    if type(stated) is not int or stated < 1:
        raise PluginError(
            f"its {hookspecs.API_VERSION_ATTRIBUTE} must be a positive int such as {hookspecs.API_VERSION}, "
            f"got {stated!r}"
        )
    if stated > hookspecs.API_VERSION:
        raise _LaterInterfaceError(
            f"it is written for version {stated} of the plugin interface, and {CORE} {core_version()} has "
            f"version {hookspecs.API_VERSION}"
        )


def _collector(kind: Kind, origin: Origin, methods: list[Method]) -> hookspecs.Register:
    _, required, label = KINDS[kind]

    def register(name: str, method: type[Any]) -> None:
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
            raise PluginError(f"{name!r} is no name for a {label}: use a lower-case identifier")
        if not inspect.isclass(method):
            raise PluginError(f"{name!r} must be registered with a class, got {method!r}")
        if not callable(getattr(method, required, None)):
            raise PluginError(f"{method.__qualname__} is no {label}: it has no method {required!r}")
        _check_requires(method)
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


def _check_requires(cls: type[Any]) -> None:
    stated = getattr(cls, "requires", ())
    if isinstance(stated, property):
        return
    if not isinstance(stated, tuple | list) or not all(map(inspect.isclass, stated)):
        raise PluginError(
            f"{cls.__qualname__}.requires must be a tuple of capabilities, such as (Diagonal,), got {stated!r}"
        )


def _options(cls: type[Any]) -> Mapping[str, Option]:
    options = {}
    for p in inspect.signature(cls).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.kind is p.POSITIONAL_ONLY:
            raise PluginError(f"{cls.__qualname__} takes {p.name!r} by position only: options go by name")
        if p.name == "name":
            raise PluginError(
                f"{cls.__qualname__} has an option called 'name', which stands for the method itself in "
                "{'name': ..., option: value}: call the option something else"
            )
        annotation = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
        options[p.name] = Option(p.name, p.default, annotation)
    return options


def _reason(error: BaseException, origin: Origin) -> str:
    """What is wrong, and then what to do about it."""
    return f"{_message(error).rstrip('.')}. {_remedy(error, origin)}"


def _message(error: BaseException) -> str:
    try:
        if isinstance(error, SystemExit):
            return f"it called sys.exit({error.code!r}) while loading"
        text = " ".join(str(error).split())
    except Exception:  # its author's __str__ may fail like all the rest
        return f"{type(error).__name__} without a readable message"
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"


def _remedy(error: BaseException, origin: Origin) -> str:
    missing = str(error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if isinstance(error, _LaterInterfaceError) or missing == hookspecs.PROJECT:
        return (
            f"Upgrade {CORE}: pip install --upgrade {CORE}; or install a version of {origin.distribution} "
            f"written for {CORE} {core_version()}"
        )
    if isinstance(error, ModuleNotFoundError) and missing:
        return f"Install what provides {missing!r}, or {origin.removal}"
    return f"Tell its authors, or {origin.removal}"
