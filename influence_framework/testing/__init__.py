"""The conformance kit: whether a method does what its protocol asks.

One line in the tests of a plugin makes every check of a solver, and so for the other kinds::

    from influence_framework.testing import check_solver

    def test_conformance() -> None:
        check_solver("mine")

It raises :class:`ConformanceError`, an ``AssertionError`` that shows all checks and the numbers of those
that failed. :func:`solver_report` returns the same as a :class:`ConformanceReport`, and so does the command
``influence check mine``. A method is given as in ``compose``: by name, by mapping with options, or as an
instance. Nothing here needs a test runner.

:mod:`influence_framework.testing.problems` has what the tests of a method need besides: matrices of a given
spectrum, an operator that counts its products, a small net with its data.
"""

from influence_framework.testing.kit import (
    check_executor,
    check_hessian_source,
    check_preconditioner,
    check_solver,
    executor_report,
    preconditioner_report,
    solver_report,
    source_report,
)
from influence_framework.testing.problems import ProductsOnly, normal, symmetric
from influence_framework.testing.report import CheckResult, ConformanceError, ConformanceReport

__all__ = [
    "CheckResult",
    "ConformanceError",
    "ConformanceReport",
    "ProductsOnly",
    "check_executor",
    "check_hessian_source",
    "check_preconditioner",
    "check_solver",
    "executor_report",
    "normal",
    "preconditioner_report",
    "solver_report",
    "source_report",
    "symmetric",
]
