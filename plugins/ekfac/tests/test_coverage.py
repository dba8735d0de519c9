"""What has no matrix form is said aloud, and becomes what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from plugins.ekfac.tests import dense
from tests import nets, reference
from tests.cases import Case, Instance, labels, normal
from tests.reference import assert_close

STRENGTH = 1e-2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return result


class Behind(nn.Module):
    """Uses the weight of a layer without the layer; beside it, or in its place."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.lin.weight)
        result: Tensor = self.head(torch.tanh(hidden + self.lin(x) if self.beside else hidden + self.lin.bias))
        return result


class TiedToTransposed(nn.Module):
    """One weight, which a layer applies as it is and another transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(3, 3), dense.Conv1D(3, 3)
        self.out.weight = self.lin.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.lin(x)))
        return result


class Transposed(nn.Module):
    """Positions first: what the layer is applied to has no samples in the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.lin(x.transpose(0, 1))).mean(0))
        return result


ROOT = Case(nets.Root)
# Case, parameters without a form, what the reasons say.
CASES: dict[str, tuple[Case, set[str], str]] = {
    "root": (ROOT, {"scale", "temperature"}, "Root has no matrix form"),
    "recurrent": (
        Case(nets.Recurrent, x=normal(3, 2), y=labels(2)),
        {f"cell.{kind}_{way}_l0" for kind in ("weight", "bias") for way in ("ih", "hh")},
        "GRU has no matrix form",
    ),
    "attention": (
        Case(Attention, x=normal(3, 2)),
        {
            f"attention.{name}"
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        },
        "MultiheadAttention has no matrix form",
    ),
    "behind its back, beside it": (
        Case(lambda: Behind(beside=True)),
        {"lin.weight", "lin.bias"},
        "in other ways than as the Linear it is in",
    ),
    "behind its back": (
        Case(lambda: Behind(beside=False)),
        {"lin.weight", "lin.bias"},
        "in other ways than as the Linear it is in",
    ),
    "tied to its transpose": (
        Case(TiedToTransposed),
        {"lin.weight"},
        r"shared by modules of different kinds \(Conv1D and Linear\)",
    ),
    "positions first": (
        Case(Transposed, x=normal(3, 2)),
        {"lin.weight", "lin.bias"},
        "in other ways than as the Linear it is in",
    ),
    "transposed convolution": (
        Case(lambda: nn.Sequential(nn.ConvTranspose1d(2, 1, 2), nn.Flatten(), nn.Linear(4, 3)), x=normal(2, 3)),
        {"0.weight", "0.bias"},
        "ConvTranspose1d has no matrix form",
    ),
    "nothing": (Case(nets.Unused), {"spare"}, "Unused has no matrix form"),
}


def compose(instance: Instance, **options: Any) -> inf.TorchInfluenceFunctionModel:
    solver = {"name": "ekfac", "samples": "exact", "score_rtol": 0.0} | options
    return inf.compose(
        instance.model, instance.loss, solver=solver, hessian_regularization=STRENGTH, preflight=False
    )


@pytest.mark.parametrize("solver", ["ekfac", "kfac"])
@pytest.mark.parametrize("name", CASES)
def test_the_error_names_parameters_reasons_and_the_fraction(name: str, solver: str) -> None:
    case, uncovered, reason = CASES[name]
    instance, _ = dense.made(case)
    with pytest.raises(inf.InvalidInputError, match=reason) as caught:
        compose(instance, name=solver).fit(instance.data)
    message = str(caught.value)
    sizes = {name: p.numel() for name, p in reference.trainable(instance.model).items()}
    total = sum(sizes.values())
    covered = total - sum(sizes[name] for name in uncovered)
    assert f"cover {covered} of {total} parameters ({covered / total:.1%})" in message
    assert all((f"{name}: " in message) == (name in uncovered) for name in sizes)
    for remedy in ("Freeze", "register_layer", "'diagonal'", "'identity'"):
        assert remedy in message


@pytest.mark.parametrize("uncovered", ["diagonal", "identity"])
@pytest.mark.parametrize("name", CASES)
def test_the_rest_gets_what_was_asked_for(name: str, uncovered: str) -> None:
    case, names, _ = CASES[name]
    instance, test = dense.made(case)
    model, loss, data = instance.model, instance.loss, instance.data
    rest = reference.positions(model, [p for p in reference.trainable(model) if p in names])
    exact = reference.gauss_newton(model, loss, data)
    influence = compose(instance, uncovered=uncovered).fit(data)
    gradients = reference.gradients(model, loss, [test])
    factors = influence.influence_factors(*test)
    diagonal = exact.diagonal()[rest] * (uncovered == "diagonal")
    assert_close(factors[:, rest], gradients[:, rest] / (diagonal + STRENGTH), 1e-10, "rest")
    # The layers are those of the net in which the others are frozen.
    parameters = sizes = reference.trainable(model)
    for frozen in names:
        parameters[frozen].requires_grad_(False)
    kept = torch.ones(len(exact), dtype=torch.bool)
    kept[rest] = False
    alone = compose(instance).fit(data).influence_factors(*test)
    assert_close(factors[:, kept], alone, 1e-10, "layers")
    assert_close(influence.influences(*test), factors @ gradients.T, 1e-10, "scores")
    assert_close(influence.self_influences(*test), (factors * gradients).sum(1), 1e-10, "self-influences")
    said = influence.inverses["full"].coverage.splitlines()
    assert said[0].startswith(
        f"{int(kept.sum())} of {len(kept)} parameters ({int(kept.sum()) / len(kept):.1%})"
    )
    fate = "its diagonal curvature" if diagonal.any() else "λ alone"
    assert {line.split(":")[0] for line in said if f": {fate}; " in line} == names
    listed = {name for line in said[1:] for name in line.split(":")[0].split(", ")}
    assert listed == set(sizes)


def test_blocks_cut_across_layers() -> None:
    """A block may have all of its parameters in no layer, and others a part of a layer."""
    instance, test = dense.made(ROOT)
    whole = compose(instance, uncovered="diagonal").fit(instance.data)
    for blocks in ("per_layer", "per_parameter"):
        influence = inf.compose(
            instance.model,
            instance.loss,
            solver={"name": "ekfac", "samples": "exact", "score_rtol": 0.0, "uncovered": "diagonal"},
            blocks=blocks,
            hessian_regularization=STRENGTH,
        ).fit(instance.data)
        found = influence.influence_factors(*test)
        assert_close(found[:, :4], whole.influence_factors(*test)[:, :4], 1e-10)


def test_the_diagonal_needs_a_source_that_has_it() -> None:
    instance, _ = dense.made(ROOT)
    solver = {"name": "ekfac", "uncovered": "diagonal"}
    with pytest.raises(inf.MissingCapabilityError, match="'identity'"):
        inf.compose(instance.model, instance.loss, solver=solver, source="hessian").fit(instance.data)


def test_an_operator_without_layers_is_refused() -> None:
    solver = inf.solvers["ekfac"].create()
    with pytest.raises(inf.MissingCapabilityError, match="LayerStatistics"):
        solver.fit(inf.DenseOperator(torch.eye(3)), 0.1)


@pytest.mark.filterwarnings(dense.LEFT_OUT)
@pytest.mark.parametrize("uncovered", ["diagonal", "identity"])
def test_without_regularisation_null_directions_are_left_out(uncovered: str) -> None:
    instance, test = dense.made(Case(nets.Unused))
    influence = compose(instance, uncovered=uncovered).fit(instance.data).with_regularization(0.0)
    factors = influence.influence_factors(*test)
    assert factors.isfinite().all()
    assert not factors[:, :2].any()
    assert factors[:, 2:].any()


@pytest.mark.filterwarnings(dense.LEFT_OUT)
def test_a_loss_with_no_curvature() -> None:
    """Then λ alone acts; without it nothing is left."""
    instance, test = dense.made(Case(lambda: nets.mlp(3, 2), nn.L1Loss(), y=normal(2)))
    influence = compose(instance).fit(instance.data)
    gradients = reference.gradients(instance.model, instance.loss, [test])
    assert_close(influence.influence_factors(*test), gradients / STRENGTH, 1e-10)
    assert_close(influence.influences(*test), gradients @ gradients.T / STRENGTH, 1e-10)
    assert not influence.with_regularization(0.0).influences(*test).any()
