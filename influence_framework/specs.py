"""What stands for a method of any kind: a name, a mapping with options, or an instance."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from influence_framework.errors import InvalidInputError, UnknownOptionError
from influence_framework.protocols import Solver
from influence_framework.registry import KINDS, Kind, Method, Registry, default_registry

Spec = str | Mapping[str, Any]


def resolve(kind: Kind, spec: Any, registry: Registry = default_registry) -> Any:
    """The solver, source, objective or executor that ``spec`` (a name, a mapping or an instance) stands for."""
    _, required, label = KINDS[kind]
    if isinstance(spec, str):
        return registry.lookup(kind, spec).create()
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise UnknownOptionError(
                f"A {label} given as a mapping needs the key 'name', got {sorted(map(str, spec))}."
            )
        method = registry.lookup(kind, spec["name"])
        options = {option: value for option, value in spec.items() if option != "name"}
        return method.create(**_resolve_nested(method, options, registry))
    if inspect.isclass(spec):
        raise InvalidInputError(
            f"Got the class {spec.__qualname__} as {label}: pass an instance, {spec.__qualname__}(...)."
        )
    if not callable(getattr(spec, required, None)):
        raise InvalidInputError(
            f"Expected a {label} as a name, a mapping with 'name', or an instance with {required!r}, got "
            f"{type(spec).__name__}."
        )
    return spec


def _resolve_nested(method: Method, options: dict[str, Any], registry: Registry) -> dict[str, Any]:
    """Replace names and mappings in options that are annotated as solvers by instances."""
    nested = solver_options(method.cls)
    return {
        option: resolve("solver", value, registry)
        if option in nested and isinstance(value, str | Mapping)
        else value
        for option, value in options.items()
    }


def solver_options(cls: type[Any]) -> set[str]:
    """The options annotated as solvers, be it on the class, on a base or on ``__init__``."""
    return {
        name
        for owner in (*cls.__mro__, cls.__init__)
        for name, annotation in inspect.get_annotations(owner).items()
        if _is_solver(annotation, owner)
    }


def _is_solver(annotation: Any, owner: Any) -> bool:
    module = sys.modules.get(owner.__module__)
    namespace = getattr(owner, "__globals__", None) or vars(module or object)
    alone = SimpleNamespace(__annotations__={"option": annotation})
    try:
        # One by one, since an annotation that exists for the type checker alone cannot be looked up.
        hint = get_type_hints(alone, globalns=dict(namespace))["option"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return False
    return Solver in (hint, *get_args(hint))
