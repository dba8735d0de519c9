"""Scores and factors against the one formula, with λ well below the largest eigenvalue."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from tests import cases, reference
from tests.cases import Instance
from tests.fits import DAMPING, STRUCTURES, compose, fitted, per_layer, strength
from tests.reference import Sample, assert_close

# Half of the digits that a condition number of 1e3 leaves.
EXACT = 1e-10


def inverses(name: str, structure: str) -> dict[str, Tensor]:
    """The dense inverse of each block, zero elsewhere."""
    model = cases.make(name).model
    blocks = STRUCTURES[structure][1](list(reference.trainable(model)))
    strengths = dict.fromkeys(blocks, strength(name))
    return reference.block_inverse(model, cases.dense(name, "gauss_newton"), blocks, strengths)


def gradients(instance: Instance, data: Sample) -> Tensor:
    return reference.gradients(instance.model, instance.loss, [data])


def assert_blocks_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: Tensor) -> None:
    """Each block's part, relative to the total: a block may contribute next to nothing."""
    assert list(actual) == list(expected)
    size = scale.abs().max()
    for name, part in expected.items():
        assert actual[name].shape == part.shape
        error = ((actual[name] - part).abs().max() / size).item()
        assert error <= EXACT, f"block {name}: {error:.2e} of the largest score"


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "name",
    [
        *("ragged_last_batch", "frozen_first_layer", "frozen_bias", "no_bias", "tied_weights", "conv", "mse"),
        *("module_used_twice", "root_and_scalar_parameters", "unused_parameter", "recurrent", "sum"),
        "bce_with_logits",
    ],
)
def test_scores_and_factors_follow_the_formula(name: str, structure: str) -> None:
    instance, influence = fitted(name, structure, preflight=name != "unused_parameter")
    test, train = cases.points(name, 3, 1), cases.points(name, 5, 2)
    parts = inverses(name, structure)
    inverse = torch.stack(list(parts.values())).sum(0)
    g_test, g_train = gradients(instance, test), gradients(instance, train)
    mixed = reference.mixed_derivatives(instance.model, instance.loss, *train)

    factors = influence.influence_factors(*test)
    assert_close(factors, g_test @ inverse, EXACT, "factors")
    by_block = influence.influence_factors_by_block(*test)
    names = STRUCTURES[structure][1](list(reference.trainable(instance.model)))
    # The columns of a block are in the order in which it lists its parameters.
    own = {key: reference.positions(instance.model, listed) for key, listed in names.items()}
    assert_blocks_close(by_block, {key: (g_test @ parts[key])[:, at] for key, at in own.items()}, factors)

    for mode, other, contract in (
        ("up", g_train, reference.up_scores),
        ("perturbation", mixed, reference.perturbation_scores),
    ):
        expected = contract(inverse, g_test, other)
        scores = influence.influences(*test, *train, mode=mode)
        assert_close(scores, expected, EXACT, f"scores {mode}")
        assert_close(
            influence.influences_from_factors(factors, *train, mode), expected, EXACT, f"from factors {mode}"
        )
        separate = {key: contract(part, g_test, other) for key, part in parts.items()}
        blocks = influence.influences_by_block(*test, *train, mode)
        assert_blocks_close(blocks, separate, expected)
        assert_close(torch.stack(list(blocks.values())).sum(0), scores, EXACT, f"sum of the blocks {mode}")
        assert_blocks_close(
            influence.influences_from_factors_by_block(by_block, *train, mode), separate, expected
        )


@pytest.mark.parametrize(("n_test", "n_train"), [(2, 7), (7, 2), (1, 1), (1, 4), (4, 1), (25, 30)])
@pytest.mark.parametrize("structure", ["full", "per_layer"])
def test_pitfall_more_test_than_training_points_transpose_nothing(
    n_test: int, n_train: int, structure: str
) -> None:
    # 25 right-hand sides are more than the 15 parameters of the model.
    instance, influence = fitted("tied_weights", structure)
    test, train = cases.points("tied_weights", n_test, 3), cases.points("tied_weights", n_train, 4)
    parts = inverses("tied_weights", structure)
    g_test, g_train = gradients(instance, test), gradients(instance, train)
    mixed = reference.mixed_derivatives(instance.model, instance.loss, *train)
    up = {key: reference.up_scores(part, g_test, g_train) for key, part in parts.items()}
    perturbed = {key: reference.perturbation_scores(part, g_test, mixed) for key, part in parts.items()}
    for mode, expected in ((inf.InfluenceMode.Up, up), (inf.InfluenceMode.Perturbation, perturbed)):
        total = torch.stack(list(expected.values())).sum(0)
        assert_blocks_close(influence.influences_by_block(*test, *train, mode=mode), expected, total)
        assert_close(influence.influences(*test, *train, mode=mode), total, EXACT)
    factors = influence.influence_factors(*test)
    assert_close(factors, g_test @ torch.stack(list(parts.values())).sum(0), EXACT)


@pytest.mark.parametrize("budget", [1, 2**20])
@pytest.mark.parametrize("sizes", [[1] * 11, [9, 1, 1], [4, 4, 3]])
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_pitfall_the_inverse_is_that_of_the_whole_data(solver: str, sizes: list[int], budget: int) -> None:
    name = "linear_classifier"
    options = {"name": "cg", "rtol": 1e-13, "atol": 0.0} if solver == "cg" else solver
    instance = cases.make(name, sizes)
    influence = compose(instance, solver=options, hessian_regularization=strength(name), memory_budget=budget)
    influence.fit(instance.data)
    test, train = cases.points(name, 3, 1), cases.points(name, 4, 2)
    expected = reference.up_scores(
        inverses(name, "full")["full"], gradients(instance, test), gradients(instance, train)
    )
    # The residual of CG is magnified by the condition number 1e3.
    assert_close(influence.influences(*test, *train), expected, 1e-9)


@pytest.mark.parametrize("structure", ["full", "per_layer"])
def test_the_test_points_stand_in_for_missing_training_points(structure: str) -> None:
    instance, influence = fitted("mse", structure)
    test = cases.points("mse", 4, 1)
    scores = influence.influences(*test)
    inverse = torch.stack(list(inverses("mse", structure).values())).sum(0)
    g = gradients(instance, test)
    assert_close(scores, reference.up_scores(inverse, g, g), EXACT)
    assert_close(scores, scores.T, EXACT, "symmetry")
    assert torch.equal(scores, influence.influences(*test, *test))
    mixed = reference.mixed_derivatives(instance.model, instance.loss, *test)
    perturbed = influence.influences(*test, mode="perturbation")
    assert_close(perturbed, reference.perturbation_scores(inverse, g, mixed), EXACT)


def test_pitfall_a_mode_as_a_string_is_that_mode() -> None:
    _, influence = fitted("mse")
    test, train = cases.points("mse", 2, 1), cases.points("mse", 3, 2)
    for mode in inf.InfluenceMode:
        expected = influence.influences(*test, *train, mode=mode)
        assert torch.equal(influence.influences(*test, *train, mode=mode.value), expected)
        assert torch.equal(influence.influences(*test, *train, mode), expected)
    assert influence.influences(*test, *train, mode="up").shape == (2, 3)
    assert influence.influences(*test, *train, mode="perturbation").shape == (2, 3, 3)


def test_shapes_for_images() -> None:
    _, influence = fitted("conv", "per_layer")
    test, train = cases.points("conv", 3, 1), cases.points("conv", 2, 2)
    assert influence.influences(*test, *train).shape == (3, 2)
    assert influence.influences(*test, *train, mode="perturbation").shape == (3, 2, 1, 4, 4)
    for part in influence.influences_by_block(*test, *train, mode="perturbation").values():
        assert part.shape == (3, 2, 1, 4, 4)
    assert influence.influence_factors(*test).shape == (3, 47)
    none = influence.influence_factors(*test)[:0]
    assert influence.influences_from_factors(none, *train).shape == (0, 2)
    assert influence.influences_from_factors(none, *train, mode="perturbation").shape == (0, 2, 1, 4, 4)


@pytest.mark.parametrize(
    "name", ["mapping_inputs", "tuple_inputs", "embedding", "transformer", "branching_loss"]
)
def test_other_inputs_and_losses_in_mode_up(name: str) -> None:
    instance, influence = fitted(name)
    test, train = cases.points(name, 2, 1), cases.points(name, 4, 2)
    inverse = inverses(name, "full")["full"]
    expected = reference.up_scores(inverse, gradients(instance, test), gradients(instance, train))
    assert_close(influence.influences(*test, *train), expected, EXACT)


@pytest.mark.parametrize("source", ["hessian", "empirical_fisher"])
def test_other_curvatures(source: str) -> None:
    # Above the magnitude of the most negative eigenvalue of the Hessian.
    lowest, *_, largest = torch.linalg.eigvalsh(cases.dense("conv", source)).tolist()
    regularization = max(0.0, -2 * lowest) + DAMPING * largest
    instance, influence = fitted("conv", source=source, hessian_regularization=regularization)
    test, train = cases.points("conv", 3, 1), cases.points("conv", 4, 2)
    inverse = torch.linalg.inv(
        cases.dense("conv", source) + regularization * torch.eye(47, dtype=torch.float64)
    )
    expected = reference.up_scores(inverse, gradients(instance, test), gradients(instance, train))
    assert_close(influence.influences(*test, *train), expected, EXACT)


@pytest.mark.parametrize("structure", ["full", "per_layer"])
@pytest.mark.parametrize("budget", [1, 6000, 8000, 40_000])
@pytest.mark.parametrize("mode", inf.InfluenceMode)
def test_a_small_memory_budget_gives_the_same_scores(
    mode: inf.InfluenceMode, budget: int, structure: str
) -> None:
    # From one point at a time over two or three, which leave a remainder, to all five.
    test, train = cases.points("conv", 5, 1), cases.points("conv", 5, 2)
    _, plenty = fitted("conv", structure)
    _, little = fitted("conv", structure, memory_budget=budget)
    expected = plenty.influences(*test, *train, mode)
    assert_close(little.influences(*test, *train, mode), expected, EXACT)
    assert_close(little.influence_factors(*test), plenty.influence_factors(*test), EXACT)
    factors = plenty.influence_factors(*test)
    assert_close(little.influences_from_factors(factors, *train, mode), expected, EXACT)


@pytest.mark.parametrize("structure", ["full", "per_layer", "per_parameter"])
@pytest.mark.parametrize("mode", inf.InfluenceMode)
def test_float32(mode: inf.InfluenceMode, structure: str, device: torch.device) -> None:
    instance, influence = fitted("conv", structure)
    single = instance.to(torch.float32, device)
    names = list(reference.trainable(instance.model))
    other = compose(single, blocks=STRUCTURES[structure][0](names), hessian_regularization=strength("conv"))
    other.fit(single.data)
    test, train = cases.points("conv", 3, 1), cases.points("conv", 4, 2)
    converted = [t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for t in (*test, *train)]
    scores = other.influences(*converted, mode=mode)
    assert scores.dtype == torch.float32
    assert scores.device.type == device.type
    # Rounding of C is magnified by the condition number 1e3: 1e3 · P · 6e-8, of which it reaches a part.
    assert_close(scores, influence.influences(*test, *train, mode), 1e-3)


@pytest.mark.parametrize("name", ["cg", "jacobi"])
def test_iterative_solver_agrees_with_direct(name: str) -> None:
    preconditioner = {} if name == "cg" else {"preconditioner": "jacobi"}
    solver = {"name": "cg", "rtol": 1e-12, "atol": 0.0, "maxiter": 2000} | preconditioner
    test, train = cases.points("conv", 5, 1), cases.points("conv", 4, 2)
    for structure in ("full", "per_layer"):
        _, direct = fitted("conv", structure)
        _, iterative = fitted("conv", structure, solver=solver)
        for mode in inf.InfluenceMode:
            expected = direct.influences(*test, *train, mode)
            # The residual of 1e-12 is magnified by at most the condition number 1e3.
            assert_close(iterative.influences(*test, *train, mode), expected, 1e-8)


def test_per_block_regularization() -> None:
    instance, influence = fitted(
        "tied_weights", "per_layer", hessian_regularization={"first": 0.01, "second": 0.3}
    )
    blocks = per_layer(list(reference.trainable(instance.model)))
    curvature = cases.dense("tied_weights", "gauss_newton")
    parts = reference.block_inverse(instance.model, curvature, blocks, {"first": 0.01, "second": 0.3})
    test, train = cases.points("tied_weights", 3, 1), cases.points("tied_weights", 4, 2)
    g_test, g_train = gradients(instance, test), gradients(instance, train)
    expected = {key: reference.up_scores(part, g_test, g_train) for key, part in parts.items()}
    assert_blocks_close(
        influence.influences_by_block(*test, *train), expected, torch.stack([*expected.values()])
    )


@pytest.mark.parametrize("directions", [True, False])
@pytest.mark.parametrize("structure", ["full", "per_layer", "interleaved"])
@pytest.mark.parametrize("name", ["ragged_last_batch", "conv", "embedding", "recurrent", "frozen_bias", "sum"])
def test_both_ways_to_contract_give_the_same(
    name: str, structure: str, directions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, influence = fitted(name, structure)
    test, train = cases.points(name, 4, 1), cases.points(name, 6, 2)
    ways: list[bool] = []
    monkeypatch.setattr(inf.gradients, "plain_layers_of", lambda *_: None)
    monkeypatch.setattr(inf.gradients, "_directions_pay", lambda *_: ways.append(directions) or directions)
    scores = influence.influences_by_block(*test, *train)
    assert ways == [directions]
    parts = inverses(name, structure)
    g_test, g_train = gradients(instance, test), gradients(instance, train)
    expected = {key: g_test @ part @ g_train.T for key, part in parts.items()}
    assert_blocks_close(scores, expected, torch.stack(list(expected.values())).sum(0))


def test_few_factors_of_a_wide_net_go_along_directions_and_many_through_gradients() -> None:
    def pays(layers: nn.Sequential, x: Tensor, count: int) -> bool:
        loader = [(x, torch.zeros(len(x), dtype=torch.long))]
        problem = inf.Problem.build(layers.eval(), nn.CrossEntropyLoss(), loader)
        return inf.gradients._directions_pay(count, problem)

    wide = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert pays(wide, torch.randn(5, 64), 50)
    assert not pays(wide, torch.randn(5, 64), 2000)
    assert not pays(conv, torch.randn(5, 1, 8, 8), 200)
