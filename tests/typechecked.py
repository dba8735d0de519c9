"""Types and shapes of our packages, checked at each call while tests run.

jaxtyping's own import hook does the same with three times the work of a small test: it compiles two functions
whenever a closure is made, binds arguments anew at every call, and checks them twice.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from functools import wraps
from types import CodeType, ModuleType
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeCallHintViolation

# Warnings are shown at the line outside of our packages and of jaxtyping that led to them.
__name__ = "jaxtyping.typechecked"

_checked = beartype(
    conf=BeartypeConf(
        # As for static checkers, an int is taken where a float is expected.
        is_pep484_tower=True,
        # Methods are decorated one by one, where beartype cannot know what Self is.
        hint_overrides=FrozenDict({Self: Any}),
    )
)


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a look at its arguments and its result, in which a name of an axis means one size."""
    checked: Callable[..., Any] | None = None

    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if checked is None:
            # At the first call all that annotations name is there.
            function.__annotations__ = _evaluated(function)
            checked = _checked(function)
        with jaxtyping.jaxtyped("context"):
            try:
                return checked(*args, **kwargs)
            except BeartypeCallHintViolation as error:
                raise jaxtyping.TypeCheckError(str(error)) from None

    return within


def _evaluated(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as objects; ``Any`` where they have a meaning to static checkers alone."""
    found = {}
    for name, annotation in function.__annotations__.items():
        found[name] = annotation
        if isinstance(annotation, str):
            try:
                found[name] = eval(annotation, function.__globals__)
            except (NameError, TypeError, AttributeError):
                found[name] = Any
    return found


def typechecked_fields(kind: type) -> type:
    """A class whose fields are checked where ``__init__`` was written for a dataclass."""
    if is_dataclass(kind) and "__init__" in vars(kind) and not hasattr(kind.__init__, "__wrapped__"):
        kind.__init__ = typechecked(kind.__init__)  # type: ignore[method-assign]
    return kind


FUNCTION, CLASS = "@typechecked", "@typechecked_fields"
"""Names that no module can have by itself."""


class _Decorated(ast.NodeTransformer):
    """Decorates functions, methods and classes, but not what is made anew at each call."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        # Innermost: what other decorators make of a function may have no annotations.
        node.decorator_list.append(ast.copy_location(ast.Name(FUNCTION, ast.Load()), node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        # Outermost: after @dataclass.
        node.decorator_list.insert(0, ast.copy_location(ast.Name(CLASS, ast.Load()), node))
        self.generic_visit(node)
        return node


class CheckedLoader(importlib.machinery.SourceFileLoader):
    """Decorates what it loads."""

    def get_code(self, fullname: str) -> CodeType:
        # Not from __pycache__, which holds what users run.
        path = self.get_filename(fullname)
        tree = _Decorated().visit(ast.parse(self.get_data(path), path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update({FUNCTION: typechecked, CLASS: typechecked_fields})
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self.prefix):
            return None
        for finder in self._others():
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if type(spec.loader) is importlib.machinery.SourceFileLoader:
                    spec.loader = CheckedLoader(spec.loader.name, spec.loader.path)
                return spec
        return None

    def _others(self) -> Iterable[Any]:
        return [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]


def install(prefix: str) -> None:
    """Check all packages whose names begin with ``prefix``; none may have been imported."""
    early = [name for name in sys.modules if name.startswith(prefix)]
    if early:
        raise RuntimeError(f"{early} were imported before their types could be checked")
    sys.meta_path.insert(0, _Finder(prefix))
