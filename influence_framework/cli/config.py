"""The file that tells ``influence run`` what to do: read and checked before anything is imported."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from influence_framework.attribution.outputs import Output, resolve_output
from influence_framework.errors import InvalidInputError, did_you_mean
from influence_framework.regularization import Regularization, RelativeRegularization, check_regularization
from influence_framework.solving import check_policy
from influence_framework.specs import resolve

Place = tuple[str | int, ...]
"""The keys that lead to a value."""

METHOD = "a name, or a table with the key 'name' and options"


@dataclass(frozen=True)
class Key:
    """A key of the file.

    Attributes:
        types: What its value may be, as ``tomllib`` gives it.
        wanted: The same in words.
        required: Whether it has to be there.
    """

    types: tuple[type, ...]
    wanted: str
    required: bool = False


IMPORT = Key((str,), "an import path 'module:attribute'", required=True)
KEYS: Mapping[str, Key] = {
    "model": IMPORT,
    "loss": IMPORT,
    "train": IMPORT,
    "test": Key((str,), "an import path 'module:attribute'"),
    "measurement": Key((str,), "an import path 'module:attribute'"),
    "query_rank": Key((int,), "a positive whole number"),
    "store": Key((str,), "a folder to write to", required=True),
    "output": Key((str, dict), METHOD),
    "executor": Key((str, dict), METHOD),
    "solver": Key((str, dict), METHOD, required=True),
    "source": Key((str, dict), METHOD),
    "refine": Key((str, dict), METHOD),
    "blocks": Key((str, dict), "'full', 'per_layer', 'per_parameter', or a table of lists of parameter names"),
    "hessian_regularization": Key(
        (int, float, dict),
        "a number, {fraction = 0.1} of the mean eigenvalue, or a table with either per block",
    ),
    "memory_budget": Key((int,), "a positive number of bytes"),
    "on_failure": Key((str,), "'raise', 'warn' or 'ignore'"),
    "preflight": Key((bool,), "true or false"),
}
COMPOSED = (
    "solver",
    "source",
    "refine",
    "blocks",
    "hessian_regularization",
    "memory_budget",
    "on_failure",
    "preflight",
)
"""Keys that ``compose`` takes under the same names."""


@dataclass(frozen=True)
class Config:
    """What a file asks for, with every name in it known to exist.

    Attributes:
        path: The file.
        values: Its keys and values.
        lines: The line of each value.
        output: What to keep of the scores.
        query_rank: What factors of test points are compressed to, if they are.
        executor: Where they are computed.
        composition: Arguments of ``compose``.
    """

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[Place, int]
    output: Output
    query_rank: int | None
    executor: Any
    composition: Mapping[str, Any]

    @property
    def store(self) -> Path:
        """The folder to write to, seen from the folder of the file."""
        return self.path.parent / Path(self.values["store"]).expanduser()

    def problem(self, place: Place, said: object) -> InvalidInputError:
        """An error about the value at ``place``."""
        return InvalidInputError(_problem(self.path, self.lines, place, said))

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read a file and check everything in it that needs no import of the user's own.

        Raises:
            InvalidInputError: All that is wrong, each with its key and line.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"Cannot read {path}: {error}.") from None
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InvalidInputError(f"{path} is not TOML: {error}.") from None
        lines = lines_of(text)
        wrong = [_problem(path, lines, place, said) for place, said in _misfits(values)]
        if wrong:
            raise InvalidInputError("\n".join(wrong))
        checked = _Checked(path, values, lines, wrong)
        output = checked.at("output", resolve_output, "matrix")
        rank = checked.at("query_rank", _positive) if "query_rank" in values else None
        executor = checked.at("executor", lambda spec: resolve("executor", spec), "sequential")
        composition = checked.composition()
        if output is not None:
            checked.together(output)
        if wrong:
            raise InvalidInputError("\n".join(wrong))
        return cls(path, values, lines, output, rank, executor, composition)


def _problem(path: Path, lines: Mapping[Place, int], place: Place, said: object) -> str:
    line = next((lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in lines), None)
    where = f"{path}, line {line}" if line is not None else f"{path}"
    return f"{where}: {'.'.join(map(str, place))}: {said}"


def lines_of(text: str) -> dict[Place, int]:
    """The line at which the statement that gives each value begins.

    ``tomllib`` tells no lines. But the first lines of a file are TOML by themselves wherever a statement
    ends, so that the statement that adds a value is the first after which the value is there.
    """
    found: dict[Place, int] = {}
    rows = text.replace("\r\n", "\n").split("\n")
    begin = None
    for number, row in enumerate(rows, start=1):
        if begin is None and row.strip() and not row.lstrip().startswith("#"):
            begin = number
        try:
            parsed = tomllib.loads("\n".join(rows[:number]))
        except tomllib.TOMLDecodeError:
            continue
        for place in _places(parsed):
            found.setdefault(place, begin or number)
        begin = None
    return found


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    parts: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, part in parts:
        yield (*place, key)
        yield from _places(part, (*place, key))


def _misfits(values: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Keys that are unknown, missing or of another type."""
    for name, value in values.items():
        key = KEYS.get(name)
        if key is None:
            yield (name,), f"unknown key.{did_you_mean(name, KEYS)} Known: {', '.join(KEYS)}."
        elif not isinstance(value, key.types) or (isinstance(value, bool) and bool not in key.types):
            yield (name,), f"expected {key.wanted}, got {value!r}."
    for name, key in KEYS.items():
        if key.required and name not in values:
            yield (name,), f"missing; expected {key.wanted}."


@dataclass
class _Checked:
    """Turns values into what they stand for, and notes what is wrong with them."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[Place, int]
    wrong: list[str]

    def at(self, name: str, convert: Callable[[Any], Any], default: Any = None) -> Any:
        """What the value of the key stands for; where that fails, ``None``, and the failure is noted."""
        try:
            return convert(self.values.get(name, default))
        except Exception as error:  # whatever the options of a method raise
            said = str(error) if isinstance(error, InvalidInputError | LookupError | TypeError) else repr(error)
            self.note(self._nearest(name, said), said)
            return None

    def note(self, place: Place, said: object) -> None:
        """Note that something is wrong."""
        self.wrong.append(_problem(self.path, self.lines, place, said))

    def _nearest(self, name: str, said: str) -> Place:
        """The value below the key that an error names, by key or by value: it may be an option of an option."""
        words = _words(said)
        below = [place for place in self.lines if place[0] == name and len(place) > 1]
        by_key = [(place, str(place[-1])) for place in below if str(place[-1]) in words]
        by_value = [(place, value) for place in below if (value := self._value(place)) in words]
        # Of several, the innermost; of several of these, what is named first.
        found = max(by_key or by_value, key=lambda pair: (len(pair[0]), -words.index(pair[1])), default=None)
        return found[0] if found else (name,)

    def _value(self, place: Place) -> str:
        value: Any = self.values
        for key in place:
            value = value[key]
        return value if isinstance(value, str) else ""

    def composition(self) -> dict[str, Any]:
        """The arguments of ``compose`` that are given."""
        convert: dict[str, Callable[[Any], Any]] = {
            "solver": lambda spec: resolve("solver", spec),
            "source": lambda spec: resolve("source", spec),
            "refine": lambda spec: resolve("solver", spec),
            "blocks": _blocks,
            "hessian_regularization": _regularization,
            "memory_budget": partial(_positive, what="number of bytes"),
            "on_failure": check_policy,
            "preflight": bool,
        }
        return {name: self.at(name, convert[name]) for name in COMPOSED if name in self.values}

    def together(self, output: Output) -> None:
        """Check what belongs together."""
        if output.pairs and "test" not in self.values:
            self.note(("test",), f"missing; the output {output.name!r} is of pairs.")
        if not output.pairs and "test" in self.values:
            self.note(("test",), f"the output {output.name!r} is of training points alone: leave test out.")
        if not output.pairs and "measurement" in self.values:
            self.note(
                ("measurement",), f"is of test points; the output {output.name!r} has none: leave it out."
            )
        if not output.pairs and "query_rank" in self.values:
            self.note(("query_rank",), f"is of test points; the output {output.name!r} has none: leave it out.")
        if output.name in ("matrix", "factors") and importlib.util.find_spec("zarr") is None:
            self.note(("store",), "needs zarr: pip install 'influence-framework[store]'")


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in text).split()


def _blocks(value: str | Mapping[str, Any]) -> str | Mapping[str, Sequence[str]]:
    if isinstance(value, str):
        known = ("full", "per_layer", "per_parameter")
        if value not in known:
            raise InvalidInputError(
                f"expected {KEYS['blocks'].wanted}, got {value!r}.{did_you_mean(value, known)}"
            )
        return value
    for name, names in value.items():
        if not isinstance(names, list) or not all(isinstance(parameter, str) for parameter in names):
            raise InvalidInputError(f"{name!r} has to be a list of parameter names, got {names!r}.")
    return value


def _regularization(value: Any) -> Regularization:
    def strength(one: Any) -> Any:
        relative = isinstance(one, dict) and set(one) == {"fraction"}
        return RelativeRegularization(one["fraction"]) if relative else one

    several = isinstance(value, dict) and set(value) != {"fraction"}
    found: Regularization = {name: strength(one) for name, one in value.items()} if several else strength(value)
    check_regularization(found)
    return found


def _positive(value: int, what: str = "whole number") -> int:
    if value <= 0:
        raise InvalidInputError(f"expected a positive {what}, got {value}.")
    return value
