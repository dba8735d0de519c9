"""Tests of core; ``typechecked`` is the run-time checker behind ``--jaxtyping-packages``."""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

typechecked = beartype(
    conf=BeartypeConf(
        # As for static checkers, an int is taken where a float is expected.
        is_pep484_tower=True,
        # Methods are decorated one by one, where beartype cannot know what Self is.
        hint_overrides=FrozenDict({Self: Any}),
    )
)
