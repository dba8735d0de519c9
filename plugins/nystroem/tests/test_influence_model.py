"""``NystroemSketchInfluence`` and the solver by name."""

from __future__ import annotations

import inspect
from typing import Any

import influence_framework_nystroem
import pytest
import torch
from influence_framework_nystroem import NystroemSketchInfluence, NystroemSolver

import influence_framework as inf
from tests import cases, fits, reference

CASE = "ragged_last_batch"


def sketched(case: str = CASE, strength: float | None = None, rank: Any = 999, **options: Any) -> Any:
    instance = cases.make(case)
    strength = fits.strength(case) if strength is None else strength
    model = NystroemSketchInfluence(instance.model, instance.loss, strength, rank, **options)
    return model.fit(instance.data)


def test_the_constructor_is_the_documented_one() -> None:
    documented, extra = [], []
    for parameter in list(inspect.signature(NystroemSketchInfluence.__init__).parameters.values())[1:]:
        kind = extra if parameter.kind is parameter.KEYWORD_ONLY else documented
        kind.append(parameter.name if parameter.default is parameter.empty else parameter.name + "=")
    assert documented == ["model", "loss", "hessian_regularization", "rank"]
    assert extra == ["source=", "blocks=", "memory_budget=", "seed="]


@pytest.mark.parametrize("blocks", ["full", "per_layer"])
def test_full_rank_scores_are_the_exact_ones(blocks: str) -> None:
    strength = fits.strength(CASE)
    instance = cases.make(CASE)
    exact = inf.compose(
        instance.model,
        instance.loss,
        solver="direct",
        source="gauss_newton",
        blocks=blocks,
        hessian_regularization=strength,
    ).fit(instance.data)
    test, train = cases.points(CASE, 3, seed=1), cases.points(CASE, 5, seed=2)
    for mode in inf.InfluenceMode:
        scores = sketched(source="gauss_newton", blocks=blocks).influences(*test, *train, mode=mode)
        # Rounding times a condition number of 1e3.
        reference.assert_close(scores, exact.influences(*test, *train, mode=mode), 1e-9)


def test_the_source_is_the_hessian_unless_another_is_named() -> None:
    curvature = cases.dense(CASE, "hessian")
    strength = 3 * -torch.linalg.eigvalsh(curvature)[0].item()
    with pytest.warns(inf.IndefiniteOperatorWarning, match="33.3% too small"):
        model = sketched(strength=strength)
    instance = cases.make(CASE)
    test = cases.points(CASE, 3, seed=1)
    gradients = reference.gradients(instance.model, instance.loss, [test])
    values, vectors = torch.linalg.eigh(curvature)
    expected = gradients @ vectors @ torch.diag(1 / (values.clamp_min(0) + strength)) @ vectors.T
    # The shift that makes the sketch definite is twice the most negative eigenvalue: two thirds of λ.
    reference.assert_close(model.influence_factors(*test), expected, 1e-9)
    assert isinstance(model.source, inf.hessian_sources["hessian"].cls)


def test_it_is_a_composition() -> None:
    model = sketched(rank=7, seed=3, source={"name": "gauss_newton", "precompute_grad": True})
    assert model.solver == NystroemSolver(rank=7, seed=3)
    assert model.source.precompute_grad
    instance = cases.make(CASE)
    same = inf.compose(
        instance.model,
        instance.loss,
        solver=NystroemSolver(rank=7, seed=3),
        hessian_regularization=fits.strength(CASE),
    ).fit(instance.data)
    test = cases.points(CASE, 3, seed=1)
    assert torch.equal(model.influences(*test), same.influences(*test))


def test_it_moves_and_changes_regularisation() -> None:
    test, strength = cases.points(CASE, 3, seed=1), fits.strength(CASE)
    model = sketched(source="gauss_newton", rank="auto")
    moved = model.with_regularization(10 * strength).to("cpu").influences(*test)
    again = sketched(source="gauss_newton", rank="auto", strength=10 * strength).influences(*test)
    assert isinstance(model.with_regularization(1.0), NystroemSketchInfluence)
    torch.testing.assert_close(moved, again)


# Without curvature, and with a parameter without effect, on purpose.
@pytest.mark.filterwarnings("ignore::influence_framework.PreflightWarning")
@pytest.mark.parametrize("name", ["relu", "conv", "mse", "absolute_error", "unused_parameter", "tied_weights"])
def test_at_full_rank_models_of_all_kinds_agree_with_the_dense_inverse(name: str) -> None:
    instance, curvature = cases.make(name), cases.dense(name, "gauss_newton")
    strength = 1e-3 * (torch.linalg.eigvalsh(curvature)[-1].item() or 1.0)
    test = cases.points(name, 3, seed=1)
    factors = sketched(name, strength, source="gauss_newton").influence_factors(*test)
    damped = curvature + strength * torch.eye(len(curvature), dtype=torch.float64)
    gradients = reference.gradients(instance.model, instance.loss, [test])
    reference.assert_close(factors, torch.linalg.solve(damped, gradients.T).T, 1e-9)


def saturating(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Not convex in the output."""
    return (output - target).square().log1p().sum(-1).mean()


@pytest.mark.parametrize(
    ("case", "loss", "source", "claim"),
    [
        (CASE, None, "gauss_newton", True),
        ("mse", None, "gauss_newton", True),
        ("bce_with_logits", None, "gauss_newton", True),
        ("quartic_loss", None, "gauss_newton", False),
        ("mse", saturating, "gauss_newton", False),
        ("mse", saturating, "empirical_fisher", True),
        (CASE, None, "hessian", False),
    ],
)
def test_sources_claim_to_be_positive_semidefinite_where_that_is_known(
    case: str, loss: Any, source: str, claim: bool
) -> None:
    instance = cases.make(case)
    problem = inf.Problem.build(instance.model, loss or instance.loss, instance.data)
    operator = cases.operator(source, problem)
    assert getattr(operator, "positive_semidefinite", False) is claim


def test_a_single_number_tells_nothing_of_a_loss_of_ones_own() -> None:
    def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()

    model = torch.nn.Linear(2, 1).double().eval()
    for count, claim in ((1, False), (2, True)):
        data = [(torch.arange(2.0 * count).double().reshape(count, 2), torch.ones(count, 1).double())]
        operator = cases.operator("gauss_newton", inf.Problem.build(model, squared, data))
        assert getattr(operator, "positive_semidefinite", False) is claim


def test_the_solver_has_a_name() -> None:
    registry = inf.Registry({"mine": influence_framework_nystroem}, installed=False)
    assert registry.failures == ()
    method = registry.solvers["nystroem"]
    assert method.create(rank="auto", tolerance=0.5) == NystroemSolver(rank="auto", tolerance=0.5)
    assert method.description.startswith("Randomised Nyström approximation")
