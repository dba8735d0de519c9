"""Losses, targets and gradients that cannot be right are refused with the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import influence_framework as inf
from tests.small import Action, batches, fit, model, net, points, regression

pytestmark = pytest.mark.usefixtures("as_user")

WEIGHTS = torch.tensor([1.0, 5.0], dtype=torch.float64)
NEITHER = r"neither the mean \(.*\) nor the sum .* batch size\. Class weights .* reduction='sum'"
LOSSES: dict[str, tuple[Action, str]] = {
    "not callable": (fit(loss=3), r"callable as loss\(output, target\), got int"),
    "reduction none": (
        fit(loss=nn.CrossEntropyLoss(reduction="none")),
        r"CrossEntropyLoss\(reduction='none'\) .* use reduction='mean' or reduction='sum'",
    ),
    "one value per sample": (
        fit(loss=lambda o, t: F.cross_entropy(o, t, reduction="none")),
        r"scalar tensor for a batch, got shape \(4,\): average over the batch",
    ),
    "one value in a vector": (fit(loss=lambda o, t: F.cross_entropy(o, t)[None]), r"got shape \(1,\)"),
    "a number": (fit(loss=lambda o, t: F.cross_entropy(o, t).item()), "scalar tensor for a batch, got float"),
    "a tuple": (fit(loss=lambda o, t: (F.cross_entropy(o, t), 0)), "scalar tensor for a batch, got tuple"),
    "class weights": (fit(loss=nn.CrossEntropyLoss(weight=WEIGHTS)), NEITHER),
    "ignored targets": (fit(loss=nn.CrossEntropyLoss(ignore_index=0)), NEITHER),
    "wrong normalisation": (fit(loss=lambda o, t: F.cross_entropy(o, t) / len(o)), NEITHER),
    "samples coupled": (fit(loss=lambda o, t: F.cross_entropy(o, t) + o.mean(0).square().sum()), NEITHER),
    "infinite": (fit(loss=lambda o, t: F.cross_entropy(o, t) / 0), "The loss is inf on the training data"),
    "sum that is a mean": (
        fit(loss=inf.SupervisedObjective(nn.CrossEntropyLoss(), reduction="sum")),
        r"is the mean of the losses of its samples, where their sum was expected.*reduction=\.\.\.",
    ),
}


@pytest.mark.parametrize("what", LOSSES)
def test_loss(what: str) -> None:
    action, message = LOSSES[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        action()


def test_pitfall_reduction_none_is_refused_by_name() -> None:
    for loss in (nn.MSELoss(reduction="none"), nn.BCEWithLogitsLoss(reduction="none")):
        with pytest.raises(inf.InvalidInputError, match=r"reduction='none'.*reduction='mean'"):
            model(net(1), loss).fit(regression(lambda n: torch.ones(n, 1))())


def test_sum_and_class_weights_in_a_sum_are_fine() -> None:
    for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum")):
        assert model(loss=loss).fit(batches()).influences(*points(2)).shape == (2, 2)


ELEMENTWISE = {
    "module": nn.MSELoss(),
    "function": F.mse_loss,
    "lambda": lambda o, t: (o - t).square().mean(),
    "absolute": nn.L1Loss(),
    "huber": nn.HuberLoss(),
}


@pytest.mark.parametrize("what", ELEMENTWISE)
def test_pitfall_targets_that_would_broadcast_are_refused(what: str) -> None:
    message = r"shape \(4,\) .* output of shape \(4, 1\): .* Reshape it: y\.reshape\(\(4, 1\)\)"
    with pytest.raises(inf.InvalidInputError, match=message):
        model(net(1), ELEMENTWISE[what]).fit(regression(lambda n: torch.arange(n))())
    # The curvature of the absolute error is zero.
    influence = model(net(1), ELEMENTWISE[what], preflight=what != "absolute")
    influence.fit(regression(lambda n: torch.arange(n)[:, None])())
    with pytest.raises(inf.InvalidInputError, match=r"shape \(2,\) .* output of shape \(2, 1\)"):
        influence.influences(points(2)[0], torch.arange(2).double())


def test_a_loss_that_squeezes_its_output_is_fine() -> None:
    influence = model(net(1), lambda o, t: (o.squeeze(-1) - t).square().mean())
    influence.fit(regression(lambda n: torch.arange(n))())
    assert influence.influences(points(2)[0], torch.arange(2).double()).shape == (2, 2)


def distance(output: Tensor, target: Tensor) -> Tensor:
    """Not differentiable where a prediction is exact."""
    return (output - target).square().sum(1).sqrt().mean()


@pytest.mark.parametrize("source", ["hessian", "gauss_newton", "empirical_fisher"])
def test_gradients_that_are_not_finite(source: str) -> None:
    module = net()
    x, _ = points()
    exact = [(x, module(x).detach())]
    with pytest.raises(inf.NonFiniteError, match=r"NaN or infinity.*[Cc]heck"):
        model(module, distance, source=source).fit(exact)
    # The Hessian is indefinite here, by less than this λ.
    influence = model(module, distance, source=source, hessian_regularization=5.0)
    influence.fit([(x, module(x).detach() + 1.0)])
    with pytest.raises(
        inf.NonFiniteError, match=r"gradients of samples \[0, 1, 2, 3\] .* NaN or infinity: check"
    ):
        influence.influences(*exact[0])


def test_sure_predictions_whose_losses_are_rounding_are_fine() -> None:
    """Losses of 1e-6 in float32 are differences of logits of 15, and rounded as these are."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 2), torch.arange(12) % 2
    x[:, 0] = 7 * (2 * y - 1) + x[:, 0] / 10
    linear = nn.Linear(2, 1).eval()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, 0.1]]))
    targets = y[:, None].float()
    influence = inf.compose(
        linear, nn.BCEWithLogitsLoss(), solver="direct", hessian_regularization=1e-3, preflight=False
    )
    for start in range(0, 12, 4):
        part = slice(start, start + 4)
        influence.fit([(x, targets)]).influences(x[part], targets[part])
