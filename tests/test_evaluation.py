"""Measures of how well scores predict retraining, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.evaluation.statistics import bootstrap_mean, correlations, fisher_interval

F64 = torch.float64
ev = inf.evaluation
BCE, MSE = nn.BCEWithLogitsLoss(), nn.MSELoss()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(weight: Tensor) -> nn.Linear:
    model: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=F64)
    model.weight.data = weight.clone()
    return model.eval()


class Ridge:
    """Ridge regression, with its leave-one-out losses by the formula of Sherman and Morrison."""

    strength = 0.3

    def __init__(self, n: int = 30, d: int = 4, tests: int = 5) -> None:
        self.x, self.x_test = normal(n, d), normal(tests, d, seed=1)
        self.y = self.x.sum(1, keepdim=True) + normal(n, 1, seed=2)
        self.y_test = normal(tests, 1, seed=3)
        self.A = 2 * self.x.T @ self.x / n + self.strength * torch.eye(d, dtype=F64)
        self.theta = torch.linalg.solve(self.A, 2 * self.x.T @ self.y / n)
        self.model = linear(self.theta.T)
        pulled = torch.linalg.solve(self.A, self.x.T)
        leverage = 2 / n * (self.x.T * pulled).sum(0)
        residuals = (self.y - self.x @ self.theta)[:, 0]
        without = self.theta - 2 / n * pulled * residuals / (1 - leverage)
        self.changes = (self.x_test @ without - self.y_test) ** 2 - (
            self.x_test @ self.theta - self.y_test
        ) ** 2

    def scores(self) -> Tensor:
        model = inf.compose(self.model, MSE, solver="direct", hessian_regularization=self.strength)
        return model.fit([(self.x, self.y)]).influences(self.x_test, self.y_test, self.x, self.y)

    def leave_one_out(self, **options: Any) -> inf.evaluation.LeaveOneOut:
        settings = {"recipe": ev.ConvexFit(weight_decay=self.strength)} | options
        return ev.leave_one_out(self.model, MSE, self.x_test, self.y_test, self.x, self.y, **settings)


class TestLeaveOneOut:
    def test_changes_of_ridge_regression_are_those_of_the_formula(self) -> None:
        ridge = Ridge()
        found = ridge.leave_one_out()
        torch.testing.assert_close(found.changes, ridge.changes, rtol=0, atol=1e-9)
        assert found.changes.abs().max() > 1e-2

    def test_a_logistic_model_is_refitted_as_newton_would(self) -> None:
        x, x_test = normal(40, 3), normal(4, 3, seed=1)
        y, y_test = (x.sum(1, keepdim=True) > 0).double(), torch.ones(4, 1, dtype=F64)

        def fitted(kept: Tensor) -> Tensor:
            theta = torch.zeros(3, 1, dtype=F64)
            for _ in range(30):
                p = (x[kept] @ theta).sigmoid()
                hessian = x[kept].T @ (p * (1 - p) * x[kept]) / 40 + 0.05 * torch.eye(3, dtype=F64)
                gradient = x[kept].T @ (p - y[kept]) / 40 + 0.05 * theta
                theta = theta - torch.linalg.solve(hessian, gradient)
            return nn.functional.binary_cross_entropy_with_logits(x_test @ theta, y_test, reduction="none")

        everything = torch.arange(40)
        points = [5, 0, 17]
        # From far away: the model given need not be the optimum.
        found = ev.leave_one_out(
            linear(torch.zeros(1, 3, dtype=F64)),
            BCE,
            *(x_test, y_test, x, y),
            recipe=ev.ConvexFit(weight_decay=0.05, tolerance=1e-11),
            points=points,
        )
        base = fitted(everything)
        expected = torch.cat([fitted(everything[everything != j]) - base for j in points], dim=1)
        torch.testing.assert_close(found.losses[0], base[:, 0], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.changes, expected, rtol=0, atol=1e-9)

    def test_agreement_is_the_correlation_of_scores_over_n_with_the_changes(self) -> None:
        ridge = Ridge()
        found, scores = ridge.leave_one_out(), ridge.scores()
        agreement = found.agreement(scores)
        for i in range(5):
            expected = stats.pearsonr(scores[i] / 30, ridge.changes[i])
            interval = expected.confidence_interval(0.95)
            assert agreement.by_point[i] == pytest.approx(expected.statistic, abs=1e-7)
            assert agreement.low[i] == pytest.approx(interval.low, abs=1e-6)
            assert agreement.high[i] == pytest.approx(interval.high, abs=1e-6)
        assert agreement.mean.value == pytest.approx(agreement.by_point.mean())
        assert agreement.mean.low <= agreement.mean.value <= agreement.mean.high
        assert agreement.mean.value > 0.95
        assert 1.0 < agreement.slope < 1.5  # leverage makes the true effect the larger one
        assert found.agreement(-scores).mean.value == pytest.approx(-agreement.mean.value)
        ranks = found.agreement(scores, "spearman")
        assert ranks.by_point[0] == pytest.approx(stats.spearmanr(scores[0], ridge.changes[0]).statistic)

    def test_some_points_alone(self) -> None:
        ridge = Ridge()
        found = ridge.leave_one_out(points=[7, 2])
        torch.testing.assert_close(found.changes, ridge.changes[:, [7, 2]], rtol=0, atol=1e-9)
        scores = ridge.scores()
        torch.testing.assert_close(found.predicted(scores), scores[:, [7, 2]] / 30)
        torch.testing.assert_close(found.predicted(scores[:, [7, 2]]), scores[:, [7, 2]] / 30)

    def test_seeds_are_averaged_and_their_spread_told(self) -> None:
        ridge = Ridge()
        recipe = ev.GradientDescent(3, 10, 0.01, start="trained")
        each = [ridge.leave_one_out(recipe=recipe, seeds=[seed], points=[1, 4]) for seed in (0, 5)]
        both = ridge.leave_one_out(recipe=recipe, seeds=[0, 5], points=[1, 4])
        changes = torch.stack([one.changes for one in each])
        torch.testing.assert_close(both.changes, changes.mean(0))
        torch.testing.assert_close(both.spread, (changes[0] - changes[1]).abs() / 2)
        assert both.spread.max() > 0
        assert each[0].spread.isnan().all()

    def test_training_on_from_the_optimum_finds_the_effect_of_a_net(self) -> None:
        """A net at its optimum, where continued descent and the formula must meet."""
        x, x_test = normal(20, 2), normal(3, 2, seed=1)
        y, y_test = x.prod(1, keepdim=True), x_test.prod(1, keepdim=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double().eval()
        recipe = ev.GradientDescent(
            400, None, 0.1, momentum=0.9, weight_decay=0.05, schedule="constant", start="trained"
        )
        objective = inf.SupervisedObjective(MSE, reduction="mean")
        net = recipe.train(net, objective, (x, y), torch.arange(20), seed=0)  # type: ignore[assignment]
        points = [0, 3, 9, 15]
        truth = ev.leave_one_out(net, MSE, x_test, y_test, x, y, recipe=recipe, points=points)
        scores = inf.compose(net, MSE, solver="direct", source="hessian", hessian_regularization=0.05)
        scores = scores.fit([(x, y)]).influences(x_test, y_test, x, y)
        assert truth.agreement(scores).mean.value > 0.9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"points": [30]}, "different positions from 0 to 29"),
            ({"points": [-1]}, "different positions"),
            ({"points": [1, 1]}, "different positions"),
            ({"points": []}, "points are the positions"),
            ({"points": [0.5]}, "points are the positions"),
            ({"seeds": []}, "seeds is empty"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            Ridge().leave_one_out(**options)

    def test_scores_of_another_shape_are_refused(self) -> None:
        with pytest.raises(inf.InvalidInputError, match=r"\(5, 30\) of all.*\(5, 2\) of those.*\(30, 5\)"):
            Ridge().leave_one_out(points=[0, 1]).predicted(torch.zeros(30, 5))


class Mean:
    """One parameter, the mean of the targets: what a subset does to it is known."""

    def __init__(self, n: int = 20, tests: int = 3) -> None:
        self.x, self.y = torch.ones(n, 1, dtype=F64), normal(n, 1)
        self.x_test = torch.ones(tests, 1, dtype=F64)
        self.y_test = torch.tensor([[5.0], [-4.0], [9.0]], dtype=F64)
        self.model = linear(self.y.mean().reshape(1, 1))
        self.recipe = ev.GradientDescent(1, None, 0.5, momentum=0.0, schedule="constant", start="trained")
        """One step of gradient descent on a quadratic of curvature 2: the exact mean of the subset."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.model, MSE, self.x_test, self.y_test, self.x, self.y

    def scores(self) -> Tensor:
        model = inf.compose(self.model, MSE, solver="direct").fit([(self.x, self.y)])
        return model.influences(self.x_test, self.y_test, self.x, self.y)


class TestLinearDatamodelingScore:
    def test_is_one_where_effects_add_up(self) -> None:
        mean = Mean()
        truth = ev.retrain_on_subsets(*mean.arguments, recipe=mean.recipe, subsets=12, repeats=2)
        expected = (mean.y[truth.kept].mean(1) - mean.y_test.T) ** 2
        torch.testing.assert_close(truth.losses, expected[:, None].expand(-1, 2, -1))
        score = ev.linear_datamodeling_score(mean.scores(), truth, resamples=50)
        assert score.by_point == pytest.approx([1, 1, 1])
        assert score.mean.value == score.mean.high == pytest.approx(1)
        assert score.ceiling is not None
        assert score.ceiling.value == pytest.approx(1)
        assert score.ceiling.low == pytest.approx(1)
        assert str(score) == "LDS 1.000 [1.000, 1.000] of at most 1.000"
        opposite = ev.linear_datamodeling_score(-mean.scores(), truth, resamples=2)
        assert opposite.mean.value == pytest.approx(-1)

    def test_subsets_are_of_the_fraction_and_follow_the_seed(self) -> None:
        mean = Mean()

        def subsets(seed: int) -> inf.evaluation.SubsetLosses:
            return ev.retrain_on_subsets(
                *mean.arguments, recipe=mean.recipe, subsets=50, fraction=0.3, repeats=1, seed=seed
            )

        one = subsets(1)
        assert one.kept.shape == (50, 6)
        assert all(len(row.unique()) == 6 for row in one.kept)
        assert torch.bincount(one.kept.flatten(), minlength=20).min() > 4
        assert torch.equal(subsets(1).losses, one.losses)
        assert not torch.equal(subsets(2).kept, one.kept)
        assert ev.linear_datamodeling_score(mean.scores(), one, resamples=2).ceiling is None

    def test_every_model_has_a_seed_of_its_own(self) -> None:
        mean = Mean()
        truth = truth_of(mean, recipe=ev.GradientDescent(1, learning_rate=0.01), repeats=2)
        assert len(truth.losses[:, :, 0].unique()) == 6
        # At this rate it is the initial parameter, drawn by the seed, that the loss tells of.
        assert truth.losses[:, :, 0].std(1).min() > 0.01 * truth.losses[:, :, 0].mean()

    def test_is_the_rank_correlation_of_sums_over_the_subset(self) -> None:
        generator = np.random.default_rng(0)
        kept = torch.from_numpy(generator.permuted(np.tile(np.arange(20), (15, 1)), axis=1)[:, :8])
        truth = ev.SubsetLosses(kept, 20, torch.from_numpy(generator.normal(size=(15, 3, 2))))
        scores = generator.normal(size=(2, 20))
        score = ev.linear_datamodeling_score(scores, truth, resamples=100)
        for i in range(2):
            sums = [-scores[i][subset].sum() for subset in kept.numpy()]
            expected = stats.spearmanr(sums, truth.losses[:, :, i].mean(1)).statistic
            assert score.by_point[i] == pytest.approx(expected)
            low, high = fisher_interval(expected, 15)
            assert [score.low[i], score.high[i]] == pytest.approx([float(low), float(high)])
        assert score.mean.low < score.mean.value < score.mean.high

    @pytest.mark.parametrize("repeats", [2, 3, 4])
    def test_the_ceiling_is_what_the_expected_losses_reach(self, repeats: int) -> None:
        generator = np.random.default_rng(1)
        signal = generator.normal(size=(400, 1, 30))
        losses = torch.from_numpy(signal + 1.5 * generator.normal(size=(400, repeats, 30)))
        truth = ev.SubsetLosses(torch.zeros(400, 1, dtype=torch.int64), 2, losses)
        reached = correlations(signal[:, 0].T, truth.mean).mean()
        # Ranks of normal variables fall short of the formula for products by about 2 %.
        assert truth.ceiling(resamples=20).value == pytest.approx(reached, abs=0.02)
        assert reached == pytest.approx((repeats / (repeats + 1.5**2)) ** 0.5, abs=0.03)

    def test_noise_alone_has_no_ceiling(self) -> None:
        losses = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 2, 40)))
        truth = ev.SubsetLosses(torch.zeros(60, 1, dtype=torch.int64), 2, losses)
        assert truth.ceiling(resamples=50).value < 0.25

    @pytest.mark.parametrize(
        ("action", "message"),
        [
            (
                lambda m: ev.retrain_on_subsets(*m.arguments, recipe=m.recipe, fraction=1.0),
                "between none and all",
            ),
            (lambda m: ev.retrain_on_subsets(*m.arguments, recipe=m.recipe, subsets=1), "At least two subsets"),
            (lambda m: truth_of(m).ceiling(), "train on each at least twice"),
            (lambda m: truth_of(m).predicted(torch.zeros(20, 3)), r"\(3, 20\), got \(20, 3\)"),
            (lambda m: truth_of(m).predicted(torch.full((3, 20), torch.nan)), "NaN or infinity"),
            (lambda m: ev.linear_datamodeling_score(m.scores(), constant()), "nothing to predict"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_is_refused(self, action: Callable[[Mean], Any], message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            action(Mean())


def truth_of(mean: Mean, **options: Any) -> inf.evaluation.SubsetLosses:
    return ev.retrain_on_subsets(*mean.arguments, **({"recipe": mean.recipe, "subsets": 3} | options))


def constant() -> inf.evaluation.SubsetLosses:
    return ev.SubsetLosses(torch.zeros(4, 1).long(), 20, torch.ones(4, 1, 3).double())


class TestMislabelDetection:
    def test_area_is_that_of_scikit_learn_ties_included(self) -> None:
        generator = np.random.default_rng(0)
        suspicion, wrong = generator.integers(0, 6, 80) / 2, generator.random(80) < 0.2
        curve = ev.detection_curve(suspicion, wrong)
        assert curve.auroc.value == pytest.approx(roc_auc_score(wrong, suspicion))
        assert curve.area.value == pytest.approx(np.trapezoid(curve.found, curve.inspected))
        assert curve.area.low < curve.area.value < curve.area.high
        assert curve.found[0] == 0
        assert curve.found[-1] == 1

    def test_the_curve_of_equal_suspicion_is_that_of_chance(self) -> None:
        curve = ev.detection_curve(torch.zeros(10), torch.arange(10) < 3)
        assert curve.found == pytest.approx(curve.inspected)
        assert curve.area.value == pytest.approx(0.5)

    def test_wrong_labels_first_is_the_best_area(self) -> None:
        wrong = torch.tensor([False, True, False, False, True])
        curve = ev.detection_curve(wrong.double() + torch.tensor([0, 0.1, 0.2, 0.3, 0.0]), wrong)
        assert curve.found == pytest.approx([0, 0.5, 1, 1, 1, 1])
        assert curve.area.value == pytest.approx(1 - 0.4 / 2)
        assert curve.auroc.value == 1

    def test_baselines_are_loss_and_margin(self) -> None:
        x, y = normal(30, 3), torch.arange(30) % 3
        model = linear(normal(3, 3, seed=4))
        wrong = torch.arange(30) < 10
        found = ev.mislabel_detection(model, nn.CrossEntropyLoss(), x, y, wrong, {"mine": wrong.double()})
        assert list(found) == ["mine", "loss", "margin"]
        logits = model(x).detach()
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        others = torch.stack(
            [max(row[c] for c in range(3) if c != t) for row, t in zip(logits, y, strict=True)]
        )
        margins = others - logits[torch.arange(30), y]
        assert found["mine"].auroc.value == 1
        assert found["loss"].auroc.value == pytest.approx(roc_auc_score(wrong, losses))
        assert found["margin"].auroc.value == pytest.approx(roc_auc_score(wrong, margins))
        assert found["loss"].auroc.value != found["margin"].auroc.value

    def test_the_margin_of_a_single_logit(self) -> None:
        x, y = normal(13, 3), (torch.arange(13) % 2).double()[:, None]
        model = linear(normal(1, 3, seed=4))
        wrong = torch.arange(13) < 4
        found = ev.mislabel_detection(model, BCE, x, y, wrong, {})
        # The loss of a single logit is a function of its margin.
        assert found["margin"].auroc.value == found["loss"].auroc.value != 0.5
        assert "margin" not in ev.mislabel_detection(model, MSE, x, y + 0.5, wrong, {})

    @pytest.mark.parametrize(
        ("suspicion", "wrong", "message"),
        [
            (torch.zeros(3), torch.zeros(4, dtype=torch.bool), "one number and wrong one boolean"),
            (torch.zeros(4), torch.zeros(4), "one boolean"),
            (torch.full((4,), torch.nan), torch.arange(4) < 2, "NaN"),
            (torch.zeros(4), torch.ones(4, dtype=torch.bool), "Some labels must be wrong and some right"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_is_refused(self, suspicion: Tensor, wrong: Tensor, message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            ev.detection_curve(suspicion, wrong)

    def test_names_of_baselines_are_reserved(self) -> None:
        x, y = normal(12, 3), torch.arange(12) % 3
        with pytest.raises(inf.InvalidInputError, match=r"\['loss'\] are the names of the baselines"):
            ev.mislabel_detection(
                linear(normal(3, 3)), nn.CrossEntropyLoss(), x, y, torch.arange(12) < 4, {"loss": y}
            )


class Groups:
    """Two groups of training points that share nothing; the majority of a group decides its prediction."""

    def __init__(self) -> None:
        member = torch.tensor([0] * 7 + [1] * 9)
        self.x = nn.functional.one_hot(member).double()
        # Five against two in the first group, eight against one in the second.
        self.y = torch.tensor([1] * 5 + [0] * 2 + [0] * 8 + [1])[:, None].double()
        self.x_test, self.y_test = torch.eye(2, dtype=F64), torch.tensor([[1.0], [0.0]], dtype=F64)
        self.recipe = ev.ConvexFit(weight_decay=0.01)
        objective = inf.SupervisedObjective(BCE, reduction="mean")
        start = linear(torch.zeros(1, 2, dtype=F64))
        self.model = self.recipe.train(start, objective, (self.x, self.y), torch.arange(16), 0)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.model, BCE, self.x_test, self.y_test, self.x, self.y

    def scores(self) -> Tensor:
        model = inf.compose(self.model, BCE, solver="direct", hessian_regularization=0.01)
        return model.fit([(self.x, self.y)]).influences(self.x_test, self.y_test, self.x, self.y)


class TestBrittleness:
    def test_a_majority_flips_once_it_is_none(self) -> None:
        groups = Groups()
        found = ev.brittleness(*groups.arguments, groups.scores(), recipe=groups.recipe, counts=(4, 2, 8))
        assert found.counts == (2, 4, 8)
        assert found.flipped.tolist() == [[0, 1, 1], [0, 0, 1]]
        assert set(found.removed[0, :5].tolist()) == set(range(5))
        assert set(found.removed[1].tolist()) == set(range(7, 15))
        assert [share.value for share in found.share] == [0, 0.5, 1]
        expected = stats.binomtest(1, 2).proportion_ci(method="wilson")
        assert (found.share[1].low, found.share[1].high) == pytest.approx((expected.low, expected.high))

    def test_seeds_are_compared_with_the_whole_of_the_same_seed(self) -> None:
        groups = Groups()
        recipe = ev.GradientDescent(5, None, 1.0)
        found = ev.brittleness(*groups.arguments, groups.scores(), recipe=recipe, counts=[8], seeds=[0, 1, 2])
        assert found.flipped.shape == (2, 1)
        assert (found.flipped * 3 % 1 == 0).all()

    @pytest.mark.parametrize(
        ("scores", "options", "message"),
        [
            (torch.zeros(16, 2), {}, r"shape \(2, 16\), got \(16, 2\)"),
            (torch.full((2, 16), torch.nan), {}, "NaN"),
            (torch.zeros(2, 16), {"counts": [16]}, "counts must be positive and below 16"),
            (torch.zeros(2, 16), {"counts": [0]}, "counts must be positive"),
            (torch.zeros(2, 16), {"seeds": []}, "seeds not empty"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_is_refused(self, scores: Tensor, options: dict[str, Any], message: str) -> None:
        groups = Groups()
        with pytest.raises(inf.InvalidInputError, match=message):
            ev.brittleness(*groups.arguments, scores, recipe=groups.recipe, **({"counts": [1]} | options))

    def test_a_regression_has_no_class(self) -> None:
        x, y = normal(6, 2), normal(6, 2, seed=1)
        three = nn.Sequential(linear(normal(2, 2)), nn.Unflatten(1, (2, 1))).eval()
        with pytest.raises(inf.InvalidInputError, match="Predictions are classes"):
            ev.brittleness(
                *(three, MSE, x, y[..., None], x, y[..., None], torch.zeros(6, 6)),
                recipe=ev.GradientDescent(1),
                counts=[1],
            )


class TestSubsetRemoval:
    def test_losses_are_those_of_the_points_that_are_left(self) -> None:
        mean = Mean()
        ranking = mean.y[:, 0]
        found = ev.subset_removal(
            *mean.arguments,
            {"up": ranking, "down": -ranking},
            recipe=mean.recipe,
            fractions=[0.25, 0.1],
            seeds=[3, 4],
        )

        def losses(order: Tensor) -> list[float]:
            return [float(((mean.y[order[k:]].mean() - mean.y_test) ** 2).mean()) for k in (0, 2, 5)]

        assert list(found) == ["up", "down"]
        assert found["up"].removed == (0, 2, 5)
        for seed in range(2):
            torch.testing.assert_close(
                found["up"].losses[seed], torch.tensor(losses(ranking.argsort(descending=True)), dtype=F64)
            )
            torch.testing.assert_close(
                found["down"].losses[seed], torch.tensor(losses(ranking.argsort()), dtype=F64)
            )
        chance = [torch.randperm(20, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
        expected = torch.tensor([losses(order) for order in chance], dtype=F64)
        torch.testing.assert_close(found["up"].random, expected)
        torch.testing.assert_close(found["up"].gain, (found["up"].losses - expected).mean(0))

    def test_the_most_helpful_first_raises_the_loss(self) -> None:
        ridge = Ridge(60)
        helpful = ridge.scores().mean(0)
        found = ev.subset_removal(
            *(ridge.model, MSE, ridge.x_test, ridge.y_test, ridge.x, ridge.y),
            {"helpful": helpful, "harmful": -helpful},
            recipe=ev.ConvexFit(weight_decay=ridge.strength),
            fractions=[0.2],
        )
        assert found["helpful"].losses[0, 1] > found["helpful"].losses[0, 0] > found["harmful"].losses[0, 1]

    @pytest.mark.parametrize(
        ("rankings", "options", "message"),
        [
            ({}, {}, "rankings and seeds must not be empty"),
            ({"a": torch.zeros(19)}, {}, r"shape \(20,\)"),
            ({"a": torch.zeros(20)}, {"fractions": [1.0]}, "fractions between 0 and 1"),
            ({"a": torch.zeros(20)}, {"fractions": [-0.5]}, "fractions between 0 and 1"),
            ({"a": torch.zeros(20)}, {"fractions": [0.0]}, "fractions between 0 and 1"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_is_refused(self, rankings: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
        mean = Mean()
        with pytest.raises(inf.InvalidInputError, match=message):
            ev.subset_removal(*mean.arguments, rankings, recipe=mean.recipe, **options)


class TestStatistics:
    def test_constant_rows(self) -> None:
        rows, flat = np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3))
        assert correlations(flat, rows) == [0.0]
        assert np.isnan(correlations(rows, flat)).all()
        assert correlations(rows, rows**3, "pearson")[0] < 1
        assert correlations(rows, rows**3, "spearman")[0] == pytest.approx(1)

    def test_the_interval_of_a_rank_correlation_holds_what_it_should(self) -> None:
        generator = np.random.default_rng(0)
        one = generator.normal(size=(4000, 30))
        other = 0.6 * one + 0.8 * generator.normal(size=(4000, 30))
        low, high = fisher_interval(correlations(one, other), 30)
        expected = 6 / np.pi * np.arcsin(0.6 / 2)  # of normal variables, for many pairs
        assert ((low <= expected) & (expected <= high)).mean() == pytest.approx(0.95, abs=0.015)

    def test_three_pairs_say_nothing(self) -> None:
        assert fisher_interval(np.array([0.9]), 3) == (np.array([-1.0]), np.array([1.0]))

    def test_the_bootstrap_follows_its_seed_and_the_standard_error(self) -> None:
        values = np.random.default_rng(0).normal(size=200)
        values[0] = np.nan
        one = bootstrap_mean(values, seed=1)
        assert one == bootstrap_mean(values, seed=1)
        assert one != bootstrap_mean(values, seed=2)
        assert one.value == pytest.approx(np.nanmean(values))
        reach = 1.96 * np.nanstd(values) / 199**0.5
        assert (one.high - one.low) / 2 == pytest.approx(reach, rel=0.15)

    @pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((2, 1), (2, 1))])
    @pytest.mark.usefixtures("as_user")
    def test_what_is_refused(self, shapes: Any) -> None:
        with pytest.raises(inf.InvalidInputError, match="same shape with at least two columns"):
            correlations(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_results_are_kept_in_a_folder(tmp_path: Path) -> None:
    groups, mean = Groups(), Mean()
    for name, call in {
        "loo": lambda folder: Ridge().leave_one_out(points=[1], folder=folder).changes,
        "lds": lambda folder: (
            ev.retrain_on_subsets(*mean.arguments, recipe=mean.recipe, subsets=3, folder=folder).losses
        ),
        "flips": lambda folder: (
            ev.brittleness(
                *groups.arguments, groups.scores(), recipe=groups.recipe, counts=[4], folder=folder
            ).flipped
        ),
        "curve": lambda folder: (
            ev.subset_removal(*mean.arguments, {"a": mean.y[:, 0]}, recipe=mean.recipe, folder=folder)[
                "a"
            ].losses
        ),
    }.items():
        first = call(tmp_path / name)
        assert (tmp_path / name / "results.npz").exists()
        assert torch.equal(call(tmp_path / name), first)
