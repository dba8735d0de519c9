"""``EkfacInfluence`` and the solvers by name."""

from __future__ import annotations

import inspect
from typing import Any

import influence_framework_ekfac
import pytest
import torch
from influence_framework_ekfac import EkfacInfluence, EkfacInverse, EkfacSolver, KfacSolver
from torch import Tensor, nn

import influence_framework as inf
from plugins.ekfac.tests import dense
from tests import nets, reference
from tests.cases import CASES, Case, labels, normal
from tests.reference import assert_close

STRENGTH = 1e-2
NETS = {
    "linear": CASES["ragged_last_batch"],
    "conv": Case(nets.conv_net, x=normal(1, 4, 4)),
    "embedding": Case(nets.TokenMean, x=labels(5, 4), y=labels(2)),
    "used twice": Case(nets.Reused, y=labels(2)),
}
LAYERS = {
    "linear": ["0", "2"],
    "conv": ["0", "3"],
    "embedding": ["embedding", "head"],
    "used twice": ["inner", "head"],
}


def fitted(name: str = "linear", **options: Any) -> tuple[EkfacInfluence, reference.Sample, reference.Sample]:
    instance, test = dense.made(NETS[name])
    settings: dict[str, Any] = {"hessian_regularization": STRENGTH, "samples": "exact", "score_rtol": 0.0}
    return EkfacInfluence(instance.model, **settings | options).fit(instance.data), test, instance.data[0]


def test_the_constructor_is_the_documented_one() -> None:
    documented: list[str] = []
    extra: list[str] = []
    for parameter in list(inspect.signature(EkfacInfluence.__init__).parameters.values())[1:]:
        named = parameter.name
        if parameter.default is not parameter.empty:
            named += f"={parameter.default!r}"
        (extra if parameter.kind is parameter.KEYWORD_ONLY else documented).append(named)
    assert documented == ["model", "update_diagonal=False", "hessian_regularization=0.0", "progress=False"]
    assert "loss=None" in extra


@pytest.mark.parametrize("update_diagonal", [True, False])
def test_cross_entropy_unless_a_loss_is_given(update_diagonal: bool) -> None:
    model, test, train = fitted(update_diagonal=update_diagonal)
    instance, _ = dense.made(NETS["linear"])
    assert isinstance(instance.loss, nn.CrossEntropyLoss)
    samples = dense.recorded(instance.model, instance.data, dense.exact_rows(instance.loss))
    inverse = dense.inverse(instance.model, samples, STRENGTH, refit=update_diagonal)
    left, right = (reference.gradients(instance.model, instance.loss, [part]) for part in (test, train))
    assert_close(model.influences(*test, *train), left @ inverse @ right.T, 1e-10)
    other, *_ = fitted(update_diagonal=update_diagonal, loss=nn.CrossEntropyLoss(label_smoothing=0.5))
    assert not torch.allclose(other.influences(*test, *train), model.influences(*test, *train))


@pytest.mark.parametrize("mode", list(inf.InfluenceMode))
@pytest.mark.parametrize("name", NETS)
def test_layers_are_keyed_by_module_and_keep_their_orientation(name: str, mode: inf.InfluenceMode) -> None:
    if name == "embedding" and mode is inf.InfluenceMode.Perturbation:
        name = "linear"
    model, test, train = fitted(name)
    few, many = (test[0][:2], test[1][:2]), train
    features = few[0].shape[1:] if mode is inf.InfluenceMode.Perturbation else ()
    for left, right in ((few, many), (many, few), (many, many)):
        by_layer = model.influences_by_layer(*left, *right, mode=mode)
        assert list(by_layer) == LAYERS[name]
        shape = (len(left[1]), len(right[1]), *features)
        assert {part.shape for part in by_layer.values()} == {shape}
        total = model.influences(*left, *right, mode.value)
        assert_close(sum(by_layer.values(), torch.zeros(())), total, 1e-10)
        factors = model.influence_factors_by_layer(*left)
        parts = model.influences_from_factors_by_layer(factors, *right, mode=mode.value)
        for layer in by_layer:
            # Without the factors the scores come from inputs and output gradients.
            assert_close(by_layer[layer], parts[layer], 1e-10, layer)
    if mode is inf.InfluenceMode.Up:
        one, other = model.influences_by_layer(*few, *many), model.influences_by_layer(*many, *few)
        for layer in one:
            assert_close(one[layer], other[layer].T, 1e-10)


def test_perturbation_by_layer_is_the_contraction_with_mixed_derivatives() -> None:
    model, test, (x, y) = fitted()
    mixed = reference.mixed_derivatives(model.model, nn.CrossEntropyLoss(), x, y)
    for layer, factors in model.influence_factors_by_layer(*test).items():
        at = reference.positions(model.model, [f"{layer}.weight", f"{layer}.bias"])
        expected = torch.tensordot(factors, mixed[:, at], dims=([1], [1]))
        assert_close(model.influences_by_layer(*test, x, y, mode="perturbation")[layer], expected, 1e-10)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("score_rtol", [0.0, 1e-4])
def test_self_influences_are_the_diagonal(name: str, score_rtol: float) -> None:
    model, _, train = fitted(name, score_rtol=score_rtol)
    own, pairs = model.self_influences(*train), model.influences(*train).diagonal()
    assert_close(own, pairs, 1e-10 if score_rtol == 0 else 1e-4)
    by_layer = model.self_influences_by_block(*train)
    assert list(by_layer) == LAYERS[name]
    assert_close(sum(by_layer.values(), torch.zeros(())), own, 1e-10)


@pytest.mark.filterwarnings(dense.LEFT_OUT)
@pytest.mark.parametrize("name", NETS)
def test_a_sweep_is_what_each_strength_gives(name: str) -> None:
    model, test, train = fitted(name)
    values = [1e-1, 1e-6, 0.0, STRENGTH]
    for pairs in ((test, train), (train, test), (test, ())):
        swept = model.explore_hessian_regularization(*pairs[0], values, *pairs[1])
        assert list(swept) == values
        for strength, by_layer in swept.items():
            alone, *_ = fitted(name, hessian_regularization=strength)
            expected = alone.influences_by_layer(*pairs[0], *pairs[1])
            moved = model.with_regularization(strength).influences_by_layer(*pairs[0], *pairs[1])
            assert list(by_layer) == list(expected) == LAYERS[name]
            for layer in expected:
                assert_close(by_layer[layer], expected[layer], 1e-10)
                assert_close(moved[layer], expected[layer], 1e-10)
    # What was fitted is as it was.
    again, *_ = fitted(name)
    assert_close(model.influences(*test, *train), again.influences(*test, *train), 1e-10)


def test_a_strength_for_each_layer_and_a_relative_one() -> None:
    model, test, train = fitted(hessian_regularization={"0": 1e-1, "2": 1e-3})
    uniform = model.explore_hessian_regularization(*test, [1e-1, 1e-3], *train)
    found = model.influences_by_layer(*test, *train)
    assert_close(found["0"], uniform[1e-1]["0"], 1e-10)
    assert_close(found["2"], uniform[1e-3]["2"], 1e-10)
    relative, *_ = fitted(update_diagonal=True, hessian_regularization=inf.RelativeRegularization(0.1))
    for name, inverse in relative.inverses.items():
        assert isinstance(inverse, EkfacInverse)
        mean = inverse.eigenvalues()[name].mean().item()
        assert inverse.regularization == pytest.approx(0.1 * mean)


@pytest.mark.parametrize("update_diagonal", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_without_regularisation_it_is_a_pseudo_inverse(name: str, update_diagonal: bool) -> None:
    model, test, train = fitted(name, hessian_regularization=0.0, update_diagonal=update_diagonal)
    found = []
    calls = (
        lambda: model.influences(*test, *train),
        lambda: model.self_influences(*train),
        lambda: torch.as_tensor(inf.attribute(model, [test], [train]).array),
    )
    for call in calls:
        with pytest.warns(inf.ConvergenceWarning, match="not measured.*left out directions of no curvature"):
            found.append(call())
        assert found[-1].isfinite().all()
        assert {reason for block in model.report.blocks for reason in block.reason} >= {inf.StopReason.SINGULAR}
    assert len(model.report) == len(model.inverses) * len(test[1])
    assert_close(found[2], found[0], 1e-12)
    instance, _ = dense.made(NETS[name])
    samples = dense.recorded(instance.model, instance.data, dense.exact_rows(instance.loss))
    spectra = dense.spectra(samples, refit=update_diagonal)

    def pseudo(values: Tensor) -> Tensor:
        return torch.where(values > 1e-14 * values.max(), 1 / values, 0)

    left, right = (reference.gradients(instance.model, instance.loss, [part]) for part in (test, train))
    expected = left @ dense.assembled(instance.model, spectra, pseudo) @ right.T
    assert_close(found[0], expected, 1e-8)


def test_a_strength_far_below_the_curvature_still_acts() -> None:
    """λ alone is all that null directions have; leaving them out would be another answer."""
    for dtype, strength in ((torch.float64, 1e-18), (torch.float32, 1e-9)):
        instance, test = dense.made(CASES["ragged_last_batch"])
        moved = instance.to(dtype)
        x, y = test[0].to(dtype), test[1]
        model = EkfacInfluence(moved.model, True, strength, samples="exact", score_rtol=0.0)
        with pytest.warns(inf.PreflightWarning, match="lost in the rounding"):
            model.fit(moved.data)
        inverse = model.inverses["2"]
        assert isinstance(inverse, EkfacInverse)
        null = inverse.eigenvalues()["2"].min()
        assert null < torch.finfo(dtype).eps * inverse.eigenvalues()["2"].max()
        # The direction in which all logits of the bias grow alike.
        alike = torch.zeros(inverse.shape[0], dtype=dtype)
        alike[-3:] = 1
        assert_close(inverse @ alike, alike / strength, 1e-2)
        assert model.influences(x, y).isfinite().all()


def test_it_is_a_composition() -> None:
    model, test, train = fitted(update_diagonal=True, samples=3, seed=5, weight_sharing="reduce")
    assert model.solver == EkfacSolver(samples=3, seed=5, weight_sharing="reduce", score_rtol=0.0)
    instance, _ = dense.made(NETS["linear"])
    same = inf.compose(
        instance.model,
        instance.loss,
        solver={"name": "ekfac", "samples": 3, "seed": 5, "weight_sharing": "reduce", "score_rtol": 0.0},
        blocks="per_layer",
        hessian_regularization=STRENGTH,
    ).fit(instance.data)
    assert torch.equal(model.influences(*test, *train), same.influences(*test, *train))


def test_plain_kfac_has_its_own_name_and_is_not_corrected() -> None:
    plain, test, train = fitted()
    instance, _ = dense.made(NETS["linear"])
    for solver in (
        KfacSolver(samples="exact", score_rtol=0.0),
        EkfacSolver(samples="exact", score_rtol=0.0, update_diagonal=False),
    ):
        named = inf.compose(
            instance.model, instance.loss, solver=solver, blocks="per_layer", hessian_regularization=STRENGTH
        ).fit(instance.data)
        assert torch.equal(named.influences(*test, *train), plain.influences(*test, *train))
    corrected, *_ = fitted(update_diagonal=True)
    assert not torch.allclose(corrected.influences(*test, *train), plain.influences(*test, *train))


def test_it_moves() -> None:
    model, test, train = fitted()
    before = model.influences(*test, *train)
    assert torch.equal(model.to("cpu").influences(*test, *train), before)
    assert isinstance(model.with_regularization(1.0), EkfacInfluence)


def test_a_bar_for_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(update_diagonal=True)
    assert not capsys.readouterr().err
    fitted(update_diagonal=True, progress=True)
    shown = capsys.readouterr().err
    assert "Covariances" in shown
    assert "Eigenvalues" in shown
    fitted(progress=True)
    assert "Eigenvalues" not in capsys.readouterr().err


def test_the_solvers_have_names() -> None:
    registry = inf.Registry({"mine": influence_framework_ekfac}, installed=False)
    assert registry.failures == ()
    assert registry.solvers["ekfac"].create(samples=2) == EkfacSolver(samples=2)
    assert registry.solvers["kfac"].create(samples="exact") == KfacSolver(samples="exact")
    assert registry.solvers["ekfac"].description.startswith("Eigenvalue-corrected")


class Recorded(nn.Module):
    """Notes the number of samples of each forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize(("solver", "passes"), [("ekfac", 2), ("kfac", 1)])
@pytest.mark.parametrize("blocks", ["full", "per_layer"])
def test_all_blocks_are_fitted_in_the_passes_of_one(
    blocks: str, solver: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Recorded(nets.mlp(3, 5, 4, 3).double().eval()).eval()
    x = torch.linspace(-1, 1, 27, dtype=torch.float64).view(9, 3)
    begun: list[int] = []
    original = inf.Problem.batches

    def counted(problem: inf.Problem, *arguments: Any) -> Any:
        begun.append(len(model.sizes))
        return original(problem, *arguments)

    monkeypatch.setattr(inf.Problem, "batches", counted)
    composed = inf.compose(model, nn.CrossEntropyLoss(), solver=solver, blocks=blocks, preflight=False)
    fitted = composed.fit([(x, torch.arange(9) % 3)])
    assert len(fitted.inverses) == (1 if blocks == "full" else 3)
    assert len(begun) == passes
    # From the first pass on the model sees the data as often as there are passes, whatever the blocks.
    assert model.sizes[begun[0] :] == [9] * passes
