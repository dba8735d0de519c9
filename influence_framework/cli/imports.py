"""Models, losses and data by import path."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from influence_framework.cli.config import Config
from influence_framework.data import check_reiterable
from influence_framework.errors import InvalidInputError, did_you_mean

PATH = re.compile(r"[\w.]+:[\w.]+")


@contextmanager
def modules_beside(path: Path) -> Iterator[None]:
    """Let modules in the folder of ``path``, and in the present one, be imported."""
    before = list(sys.path)
    sys.path[:0] = [str(path.absolute().parent), str(Path.cwd())]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def load(config: Config) -> dict[str, Any]:
    """The model, loss and data that a config names.

    All are imported before the first one is called. A class, or a function that takes no argument, is called;
    anything else is taken as it is.

    Raises:
        InvalidInputError: All import paths that lead nowhere; or the first of the objects that is not what is
            needed, each with its key and line.
    """
    names = [name for name in ("model", "loss", "train", "test", "measurement") if name in config.values]
    found: dict[str, Any] = {}
    wrong = []
    for name in names:
        try:
            found[name] = _imported(config.values[name])
        except InvalidInputError as error:
            wrong.append(str(config.problem((name,), error)))
    if wrong:
        raise InvalidInputError("\n".join(wrong))
    made: dict[str, Any] = {}
    for name, thing in found.items():
        try:
            made[name] = _made(thing)
            _check(name, made)
        except InvalidInputError as error:
            raise config.problem((name,), f"{config.values[name]!r}: {error}") from None
    return made


def imported(path: str, *, call: bool = True) -> Any:
    """What an import path leads to.

    Args:
        path: As ``"module:attribute"``.
        call: Whether a class, or a function that takes no argument, is called.

    Raises:
        InvalidInputError: It leads nowhere, or calling it failed.
    """
    thing = _imported(path)
    return _made(thing) if call else thing


def _imported(path: str) -> Any:
    if not PATH.fullmatch(path):
        raise InvalidInputError(
            f"{path!r} is no import path: expected 'module:attribute', such as 'my_project:net'."
        )
    module, _, attributes = path.partition(":")
    try:
        thing: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name == module.partition(".")[0] else f" ({error})"
        raise InvalidInputError(
            f"no module {module!r} is found{missing}: it is looked for beside the config, in the current "
            "folder and among what is installed."
        ) from None
    except Exception as error:  # whatever the user's module raises
        raise InvalidInputError(f"importing {module!r} failed: {_said(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(thing, attribute):
            public = [name for name in dir(thing) if not name.startswith("_")]
            label = getattr(thing, "__name__", type(thing).__name__)
            raise InvalidInputError(f"{label!r} has no {attribute!r}.{did_you_mean(attribute, public)}")
        thing = getattr(thing, attribute)
    return thing


def _made(thing: Any) -> Any:
    if not (inspect.isclass(thing) or inspect.isroutine(thing)) or _needs_arguments(thing):
        return thing
    try:
        return thing()
    except Exception as error:  # whatever the user's function raises
        raise InvalidInputError(f"calling it failed: {_said(error)}") from error


def _needs_arguments(thing: Any) -> bool:
    try:
        inspect.signature(thing).bind()
    except TypeError:
        return True
    except ValueError:  # some builtins tell no signature
        return False
    return False


def _said(error: Exception) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno})"


def _check(name: str, made: Mapping[str, Any]) -> None:
    thing = made[name]
    kind = thing.__qualname__ if inspect.isclass(thing) else f"an object of type {type(thing).__name__}"
    arguments = " It takes arguments: name a function without any." if _is_factory(thing) else ""
    if name == "model" and not isinstance(thing, nn.Module):
        raise InvalidInputError(
            f"expected a torch.nn.Module, or a function that returns one, got {kind}.{arguments}"
        )
    if name == "loss" and (inspect.isclass(thing) or not (callable(thing) or hasattr(thing, "sample_losses"))):
        raise InvalidInputError(f"expected a loss(output, target) or an Objective, got {kind}.{arguments}")
    if name == "measurement" and (inspect.isclass(thing) or not callable(thing)):
        raise InvalidInputError(f"expected a function of (outputs, batch), got {kind}.")
    if name in ("train", "test"):
        if _is_factory(thing):
            raise InvalidInputError(f"expected a DataLoader, or a function that returns one.{arguments}")
        check_reiterable(thing)


def _is_factory(thing: Any) -> bool:
    return inspect.isclass(thing) or inspect.isroutine(thing)
