"""``influence report``: a store of scores as a page of HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence_framework.attribution.fingerprints import Survey
from influence_framework.attribution.reading import Stored
from influence_framework.cli.config import Config
from influence_framework.cli.imports import imported, modules_beside
from influence_framework.errors import InvalidInputError
from influence_framework.reporting import Page, Points, report


def write(
    store: Path,
    output: Path,
    *,
    config: Path | None = None,
    train: str | None = None,
    test: str | None = None,
    decode: str | None = None,
    self_influence: Path | None = None,
    count: int,
    title: str,
) -> tuple[Page, Path]:
    """Write the page of a store.

    Args:
        store: The folder.
        output: Where the page goes.
        config: The file by which ``influence run`` made the store: its loaders are what is shown.
        train: Import path of the training points, instead of those of the config.
        test: Of the test points.
        decode: Of a function that returns the text of one token id.
        self_influence: A store of self-influences of the same training points.
        count: Training points on each side of a test point.
        title: Of the page.

    Raises:
        InvalidInputError: No finished store, an import path that leads nowhere, or points that are not those
            of the scores.
    """
    stored = Stored.read(store)
    paths: dict[str, str | None] = {"train": train, "test": test}
    made: dict[str, Any] = {}
    with modules_beside(config or store):
        if config is not None:
            made = _loaders(Config.read(config), config, stored, paths)
        made |= {name: _named(f"--{name}", path) for name, path in paths.items() if path is not None}
        function = None if decode is None else _named("--decode", decode, call=False)
        points = {name: _points(thing, function) for name, thing in made.items()}
        page = report(
            stored,
            train=points.get("train"),
            test=points.get("test"),
            self_influence=self_influence,
            count=count,
            title=title,
        )
    return page, page.save(output)


def _loaders(config: Config, path: Path, stored: Stored, given: dict[str, str | None]) -> dict[str, Any]:
    """The loaders that a config names, where nothing else is given; they have to be those of the scores."""
    found = {}
    for name, what in (("train", "training points"), ("test", "test points")):
        if given[name] is not None or name not in config.values or what not in stored.manifest:
            continue
        try:
            loader = imported(config.values[name])
            same = Survey.of(loader, what).digest == stored.manifest[what]["fingerprint"]
        except InvalidInputError as error:
            raise config.problem((name,), error) from None
        if not same:
            raise config.problem(
                (name,),
                f"yields other points than the {stored.manifest[what]['count']} {what} that the store's scores "
                f"are of. Is {path} the file that made it?",
            )
        found[name] = loader
    return found


def _named(option: str, path: str, *, call: bool = True) -> Any:
    try:
        return imported(path, call=call)
    except InvalidInputError as error:
        raise InvalidInputError(f"{option}: {error}") from None


def _points(thing: Any, decode: Callable[[int], str] | None) -> Points:
    points = Points.of(thing)
    if decode is None or points.decode is not None:
        return points
    return replace(points, decode=decode)
