"""Which parameters have a matrix form: what is refused, and that what is believed is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import influence_framework as inf
from influence_framework.layers import Cover, cover, covering, forms, layer_batch, true_gradients
from tests import reference
from tests.reference import assert_close

LOSS = nn.CrossEntropyLoss()


class Behind(nn.Module):
    """Uses a weight behind its module's back."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(functional.linear(x, self.used.weight) + self.used(x)))
        return logits


class NeverApplied(Behind):
    """Uses a weight behind its module's back, and the module not at all."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(functional.linear(x, self.used.weight, self.used.bias)))
        return logits


class Twice(nn.Module):
    """One module applied twice, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.again(x))))
        logits: Tensor = self.last(torch.tanh(self.right(torch.tanh(self.left(hidden)))))
        return logits


class PositionFirst(nn.Module):
    """Applies a layer to positions, with samples in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.first(x.unflatten(1, (1, 4)).transpose(0, 1)))[0])
        return logits


class Sensitivity(nn.Module):
    """Returns the derivative of a net in its input, taken by ``torch.func`` in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.middle = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def net(points: Tensor) -> Tensor:
            found: Tensor = self.middle(torch.tanh(self.first(points)))
            return found

        _, tangent = torch.func.jvp(net, (x,), (torch.ones_like(x),))
        logits: Tensor = self.last(tangent)
        return logits


class Scaled(nn.Module):
    """A layer of nobody's: a weight for every feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledForm(inf.MatrixForm):
    def __init__(self, module: nn.Module, places: Mapping[str, Tensor]) -> None:
        self.places = places["scale"].view(1, -1, 1)

    def inputs(self, x: Tensor) -> Tensor:
        return x.new_ones(1, len(x), 1, 1)

    def output_gradients(self, x: Tensor, gradients: Tensor) -> Tensor:
        return (gradients * x)[:, None, :, None, :]


def build(module: nn.Module) -> tuple[inf.Problem, tuple[Tensor, Tensor], Cover]:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    data = (torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)))
    problem = inf.Problem.build(module.double().eval(), LOSS, [data])
    return problem, data, cover(problem, problem.parameters)


def check_gradients(problem: inf.Problem, data: tuple[Tensor, Tensor], covered: Cover) -> None:
    found = layer_batch(problem, covered.layers, data, true_gradients(problem))
    expected = reference.gradients(problem.model, LOSS, [data])
    for layer, batch in found.items():
        assert_close(batch.gradients()[0], expected[:, layer.form.places], 1e-12, layer.name)
        square = expected[:, layer.form.places].square().sum()
        assert_close(torch.tensor(batch.square(), dtype=torch.float64), square, 1e-12, layer.name)


def test_a_weight_used_behind_its_module_is_refused() -> None:
    problem, data, covered = build(Behind())
    assert [layer.name for layer in covered.layers] == ["last"]
    assert list(covered.uncovered) == ["used.weight", "used.bias"]
    assert "other ways" in covered.uncovered["used.weight"]
    check_gradients(problem, data, covered)


@pytest.mark.parametrize("together", [False, True])
def test_a_weight_of_a_module_that_is_never_applied_is_refused(together: bool) -> None:
    """Also where no other layer is in its block, so that nothing is recorded."""
    problem, _, covered = build(NeverApplied())
    if not together:
        covered = cover(problem, problem.parameters.subset(problem.parameters.names[:2]))
        assert not covered.layers
    assert list(covered.uncovered) == ["used.weight", "used.bias"]


@pytest.mark.parametrize("behind", [False, True])
def test_blocks_are_covered_as_they_are_alone(behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out of all layers at once where all of them hold, else block by block."""
    torch.manual_seed(0)
    model = (Behind() if behind else nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))).double().eval()
    data = [(torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)))]
    tried: list[int] = []
    confirmed = covering._confirmed

    def counted(problem: inf.Problem, parameters: Any, layers: Any) -> Any:
        tried.append(len(layers))
        return confirmed(problem, parameters, layers)

    monkeypatch.setattr(covering, "_confirmed", counted)
    problem = inf.Problem.build(model, LOSS, data)
    names = problem.parameters.names
    blocks = [problem.parameters.subset(part) for part in (names[:2], names[2:])]
    # As before the fit, where each block is looked at by itself.
    cover(dataclasses.replace(problem, parameters=blocks[1], whole=problem.parameters), blocks[1])
    found = [cover(problem, block) for block in blocks]
    assert tried == ([2, 1, 1, 1] if behind else [2])
    for block, each in zip(blocks, found, strict=True):
        alone = cover(inf.Problem.build(model, LOSS, data), block)
        assert [layer.parts for layer in each.layers] == [layer.parts for layer in alone.layers]
        assert each.uncovered == alone.uncovered
        for one, other in zip(each.layers, alone.layers, strict=True):
            assert torch.equal(one.form.places, other.form.places)


def test_uses_add_up_and_shared_weights_are_one_layer() -> None:
    problem, data, covered = build(Twice())
    assert not covered.uncovered
    names = [layer.name for layer in covered.layers]
    assert sorted(names) == ["again", "last", "left", "left.weight", "right"]
    shared = covered.layers[names.index("left.weight")]
    assert list(shared.modules) == ["left", "right"]
    places = torch.cat([layer.form.places.flatten() for layer in covered.layers])
    assert places.sort().values.tolist() == list(range(problem.parameters.numel))
    check_gradients(problem, data, covered)


# What torch loads for forward mode.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_layers_within_a_derivative_do_not_stop_the_others() -> None:
    model = Sensitivity()
    problem, data, covered = build(model)
    assert "last" in [layer.name for layer in covered.layers]
    check_gradients(problem, data, covered)
    fitted = inf.compose(model, LOSS, solver="direct", hessian_regularization=1e-2).fit([data])
    dense = reference.gauss_newton(model, LOSS, [data])
    inverse = torch.linalg.inv(dense + 1e-2 * torch.eye(len(dense), dtype=torch.float64))
    gradients = reference.gradients(model, LOSS, [data])
    assert_close(fitted.influences(*data, *data), reference.up_scores(inverse, gradients, gradients), 1e-8)


def test_a_layer_on_other_than_samples_is_refused() -> None:
    _, _, covered = build(PositionFirst())
    assert list(covered.uncovered) == ["first.weight", "first.bias"]


def test_nothing_is_left_on_the_model() -> None:
    problem, data, covered = build(Twice())
    layer_batch(problem, covered.layers, data, true_gradients(problem))
    modules = list(problem.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_hooks_are_removed_after_an_exception() -> None:
    problem, (x, y), covered = build(Twice())
    with pytest.raises(RuntimeError):
        layer_batch(problem, covered.layers, (x[:, :2], y), true_gradients(problem))
    assert not any(module._forward_hooks for module in problem.model.modules())


def test_attention_is_named_and_not_believed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.unflatten(1, (2, 2))
            logits: Tensor = self.last(self.attention(tokens, tokens, tokens)[0].mean(1))
            return logits

    problem, data, covered = build(Attention())
    assert [layer.name for layer in covered.layers] == ["last"]
    assert set(covered.uncovered) == {name for name in problem.parameters.names if name.startswith("attention")}
    check_gradients(problem, data, covered)


def test_gradients_that_are_not_finite_are_reported() -> None:
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x - x.detach()).abs().sqrt()

    with pytest.raises(inf.NonFiniteError, match="NaN or infinity"):
        build(nn.Sequential(nn.Linear(4, 3), Overflowing()))


class TestRegistration:
    @pytest.fixture(autouse=True)
    def _restored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forms, "FORMS", table := dict(forms.FORMS))
        monkeypatch.setattr("influence_framework.layers.covering.FORMS", table)

    def test_a_form_of_ones_own_is_used(self) -> None:
        module = nn.Sequential(Scaled(), nn.Linear(4, 3))
        assert list(build(module)[2].uncovered) == ["0.scale"]
        inf.register_layer(Scaled, ScaledForm)
        problem, data, covered = build(module)
        assert not covered.uncovered
        check_gradients(problem, data, covered)

    def test_a_wrong_form_is_not_believed(self) -> None:
        class Wrong(ScaledForm):
            def output_gradients(self, x: Tensor, gradients: Tensor) -> Tensor:
                return 1.001 * super().output_gradients(x, gradients)

        inf.register_layer(Scaled, Wrong)
        assert list(build(nn.Sequential(Scaled(), nn.Linear(4, 3)))[2].uncovered) == ["0.scale"]

    def test_two_forms_of_one_class_are_a_conflict(self) -> None:
        inf.register_layer(Scaled, ScaledForm)
        inf.register_layer(Scaled, ScaledForm)
        with pytest.raises(inf.PluginConflictError, match="already"):
            inf.register_layer(nn.Linear, ScaledForm)

    @pytest.mark.parametrize("kind", [3, int, Scaled()])
    def test_what_is_no_layer(self, kind: object) -> None:
        with pytest.raises(inf.InvalidInputError, match=r"torch\.nn\.Module"):
            inf.register_layer(kind, ScaledForm)

    def test_what_is_no_form(self) -> None:
        with pytest.raises(inf.InvalidInputError, match="MatrixForm"):
            inf.register_layer(Scaled, Scaled)
