"""A plugin to start from: a package with a working solver, written from templates."""

from __future__ import annotations

import re
import tempfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template

from influence_framework.errors import InvalidInputError, PluginConflictError, UnknownMethodError
from influence_framework.hookspecs import API_VERSION
from influence_framework.loading import KINDS, UNKNOWN, core_version
from influence_framework.registry import OFFICIAL_DISTRIBUTIONS, OFFICIAL_EXECUTORS, Registry, default_registry

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "$module.py": "module.py",
    "tests/test_$name.py": "test.py",
}
"""Where each template of ``templates/plugin`` goes."""


def new_plugin(name: str, directory: Path, registry: Registry = default_registry) -> Path:
    """Write a package with a solver called ``name`` into a new folder of ``directory``.

    Args:
        name: Lower-case words joined by underscores.
        directory: An existing folder.
        registry: What is installed, whose names are taken.

    Returns:
        The folder ``influence-<name>``. It appears when it is complete, or not at all.

    Raises:
        InvalidInputError: The name cannot be used or is taken, the folder exists, or it cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise InvalidInputError(
            f"{name!r} cannot be the name of a solver, a module and a distribution at once: use lower-case "
            "letters and digits after a letter, words joined by underscores, such as 'my_method'."
        )
    module = f"influence_{name}"
    _check_free(name, module, registry)
    directory = directory.expanduser().absolute()
    folder = directory / module.replace("_", "-")
    if not directory.is_dir():
        raise InvalidInputError(
            f"Cannot write {folder}: the folder {directory} does not exist. Create it first."
        )
    if folder.exists():
        raise InvalidInputError(f"{folder} exists already: choose another name or --directory, or remove it.")
    _write(folder, _rendered(name, module))
    return folder


def _check_free(name: str, module: str, registry: Registry) -> None:
    for kind in KINDS:
        owner: str | None
        try:
            owner = registry.lookup(kind, name).distribution
        except UnknownMethodError:
            owner = (OFFICIAL_DISTRIBUTIONS | OFFICIAL_EXECUTORS).get(name)
        except PluginConflictError:
            owner = "several plugins"
        if owner:
            raise InvalidInputError(f"The name {name!r} is taken by {owner}: choose another.")
    if find_spec(module) is not None:
        raise InvalidInputError(f"A module {module!r} is installed already: choose another name than {name!r}.")


def _rendered(name: str, module: str) -> dict[str, str]:
    """Text of each file by its path in the folder."""
    version = core_version()
    major, minor, *_ = (version if version != UNKNOWN else "0.1").split(".")
    values = {
        "name": name,
        "module": module,
        "distribution": module.replace("_", "-"),
        "title": "".join(word.capitalize() for word in name.split("_")),
        "api_version": API_VERSION,
        "core": f"influence-framework>={major}.{minor},<{major}.{int(minor) + 1}",
    }
    templates = resources.files("influence_framework.cli") / "templates" / "plugin"
    return {
        Template(path).substitute(values): Template(
            (templates / f"{template}.template").read_text(encoding="utf-8")
        ).substitute(values)
        for path, template in FILES.items()
    }


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        # Beside its place, and moved there in one step when it is whole.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            for path, text in texts.items():
                file = Path(scratch) / folder.name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            (Path(scratch) / folder.name).rename(folder)
    except OSError as error:
        raise InvalidInputError(f"Cannot write {folder}: {error.strerror}.") from None
