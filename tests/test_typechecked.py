"""The run-time checks that all tests run under: what they refuse, and what they leave alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import pytest
import torch

from tests import typechecked

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from functools import cache
from jaxtyping import Float
from torch import Tensor

def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    return a @ b

def wrong(a: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return a[1:]

def unknown(a: Missing, b: int = 1) -> Missing:
    return a

@cache
def cached(a: int) -> Later | None:
    return None

def closure() -> object:
    def inner(a: int) -> int:
        return a
    return inner

@dataclass
class Fields:
    a: Float[Tensor, "n"]
    b: Float[Tensor, "n"]

    @property
    def size(self) -> str:
        return len(self.a)

    @classmethod
    def made(cls, n: int) -> Fields:
        return cls(n, n)

class Later:
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "checked_example.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    typechecked.install("checked_example")
    yield importlib.import_module("checked_example")
    del sys.modules["checked_example"]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.product(ones(2, 3), ones(2, 3)),
        lambda m: m.product(ones(2, 3), ones(3)),
        lambda m: m.product(ones(2, 3).int(), ones(3, 2)),
        lambda m: m.cached("one"),
        lambda m: m.unknown(1, "one"),
        lambda m: m.Fields(ones(2), ones(3)),
        lambda m: m.Fields.made(2.5),
    ],
)
def test_arguments_of_another_type_or_shape_are_refused(
    module: ModuleType, call: Callable[[Any], object]
) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        call(module)


@pytest.mark.parametrize("call", [lambda m: m.wrong(ones(2)), lambda m: m.Fields(ones(2), ones(2)).size])
def test_results_of_another_type_or_shape_are_refused(
    module: ModuleType, call: Callable[[Any], object]
) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        call(module)


def test_a_name_means_one_size_within_one_call_alone(module: ModuleType) -> None:
    for n in (2, 3):
        assert module.product(ones(n, 4), ones(4, n)).shape == (n, n)


def test_annotations_for_static_checkers_alone_are_left_out(module: ModuleType) -> None:
    assert module.unknown(1) == 1


def test_closures_are_left_as_they_are(module: ModuleType) -> None:
    assert module.closure()("one") == "one"


@pytest.mark.usefixtures("as_user")
def test_users_meet_no_checks(module: ModuleType) -> None:
    assert module.wrong(ones(2)).shape == (1,)


def test_what_was_imported_before_is_not_passed_over() -> None:
    with pytest.raises(RuntimeError, match=r"\['influence_framework.*imported before"):
        typechecked.install("influence_framework")
