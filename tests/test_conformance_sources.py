"""The conformance kit on curvature sources: core's pass, each fault fails its own check, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from influence_framework.testing import ConformanceError, check_hessian_source, source_report
from tests.faulty_sources import FAULTS, Source, SurplusAsZeros

CASES = [
    pytest.param(source, name, id=getattr(source, "curvature", type(source)).__name__)
    for name, sources in FAULTS.items()
    for source in sources
]


@pytest.mark.parametrize("name", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}], ids=["streamed", "kept"])
def test_the_sources_of_core_pass_every_check(name: str, options: dict[str, Any]) -> None:
    check_hessian_source({"name": name, **options})


def test_a_correct_source_passes_every_check() -> None:
    check_hessian_source(Source())


@pytest.mark.parametrize(("source", "name"), CASES)
def test_a_fault_fails_its_own_check_alone(source: Any, name: str) -> None:
    report = source_report(source)
    assert {result.name for result in report.failures} == {name}, str(report)


def test_every_check_of_a_source_has_a_fault() -> None:
    assert {result.name for result in source_report(Source()).results} == set(FAULTS)


def test_the_error_shows_the_numbers() -> None:
    with pytest.raises(
        ConformanceError, match=r"(?s)FAILED  products_are_columnwise.*k = 26, column 21: off by"
    ):
        check_hessian_source(Source(SurplusAsZeros))
