"""The conformance kit on executors: core's pass, each fault fails its own check, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import distributed
from torch.distributed import HashStore

from influence_framework.testing import ConformanceError, check_executor, executor_report
from tests.faulty_executors import FAULTS, Backwards, EqualUnitsOnce, InTurn, OneThread

CASES = [
    pytest.param(executor, name, id=type(executor).__name__)
    for name, executors in FAULTS.items()
    for executor in executors
]


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone; of two, see ``tests/test_distributed.py``."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("executor", ["sequential", InTurn(), Backwards(), OneThread()], ids=str)
@pytest.mark.usefixtures("as_user")
def test_correct_executors_pass_every_check(executor: Any) -> None:
    check_executor(executor)


@pytest.mark.usefixtures("group")
@pytest.mark.usefixtures("as_user")
def test_the_one_of_torch_passes_every_check() -> None:
    check_executor("torch_distributed")


@pytest.mark.parametrize(("executor", "name"), CASES)
@pytest.mark.usefixtures("as_user")
def test_a_fault_fails_its_own_check_alone(executor: Any, name: str) -> None:
    report = executor_report(executor)
    assert {result.name for result in report.failures} == {name}, str(report)


@pytest.mark.usefixtures("as_user")
def test_every_check_of_an_executor_has_a_fault() -> None:
    assert {result.name for result in executor_report(InTurn()).results} == set(FAULTS)


@pytest.mark.usefixtures("as_user")
def test_the_error_shows_what_was_given_and_what_was_expected() -> None:
    with pytest.raises(ConformanceError, match=r"(?s)FAILED  each_unit_once.*gave .*(1, 1).*expected"):
        check_executor(EqualUnitsOnce())
