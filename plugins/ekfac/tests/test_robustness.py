"""What is left behind, precisions, budgets, wrong options, and ``ekfac`` in front of conjugate gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from influence_framework_ekfac import EkfacInverse, EkfacSolver, KfacSolver
from torch import Tensor, nn

import influence_framework as inf
from plugins.ekfac.tests import dense
from tests import nets, reference
from tests.cases import CASES, Case, Instance, labels, normal
from tests.reference import assert_close
from tests.test_influence_state import Alarm, assert_same, trace
from tests.test_second_derivatives import Doubled

STRENGTH = 1e-2
SOLVER = {"name": "ekfac", "samples": "exact", "score_rtol": 0.0}


def compose(instance: Instance, **options: Any) -> inf.TorchInfluenceFunctionModel:
    settings: dict[str, Any] = {"solver": SOLVER, "hessian_regularization": STRENGTH}
    return inf.compose(instance.model, instance.loss, **settings | options)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher", "hessian"])
@pytest.mark.parametrize("name", ["batch_norm", "frozen_bias", "module_used_twice", "conv"])
def test_nothing_is_left_on_the_model(name: str, source: str) -> None:
    instance, test = dense.made(CASES[name])
    next(instance.model.children()).train()
    before = trace(instance.model)
    influence = compose(instance, solver={"name": "ekfac", "samples": 2}, source=source).fit(instance.data)
    influence.influences(*test, *instance.data[0])
    influence.self_influences(*test)
    influence.influence_factors(*test)
    assert_same(before, trace(instance.model))
    assert all(parameter.grad is None for parameter in instance.model.parameters())


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("where", ["loss", "model"])
def test_an_exception_in_the_middle_of_a_fit_leaves_nothing_behind(where: str) -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    calls = 0
    for at in range(1, 200):
        alarm = Alarm(at)
        model = nn.Sequential(*instance.model.children(), *([alarm] if where == "model" else [])).eval()
        influence = inf.compose(
            model,
            alarm if where == "loss" else instance.loss,
            solver={"name": "ekfac", "samples": 2},
            hessian_regularization=STRENGTH,
            memory_budget=20_000,
        )
        before = trace(model) | {"attributes": None}
        try:
            influence.fit(instance.data)
        except KeyboardInterrupt:
            calls += 1
            assert not influence.is_fitted
            after = trace(model) | {"attributes": None}
            assert_same(before, after)
            continue
        break
    # Every call of the loss or the model, through both passes, was one of these.
    assert 10 < calls < 199
    assert influence.is_fitted


@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("name", ["ragged_last_batch", "conv", "embedding", "batch_norm", "module_used_twice"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_precisions(name: str, source: str, dtype: torch.dtype, tolerance: float) -> None:
    instance, (x, y) = dense.made(CASES[name])
    x = x.to(dtype) if x.is_floating_point() else x
    # Rounded to the precision first, so that only the arithmetic differs.
    low = instance.to(dtype)
    high, strength = low.to(torch.float64), 1e-1
    exact = x.double() if x.is_floating_point() else x
    for rtol in (0.0, 1e-4):
        options = {
            "solver": SOLVER | {"score_rtol": rtol},
            "source": source,
            "hessian_regularization": strength,
        }
        found, wanted = (compose(which, **options).fit(which.data) for which in (low, high))
        scores = found.influences(x, y)
        assert scores.dtype is dtype
        assert found.influence_factors(x, y).dtype is dtype
        assert_close(scores, wanted.influences(exact, y), tolerance)
        assert_close(found.self_influences(x, y), wanted.self_influences(exact, y), tolerance)


def test_outputs_of_points_are_checked_in_the_pass_that_scores_them() -> None:
    """Finite points whose outputs are not, and labels that there are not, on either side."""
    instance, (x, y) = dense.made(Case(lambda: nn.Linear(3, 3), sizes=[4]))
    low = instance.to(torch.float32)
    with torch.no_grad():
        low.model.weight.fill_(10.0)
    influence = compose(low).fit(low.data)
    x = x.float()
    calls: list[int] = []
    handle = low.model.register_forward_hook(lambda *_: calls.append(1))
    influence.influences(x, y, x, y)
    handle.remove()
    assert len(calls) == 2
    large = torch.full_like(x, 3e38)
    for bad, error in (((large, y), inf.NonFiniteError), ((x, y + 7), inf.InvalidInputError)):
        for work in (
            lambda bad=bad: influence.influences(*bad, x, y),
            lambda bad=bad: influence.influences(x, y, *bad),
            lambda bad=bad: influence.self_influences(*bad),
        ):
            with pytest.raises(error, match=r"on the points|out of bounds"):
                work()


def test_half_precision_adds_up_many_layers() -> None:
    """In bfloat16 itself a sum of ones stops at 256."""
    low = dense.made(Case(lambda: nn.Linear(3, 3), sizes=[4]))[0].to(torch.bfloat16)
    inverse = cast(EkfacInverse, compose(low).fit(low.data).inverses["full"])
    ((name, layer),) = inverse.layers.items()
    base = cast(inf.LayerStatistics, inverse.base)
    passed: list[Any] = []

    def keep(batches: Iterator[Any]) -> list[Tensor]:
        passed.extend(batches)
        return []

    base.layer_sums(base.cover().layers, 1, torch.Generator(), keep)
    ((batches, size),) = passed
    (batch,) = batches.values()
    once = inverse.side({name: batch}, size)
    many = dataclasses.replace(inverse, layers={str(i): layer for i in range(600)})
    side = many.side({str(i): batch for i in range(600)}, size)
    for found, one in (
        (many.scores(side, side), inverse.scores(once, once)),
        (many.self_scores(side), inverse.self_scores(once)),
    ):
        assert found.dtype is torch.bfloat16
        assert_close(found.double(), 600 * one.double(), 1e-2)


@pytest.mark.parametrize("name", ["ragged_last_batch", "conv", "embedding", "module_used_twice"])
def test_any_memory_budget_gives_the_same(name: str) -> None:
    instance, test = dense.made(CASES[name])
    x, y = instance.data[0]
    plenty = compose(instance).fit(instance.data)
    for budget in (1, 100_000):
        scarce = compose(instance, solver=SOLVER | {"memory_budget": budget}, memory_budget=budget)
        scarce.fit(instance.data)
        assert_close(scarce.influences(*test, x, y), plenty.influences(*test, x, y), 1e-10)
        assert_close(scarce.influences(x, y), plenty.influences(x, y), 1e-10)
        assert_close(scarce.self_influences(x, y), plenty.self_influences(x, y), 1e-10)
        assert_close(scarce.influence_factors(*test), plenty.influence_factors(*test), 1e-10)


@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher"])
def test_models_without_second_derivatives_work(source: str) -> None:
    once, test = dense.made(Case(Doubled))
    twice = Instance(nn.Sequential(nn.Linear(3, 3)).double().eval(), once.loss, once.data)
    with torch.no_grad():
        for mine, theirs in zip(twice.model.parameters(), once.model.parameters(), strict=True):
            mine.copy_(2 * theirs)
    # Outputs are those of a layer of twice the size, in whose coordinates gradients are half as large.
    found = compose(once, source=source).fit(once.data)
    wanted = compose(twice, source=source, hessian_regularization=STRENGTH / 4).fit(twice.data)
    assert_close(found.influences(*test), wanted.influences(*test), 1e-10)
    assert_close(found.self_influences(*test), wanted.self_influences(*test), 1e-10)
    assert_close(4 * found.influence_factors(*test), 2 * wanted.influence_factors(*test), 1e-10)


# Widths, scale of the last input, the most that is left of the iterations. The Hessian of a classifier of
# one layer is the Gauss-Newton matrix; that of a deeper one is indefinite at this λ.
SYSTEMS = {"gauss_newton": ((12, 8, 3), 0, 0.7), "hessian": ((12, 3), -3, 0.25)}


@pytest.mark.parametrize(
    ("source", "preconditioner"), [("gauss_newton", "ekfac"), ("hessian", "ekfac"), ("hessian", "kfac")]
)
def test_it_saves_conjugate_gradients_iterations(source: str, preconditioner: str) -> None:
    widths, last, most = SYSTEMS[source]

    def inputs(n: int) -> Tensor:
        drawn: Tensor = 3 * normal(widths[0])(n)
        return drawn * torch.logspace(0, last, widths[0], dtype=torch.float64)

    instance, test = dense.made(Case(lambda: nets.mlp(*widths), x=inputs, sizes=[150]))
    rhs = reference.gradients(instance.model, instance.loss, [test]).T
    iterations = []
    for chosen in (None, {"name": preconditioner, "samples": "exact"}):
        solver = {"name": "cg", "preconditioner": chosen, "rtol": 1e-6, "atol": 0.0}
        fitted = compose(instance, solver=solver, source=source, hessian_regularization=1e-4).fit(instance.data)
        solution = fitted.inverses["full"].solve(rhs)
        assert solution.converged.all()
        iterations.append(solution.iterations.double().mean().item())
    assert iterations[1] < most * iterations[0]


def test_a_preconditioner_is_definite_without_regularisation() -> None:
    """One draw for each of two samples cannot show all of the curvature of ten classes."""
    instance, _ = dense.made(Case(lambda: nets.mlp(3, 10), y=labels(10), sizes=[2]))
    solver = {"name": "cg", "preconditioner": "ekfac", "rtol": 1e-8, "atol": 0.0}
    fitted = compose(instance, solver=solver, hessian_regularization=0.0).fit(instance.data)
    inverse = fitted.inverses["full"]
    exact = reference.gauss_newton(instance.model, instance.loss, instance.data)
    rhs = exact @ torch.randn(len(exact), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = inverse.solve(rhs)
    assert solution.converged.all()
    assert_close(exact @ solution.value, rhs, 1e-6)
    used: Any = inverse.preconditioner  # type: ignore[attr-defined]
    applied = used @ torch.eye(len(exact), dtype=torch.float64)
    assert torch.linalg.eigvalsh((applied + applied.T) / 2)[0] > 0
    # With λ, it is the inverse itself.
    plain = EkfacSolver().fit(inverse.base, STRENGTH)  # type: ignore[attr-defined]
    assert torch.equal(plain.preconditioner() @ rhs, plain @ rhs)


def test_columns_of_any_number() -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    inverse = compose(instance).fit(instance.data).inverses["full"]
    size = inverse.shape[0]
    whole = inverse @ torch.eye(size, dtype=torch.float64)
    assert_close(whole, whole.T, 1e-10)
    for count in (0, 1, size + 5):
        columns = torch.randn(size, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert_close(inverse @ columns, whole @ columns, 1e-10)
        solution = inverse.solve(columns)
        assert solution.reason == (inf.StopReason.APPROXIMATION,) * count
        assert solution.residual.isnan().all()


def test_statistics_that_overflow_are_refused() -> None:
    instance, _ = dense.made(Case(lambda: nn.Linear(3, 3), sizes=[4]))
    low = instance.to(torch.float32)
    large = Instance(low.model, low.loss, [(1e25 * x, y) for x, y in low.data])
    with torch.no_grad():
        for parameter in large.model.parameters():
            parameter.mul_(1e-25)
    with pytest.raises(inf.NonFiniteError, match=r"inputs of '\(root\)'"):
        compose(large, solver=SOLVER | {"dtype": torch.float32}).fit(large.data)
    assert compose(large).fit(large.data).is_fitted


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("solver", [EkfacSolver, KfacSolver])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("samples", value) for value in (0, -1, 2.5, True, "all", None)],
        *[("weight_sharing", value) for value in ("mean", None)],
        *[("uncovered", value) for value in ("drop", None)],
        *[("score_rtol", value) for value in (-1e-3, 1.0, float("nan"), "0")],
        *[("dtype", value) for value in (torch.float16, torch.bfloat16, torch.int64, "float64")],
        *[("memory_budget", value) for value in (0, -1)],
        *[("seed", value) for value in (-1, 0.5, True, None)],
    ],
)
def test_wrong_options_are_refused(solver: Any, option: str, value: Any) -> None:
    with pytest.raises(inf.InvalidInputError, match=f"^{option} is .* got "):
        solver(**{option: value})


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EkfacSolver().samples = 3  # type: ignore[misc]
