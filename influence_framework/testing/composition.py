"""Checks of a method as part of a model: its options, and its use by block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from influence_framework.advice.probes import spectrum, workload
from influence_framework.compose import compose, resolve
from influence_framework.costs import Cost, Costed
from influence_framework.errors import InfluenceError
from influence_framework.gradients import sample_gradients
from influence_framework.operators import to_dense
from influence_framework.parameters import Blocks
from influence_framework.registry import Kind, Registry
from influence_framework.testing.problems import batches, network, problem, samples
from influence_framework.testing.subjects import DAMPING, SolverSubject

NAMES = list(dict(network().named_parameters()))
STRUCTURES: dict[str, Any] = {
    "full": "full",
    "per_layer": "per_layer",
    "per_parameter": "per_parameter",
    "own blocks": {"odd": NAMES[::-1][::2], "even": NAMES[::-1][1::2]},
}


@runtime_checkable
class MethodSubject(Protocol):
    """A method under test, of either kind."""

    kind: ClassVar[Kind]

    @property
    def method(self) -> Any: ...

    @property
    def registry(self) -> Registry: ...


def options_make_an_equal_instance(subject: MethodSubject) -> Iterator[str]:
    """The options of an instance make an equal one, by name where it has one, and its repr shows its class."""
    method = subject.method
    parameters = inspect.signature(type(method)).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = {p.name: getattr(method, p.name) for p in parameters if p.kind in named}
    registered = subject.registry.method_of(subject.kind, type(method))
    if registered is None:
        again = type(method)(**options)
    else:
        again = resolve(subject.kind, {"name": registered.name, **options}, subject.registry)
    if again != method:
        yield f"{again!r} is not equal to {method!r}"
    if " at 0x" in repr(method) or type(method).__name__ not in repr(method):
        yield f"its repr is {method!r}, expected {type(method).__name__}(…)"


def every_block_structure(subject: SolverSubject) -> Iterator[str]:
    """In a composed model, factors under every block structure are those of the blocks fitted one by one."""
    made = problem()
    whole = subject.source.operator(made, made.parameters)
    strength = DAMPING["net"] * float(torch.linalg.eigvalsh(to_dense(whole))[-1])
    batch = samples(4, seed=8)
    gradients = sample_gradients(made, made.parameters, batch)
    for structure, spec in STRUCTURES.items():
        model = compose(
            network(),
            nn.CrossEntropyLoss(),
            solver=subject.solver,
            source=subject.source,
            blocks=spec,
            hessian_regularization=strength,
            registry=subject.registry,
        )
        factors = model.fit(batches()).influence_factors_by_block(*batch)
        for block, names in Blocks.resolve(spec, made.parameters).items():
            part = made.parameters.subset(names)
            index = made.parameters.indices_of(part)
            rows = gradients if index is None else gradients[:, index]
            inverse = subject.solver.fit(subject.source.operator(made, part), strength)
            expected = inverse.solve(rows.T.contiguous()).value.T
            error = float(torch.linalg.matrix_norm(factors[block] - expected))
            # The residual that is allowed, times a condition number of 1/DAMPING.
            allowed = 2 * subject.allowed() / DAMPING["net"] * float(torch.linalg.matrix_norm(expected))
            if not error <= allowed:
                yield f"{structure}, block {block!r}: off by {error:.1e}, expected at most {allowed:.1e}"


def its_cost_makes_sense(subject: SolverSubject) -> Iterator[str]:
    """If it says what it takes, that is a cost of finite amounts, none of them negative, with its reasons."""
    if not isinstance(subject.solver, Costed):
        return
    made = problem()
    operator = subject.source.operator(made, made.parameters)
    found = spectrum(made, operator, made.parameters.numel, seed=0)
    asked = workload(made, operator, found, DAMPING["net"] * found.largest, (3, made.size), copies=12)
    try:
        cost = subject.solver.cost(asked)
    except InfluenceError:
        return  # with the reason why it cannot
    if not isinstance(cost, Cost):
        yield f"cost returned {type(cost).__name__}, expected a Cost"
        return
    works = {"fit": cost.fit, "solve": cost.solve, "scoring": cost.scoring, "apply": cost.apply}
    amounts = {name: getattr(cost, name) for name in ("fit_bytes", "held_bytes", "solve_bytes")}
    for name, work in works.items():
        if work is not None:
            pairs = (*work.products, *work.minibatches)
            amounts |= {
                f"{name}.{part}": getattr(work, part) for part in ("passes", "diagonals", "flops", "traffic")
            }
            amounts |= {f"{name}, products": min(map(min, pairs))} if pairs else {}
    for name, amount in amounts.items():
        if not 0 <= amount < float("inf"):
            yield f"{name} is {amount}"
    if not all(isinstance(reason, str) for reason in cost.reasons):
        yield f"reasons are {cost.reasons!r}, expected strings"


COMPOSITION_CHECKS = (every_block_structure, options_make_an_equal_instance, its_cost_makes_sense)
