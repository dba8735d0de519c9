"""Square roots and samples of the output Hessian against the dense one, for many ways of writing a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from influence_framework.derivatives import pull_back
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.objective import SupervisedObjective
from influence_framework.objectives.tokens import MaskedLM, TokenObjective
from influence_framework.output_curvature import Categorical, OutputCurvature, _Products
from tests.reference import assert_close

Loss = Callable[[Tensor, Tensor], Tensor]
N = 3


def normal(*shape: int, seed: int = 0, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def hessians(loss: Loss, outputs: Tensor, target: Tensor) -> Tensor:
    """``(n, c, c)``, one sample at a time."""

    def one(output: Tensor, label: Tensor) -> Tensor:
        value = lambda flat: loss(flat.view(1, *output.shape), label[None])  # noqa: E731
        return cast(Tensor, torch.func.jacrev(torch.func.jacrev(value))(output.reshape(-1)))

    return torch.stack([one(output, label) for output, label in zip(outputs, target, strict=True)])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram(rows: Tensor) -> Tensor:
    """``Σ_s r_s r_sᵀ`` of every sample."""
    flat = rows.reshape(*rows.shape[:2], -1)
    return torch.einsum("snc,snd->ncd", flat, flat)


def curvature(loss: Loss, outputs: Tensor, target: Tensor) -> OutputCurvature:
    return OutputCurvature.of(SupervisedObjective(loss), outputs, (outputs, target))


CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
X, Y = normal(N, 5), labels(5, N)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25], dtype=torch.float64)
MASKED = labels(4, N, 6).index_fill(1, torch.tensor([1, 4]), -100)
R, BITS = normal(N, 4), labels(2, N, 4).double()
CASES: dict[str, tuple[str, Loss, Tensor, Tensor]] = {
    "module": ("categorical", CE, X, Y),
    "function": ("categorical", F.cross_entropy, X, Y),
    "nll": ("categorical", lambda o, t: F.nll_loss(o.log_softmax(1), t), X, Y),
    "log of softmax": ("categorical", lambda o, t: F.nll_loss(o.softmax(1).log(), t), X, Y),
    "logsumexp": ("categorical", lambda o, t: (o.logsumexp(1) - o.gather(1, t[:, None])[:, 0]).mean(), X, Y),
    "class weights": ("categorical", nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), X, Y),
    "label smoothing": ("categorical", nn.CrossEntropyLoss(label_smoothing=0.2), X, Y),
    "probabilities": ("categorical", CE, X, normal(N, 5, seed=2).softmax(1)),
    "ignored": ("categorical", nn.CrossEntropyLoss(reduction="sum"), normal(N, 4, 6), MASKED),
    "sequence": ("categorical", CE, normal(N, 4, 3), labels(4, N, 3)),
    "image": ("categorical", CE, normal(N, 3, 2, 2), labels(3, N, 2, 2)),
    "classes last": ("categorical", lambda o, t: F.cross_entropy(o.mT, t), normal(N, 3, 4), labels(4, N, 3)),
    "square": ("categorical", lambda o, t: F.cross_entropy(o.mT, t), normal(N, 3, 3), labels(3, N, 3)),
    "two classes": ("categorical", CE, normal(N, 2), labels(2, N)),
    "two classes each": ("categorical", CE, normal(N, 2, 3), labels(2, N, 3)),
    "BCE": ("bernoulli", BCE, R, BITS),
    "BCE, one output": ("bernoulli", BCE, R[:, :1], BITS[:, :1]),
    "BCE of sigmoid": ("bernoulli", lambda o, t: F.binary_cross_entropy(o.sigmoid(), t), R, BITS),
    "row weights": ("bernoulli", lambda o, t: ((1 + t[:, 1:2]) * (F.softplus(o) - t * o)).sum(), R, BITS),
    "softplus": ("bernoulli", lambda o, t: (F.softplus(o) - t * o).sum(), R.view(N, 2, 2), BITS.view(N, 2, 2)),
    "squared error": ("gaussian", MSE, normal(N, 2, 3), normal(N, 2, 3, seed=2)),
    "no output dimension": ("gaussian", MSE, normal(N), normal(N, seed=2)),
    "linear": ("gaussian", nn.L1Loss(), R, BITS),
    "positive weight": ("diagonal", nn.BCEWithLogitsLoss(pos_weight=WEIGHTS[:4]), R, BITS),
    "Poisson": ("diagonal", nn.PoissonNLLLoss(), R, BITS),
    "Poisson, one output": ("diagonal", nn.PoissonNLLLoss(), R[:, :1], BITS[:, :1]),
    "Huber": ("diagonal", nn.HuberLoss(), R, BITS),
    "coupled": ("dense", lambda o, t: (o.diff(dim=1) ** 2).sum() + (o**4).sum(), R, BITS),
    "coupled, large": ("dense", lambda o, t: (o.diff(dim=1) ** 2).sum() + (o**4).sum(), 300 * R, BITS),
    "temperature": ("dense", lambda o, t: F.cross_entropy(o / 2, t), X, Y),
    "largest logit": ("dense", lambda o, t: F.cross_entropy(o, t) + o.amax(1).square().mean(), X, Y),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_rows(name: str) -> None:
    family, loss, outputs, target = CASES[name]
    found = curvature(loss, outputs, target)
    rows = found.exact()
    assert found.family == family
    assert rows.shape == (outputs[0].numel(), *outputs.shape)
    assert_close(gram(rows), hessians(loss, outputs, target), 1e-10)
    if family == "diagonal":
        assert_close(found.draw(1, seeded(0))[0].square(), rows.square().sum(0), 1e-10)


def test_targets_of_bce_are_drawn() -> None:
    """Every row is ``√w (σ - y)`` with ``y`` of 0 or 1."""
    found = curvature(BCE, R, BITS)
    targets = R.sigmoid() - found.draw(6, seeded(0)) * (6 * R.shape[1]) ** 0.5
    assert_close(targets, targets.round(), 1e-10)
    assert set(targets.round().abs().unique().tolist()) == {0.0, 1.0}


def test_residuals_of_a_squared_error_are_normal() -> None:
    rows = curvature(MSE, normal(N, 2, 3), normal(N, 2, 3, seed=2)).draw(4000, seeded(0))
    standard = rows * (4000 * 3) ** 0.5
    kurtosis = standard.pow(4).mean() / standard.square().mean().square()
    assert float(kurtosis) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_random_rows_have_the_hessian_as_their_mean(name: str) -> None:
    """Every entry lies within a few of its standard errors ``σ/√m``."""
    m = 4000
    flat = m**0.5 * curvature(*CASES[name][1:]).draw(m, seeded(0)).reshape(m, N, -1)
    each = flat[..., :, None] * flat[..., None, :]
    errors = each.mean(0) - hessians(*CASES[name][1:])
    assert (errors.abs() <= 5 * each.std(0) / m**0.5 + 1e-12).all()
    assert (flat.mean(0).abs() <= 5 * flat.std(0) / m**0.5 + 1e-12).all()


@pytest.mark.parametrize("name", ["module", "sequence", "BCE", "squared error", "coupled"])
def test_the_error_falls_at_the_monte_carlo_rate(name: str) -> None:
    found, generator = curvature(*CASES[name][1:]), seeded(0)

    def error(samples: int) -> float:
        errors = [gram(found.draw(samples, generator)) - gram(found.exact()) for _ in range(40)]
        return float(torch.stack(errors).norm())

    assert error(8) / error(512) == pytest.approx(8, rel=0.3)


def test_labels_are_drawn_at_each_position() -> None:
    """Every row is ``√w (p - e_y)`` there, and the labels of two positions are independent."""
    _, loss, outputs, target = CASES["sequence"]
    p = outputs.softmax(1)
    one_hot = p - curvature(loss, outputs, target).draw(4000, seeded(0)) * (4000 * 3) ** 0.5
    assert_close(one_hot, F.one_hot(one_hot.argmax(2), 4).movedim(-1, 2).double(), 1e-10)
    assert_close(one_hot.mean(0), p, 0.05)
    both = (one_hot[:, :, :, None, 0] * one_hot[:, :, None, :, 1]).mean(0)
    assert_close(both, p[:, :, None, 0] * p[:, None, :, 1], 0.1)


def test_no_label_of_probability_zero_is_drawn() -> None:
    outputs = torch.tensor([[-1e4, 0.0, -1e4, 0.3, -1e4]], dtype=torch.float64)
    rows = curvature(CE, outputs, torch.tensor([1])).draw(500, seeded(0))
    assert torch.equal(rows[:, 0] != 0, torch.tensor([False, True, False, True, False]).expand(500, 5))


@pytest.mark.parametrize("classes", [2, 7])
def test_random_rows_at_uniform_predictions(classes: int) -> None:
    outputs = torch.zeros(N, classes, dtype=torch.float64)
    rows = curvature(CE, outputs, labels(classes, N)).draw(4, seeded(0))
    assert_close(rows.square().sum(2), torch.full((4, N), (1 - 1 / classes) / 4, dtype=torch.float64), 1e-10)


def test_a_difference_of_two_outputs_is_no_rare_label() -> None:
    """Its Hessian is that of a softmax with a huge weight where the softmax is saturated."""
    outputs = torch.tensor([[12.0, 0.0], [0.0, 12.0], [1.0, 13.0]], dtype=torch.float64)
    found = curvature(lambda o, t: o.diff(dim=1).square().mean(), outputs, outputs)
    assert found.family == "categorical"
    for rows in (found.exact(), found.draw(1, seeded(0))):
        assert_close(gram(rows), torch.tensor([[2.0, -2.0], [-2.0, 2.0]]).expand(3, 2, 2), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_what_proves_a_loss_convex(name: str) -> None:
    """With two classes, any curvature that is zero on constants has the form of a softmax."""
    family, *case = CASES[name]
    proof = family in ("categorical", "bernoulli", "gaussian") and not name.startswith("two classes")
    assert curvature(*case).convex is proof


@pytest.mark.parametrize("name", ["module", "sequence", "two classes", "BCE", "squared error", "coupled"])
def test_draws_depend_on_the_generator_alone(name: str) -> None:
    torch.manual_seed(0)
    state, generators = torch.get_rng_state(), [seeded(seed) for seed in (5, 5, 6)]
    found = curvature(*CASES[name][1:])
    first, second, other = (found.draw(8, generator) for generator in generators)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first, found.draw(8, generators[0]))
    assert torch.equal(torch.get_rng_state(), state)


class Weighted(SupervisedObjective):
    """Batches ``(x, y, weight)``, with one weight for each sample."""

    def sample_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return cast(Tensor, batch[2] * F.cross_entropy(outputs, batch[1], reduction="none"))


def test_an_objective_with_sample_weights() -> None:
    weights = torch.tensor([1e-3, 0.0, 7.0], dtype=torch.float64)
    found = OutputCurvature.of(Weighted(CE), X, (X, Y, weights))
    assert isinstance(found, Categorical)
    assert_close(found.weights[:, 0], weights, 1e-10)
    assert_close(gram(found.exact()), weights[:, None, None] * hessians(F.cross_entropy, X, Y), 1e-10)


class TestSaturation:
    @pytest.mark.parametrize("margin", [3.0, 15.0, 30.0, 80.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_confident_predictions_keep_their_digits(self, margin: float, dtype: torch.dtype) -> None:
        """Probabilities of all but one class far below the precision, in every sample."""
        outputs = (X + margin * F.one_hot(Y, 5)).to(dtype)
        found = curvature(CE, outputs, Y)
        assert isinstance(found, Categorical)
        digits = 1e2 * torch.finfo(dtype).eps
        assert_close(found.weights, torch.ones(N, 1), digits)
        # Without the likeliest class, whose own entry is exact relative to one only.
        others = F.one_hot(Y, 5) == 0
        p = outputs.double().softmax(1)
        diagonal = gram(found.exact().double()).diagonal(dim1=1, dim2=2)
        assert_close(diagonal[others], (p * (1 - p))[others], digits)

    @pytest.mark.parametrize("scale", [20.0, 200.0, 1e4, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_large_logits(self, scale: float, dtype: torch.dtype) -> None:
        # The first sample sets the scale.
        outputs = torch.cat([X[:1], scale * X[1:]]).to(dtype)
        found = curvature(CE, outputs, Y)
        p = outputs.double().softmax(1)
        expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        assert found.family == "categorical"
        assert_close(gram(found.exact().double()), expected, 1e2 * torch.finfo(dtype).eps)
        assert found.draw(20, seeded(0)).isfinite().all()

    @pytest.mark.parametrize("margin", [45.0, 100.0, 1e30])
    def test_no_curvature_left(self, margin: float) -> None:
        """Also where products are below the smallest normal number, and keep no digits."""
        outputs = torch.cat([torch.full((2, 1), margin), normal(2, 300).float() - margin], dim=1)
        for found in (curvature(CE, outputs, Y[:2]), curvature(BCE, outputs, torch.zeros(2, 301))):
            rows = torch.cat([found.exact(), found.draw(5, seeded(0))])
            assert rows.square().max() < 1e-19

    def test_cancellation_in_one_saturated_sample(self) -> None:
        """The logarithm of a softmax leaves rounding errors of the size of the weight."""
        outputs = torch.stack([X[0], X[1] + torch.tensor([25.0, 0, 1, 0, 0]), X[2]])
        found = curvature(CASES["log of softmax"][1], outputs, Y)
        assert found.family == "categorical"
        assert_close(gram(found.exact()), hessians(F.cross_entropy, outputs, Y), 1e-10)


@pytest.mark.parametrize(
    "name", ["module", "probabilities", "sequence", "BCE of sigmoid", "Poisson", "coupled"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    family, loss, exact, target = CASES[name]
    outputs = exact.to(device, dtype)
    found = curvature(loss, outputs, target.to(device, dtype if target.is_floating_point() else None))
    assert found.family == family
    for rows in (found.exact(), found.draw(3, seeded(0))):
        assert (rows.dtype, rows.device.type) == (dtype, device.type)
    expected = hessians(loss, outputs.cpu().double(), target)
    assert_close(gram(found.exact().double()), expected, 1e-6 + 1.5 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("classes", [5, 1000])
def test_a_loss_of_low_precision(classes: int) -> None:
    """A matrix in it does not take outputs of a higher one."""
    unit, outputs = torch.eye(classes).bfloat16(), normal(N, classes).bfloat16()
    found = curvature(lambda o, t: F.cross_entropy(o @ unit, t), outputs, labels(classes, N))
    assert isinstance(found, Categorical)
    assert_close(found.weights, torch.ones(N, 1), 0.02)


def test_the_number_of_products_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counting(outputs: Any, inputs: Any, rows: Any) -> Any:
        counts.append(len(rows[0]))
        return pull_back(outputs, inputs, rows)

    monkeypatch.setattr("influence_framework.output_curvature.pull_back", counting)
    found = curvature(CE, normal(2, 20_000), labels(20_000, 2))
    assert found.draw(2, seeded(0)).shape == (2, 2, 20_000)
    assert sum(counts) == 4


class TestErrors:
    def test_a_loss_that_is_not_convex(self) -> None:
        losses: list[Loss] = [
            lambda o, t: -((o - t) ** 2).sum(),
            lambda o, t: (o[:, 0] * o[:, 1]).sum() + (o**2).sum() / 10,
            lambda o, t: -o.logsumexp(1).sum(),
            lambda o, t: ((1e9 * t[:, 1:2] - 1) * o**2).sum(),  # one sample only, by little
        ]
        for loss in losses:
            with pytest.raises(InvalidInputError, match=r"not convex.*eigenvalue -.*empirical_fisher"):
                curvature(loss, R, BITS)

    def test_too_many_coupled_outputs(self) -> None:
        loss, outputs = CASES["coupled"][1], normal(2, 257)
        with pytest.raises(InvalidInputError, match=r"couples the 257 outputs.*not recognised"):
            curvature(loss, outputs, outputs)
        assert curvature(loss, outputs[:, 1:], outputs[:, 1:]).family == "dense"

    @pytest.mark.parametrize(("loss", "target"), [(CE, labels(5, 1)), (MSE, normal(1, 1025))])
    def test_too_many_exact_rows(self, loss: Loss, target: Tensor) -> None:
        found = curvature(loss, normal(1, 1025), target)
        with pytest.raises(InvalidInputError, match=r"1025 rows.*at most 1024.*random samples"):
            found.exact()
        assert found.draw(2, seeded(0)).shape == (2, 1, 1025)
        with pytest.raises(InvalidInputError, match="at least 1, got 0"):
            found.draw(0, seeded(0))

    def test_second_derivatives_that_are_not_finite(self) -> None:
        with pytest.raises(NonFiniteError, match=r"samples \[1\]"):
            curvature(nn.PoissonNLLLoss(), torch.tensor([[0.0], [1e4]]), torch.zeros(2, 1))


class TestLossesThatSayWhatTheyAre:
    """``SoftmaxLosses``: believed where the first sample bears it out."""

    def of(self, objective: TokenObjective) -> tuple[OutputCurvature, OutputCurvature]:
        """As it says, and as is found out of the same that says nothing."""

        class Silent(type(objective)):  # type: ignore[misc]
            softmax_weights = None

        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
        labels = torch.randint(7, (3, 5), generator=generator)
        labels[0, :2] = labels[2, 4] = -100
        batch = {"input_ids": labels, "labels": labels}
        silent = Silent(reduction=objective.reduction)
        return OutputCurvature.of(objective, outputs, batch), OutputCurvature.of(silent, outputs, batch)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_as_found_out(self, reduction: Literal["mean", "sum"], monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        recorded = _Products._record

        def counted(products: _Products, objective: Any, outputs: Tensor, batch: Any) -> None:
            sizes.append(len(outputs))
            recorded(products, objective, outputs, batch)

        monkeypatch.setattr(_Products, "_record", counted)
        said, found = self.of(MaskedLM(reduction=reduction))
        assert sizes == [1, 3]
        assert isinstance(said, Categorical)
        assert said.axis == 2
        assert_close(said.exact(), found.exact(), 1e-10)

    def test_a_subclass_with_another_loss_is_not_believed(self) -> None:
        class Doubled(MaskedLM):
            def sample_losses(self, outputs: Tensor, batch: Any) -> Tensor:
                return 2 * super().sample_losses(outputs, batch)

        said, found = self.of(Doubled())
        assert_close(said.exact(), found.exact(), 1e-10)
        assert not torch.allclose(said.exact(), self.of(MaskedLM())[0].exact())

    def test_a_subclass_that_weighs_samples_is_not_believed_of_those_of_weight_one(self) -> None:
        class Weighted(MaskedLM):
            def sample_losses(self, outputs: Tensor, batch: Any) -> Tensor:
                # The most curved sample, the middle one, has the weight that is said.
                weights = torch.tensor([5.0, 1.0, 5.0], dtype=outputs.dtype) if len(outputs) == 3 else 1.0
                return weights * super().sample_losses(outputs, batch)

        said, found = self.of(Weighted())
        assert_close(said.exact(), found.exact(), 1e-10)
        assert not torch.allclose(said.exact(), self.of(MaskedLM())[0].exact())

    def test_a_sample_that_is_saturated_is_no_witness(self) -> None:
        class Wrong(MaskedLM):
            def softmax_weights(self, outputs: Tensor, batch: Any) -> tuple[int, Tensor]:
                axis, weights = super().softmax_weights(outputs, batch)
                return axis, 2 * weights

        outputs = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        outputs[0, :, 1] = 1e3
        batch = {"labels": torch.ones(3, 5, dtype=torch.long)}
        said, found = (OutputCurvature.of(objective, outputs, batch) for objective in (Wrong(), MaskedLM()))
        assert_close(said.exact(), found.exact(), 1e-10)

    def test_weights_of_another_shape(self) -> None:
        class Flat(MaskedLM):
            def softmax_weights(self, outputs: Tensor, batch: Any) -> tuple[int, Tensor]:
                return -1, outputs.new_ones(outputs.shape[:2])

        with pytest.raises(InvalidInputError, match=r"Flat returned.*\(3, 5\).*dimension 2 it is \(3, 5, 1\)"):
            self.of(Flat())
