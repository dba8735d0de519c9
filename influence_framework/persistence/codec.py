"""Compositions, options and samples as JSON, with their tensors beside it; names stand for classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_framework.errors import InvalidInputError, UnknownMethodError
from influence_framework.protocols import Solver
from influence_framework.refinement import RefinedSolver
from influence_framework.registry import Kind, Registry
from influence_framework.regularization import RelativeRegularization

PLAIN = (type(None), bool, int, str)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}


class Encoder:
    """From objects to JSON. What is no plain value becomes a mapping with one key, which says what it is.

    Args:
        registry: Where the names of methods are looked up.

    Attributes:
        tensors: What was met on the way, by the keys that the JSON refers to.
        methods: Names of the methods met, each with the distribution that it comes from.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.tensors: dict[str, Tensor] = {}
        self.methods: dict[str, str] = {}

    def value(self, value: Any, where: str) -> Any:
        """One value; ``where`` is what it is called in an error."""
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, RelativeRegularization):
            return {"relative": value.fraction}
        if isinstance(value, Tensor):
            key = f"value{len(self.tensors)}"
            self.tensors[key] = value
            return {"tensor": key}
        if type(value) in (tuple, list):
            return {type(value).__name__: [self.value(part, where) for part in value]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"mapping": [[key, self.value(part, where)] for key, part in value.items()]}
        if isinstance(value, Solver):
            return self.method("solver", value)
        raise InvalidInputError(
            f"{where} is a {type(value).__name__}, which cannot be written as JSON and tensors: numbers, "
            "strings, dtypes, tensors, solvers, and lists, tuples and mappings of these can."
        )

    def method(self, kind: Kind, method: Any) -> Any:
        """A solver or source: its name and its options."""
        if isinstance(method, RefinedSolver):
            return {
                "refined": {
                    "approximation": self.method("solver", method.approximation),
                    "refiner": self.method("solver", method.refiner),
                }
            }
        found = self.registry.method_of(kind, type(method))
        name = type(method).__name__
        if found is None:
            raise InvalidInputError(
                f"The {kind} {name} has no name in the registry, by which it would be found when the model is "
                "loaded: register it in a plugin, and pass registry= if that is not installed."
            )
        options = {}
        for option in found.options:
            if not hasattr(method, option):
                raise InvalidInputError(
                    f"{name} does not keep its option {option!r} as an attribute of that name."
                )
            options[option] = self.value(getattr(method, option), f"The option {option!r} of {found.name!r}")
        self.methods[found.name] = f"{found.distribution} {found.version}"
        return {kind: {"name": found.name, "options": options}}


class Decoder:
    """From JSON back to objects; the only classes are those of the registry's methods and of core.

    Args:
        registry: Where names are looked up.
        tensors: What the JSON refers to.
        methods: Where each method came from when it was saved.
    """

    def __init__(self, registry: Registry, tensors: Mapping[str, Tensor], methods: Mapping[str, str]) -> None:
        self.registry = registry
        self.tensors = tensors
        self.methods = methods
        self._tagged: Mapping[str, Callable[[Any], Any]] = {
            "float": float,
            "dtype": DTYPES.__getitem__,
            "relative": RelativeRegularization,
            "tensor": tensors.__getitem__,
            "tuple": lambda parts: tuple(map(self.value, parts)),
            "list": lambda parts: list(map(self.value, parts)),
            "mapping": lambda pairs: {key: self.value(part) for key, part in pairs},
            "solver": lambda spec: self._create("solver", spec),
            "source": lambda spec: self._create("source", spec),
            "refined": lambda parts: RefinedSolver(
                self.value(parts["approximation"]), self.value(parts["refiner"])
            ),
        }

    def value(self, encoded: Any) -> Any:
        """The object that :meth:`Encoder.value` or :meth:`Encoder.method` wrote."""
        if not isinstance(encoded, dict):
            return encoded
        ((tag, content),) = encoded.items()
        return self._tagged[tag](content)

    def _create(self, kind: Kind, spec: Mapping[str, Any]) -> Any:
        name = spec["name"]
        try:
            method = self.registry.lookup(kind, name)
        except UnknownMethodError as error:
            came = self.methods.get(name)
            raise UnknownMethodError(
                f"The model was saved with the {kind} {name!r}" + (f" of {came}" if came else "") + f". {error}"
            ) from None
        return method.create(**{option: self.value(value) for option, value in spec["options"].items()})
