"""Training again: where it ends, several models at once, and going on after a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.evaluation.retraining import Job, Retraining
from tests import small

F64 = torch.float64
ev = inf.evaluation
LOSS = nn.CrossEntropyLoss()


def objective() -> inf.Objective:
    return inf.SupervisedObjective(LOSS, reduction="mean")


def data(n: int = 24, d: int = 3, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=F64)
    return x, torch.randint(classes, (n,), generator=generator)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 3))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def retraining(model: nn.Module, recipe: Any, test: Any = None) -> Retraining:
    return Retraining.of(model, LOSS, test or data(6, seed=1), data(), recipe)


def jobs(count: int = 4, size: int = 15) -> list[Job]:
    generator = torch.Generator().manual_seed(3)
    return [Job(torch.randperm(24, generator=generator)[:size].sort().values, seed) for seed in range(count)]


def run(model: nn.Module, recipe: Any, **options: Any) -> Tensor:
    engine = retraining(model, recipe)
    settings: dict[str, Any] = {"folder": None, "progress": False, "description": ""} | options
    return engine.run(settings.pop("jobs", jobs()), {"loss": engine.losses}, **settings)["loss"]


class TestConvexFit:
    def test_gradient_vanishes_at_the_minimum_of_the_points_kept(self) -> None:
        x, y = data()
        kept = torch.arange(4, 20)
        recipe = ev.ConvexFit(weight_decay=0.05)
        trained = recipe.train(seeded(lambda: nn.Linear(3, 3)), objective(), (x, y), kept, seed=0)
        loss = nn.functional.cross_entropy(trained(x[kept]), y[kept], reduction="sum") / 24
        loss = loss + 0.05 / 2 * sum((p**2).sum() for p in trained.parameters())
        found = torch.autograd.grad(loss, list(trained.parameters()))
        assert max(float(g.abs().max()) for g in found) < 1e-9

    def test_coordinates_change_nothing_but_the_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = ev.ConvexFit(weight_decay=0.05)
        arguments = (seeded(lambda: nn.Linear(3, 3)), objective(), data(), torch.arange(4, 20), 0)
        one = flat(recipe.train(*arguments))
        monkeypatch.setattr("influence_framework.evaluation.recipes.WHITENED", 0)
        torch.testing.assert_close(flat(recipe.train(*arguments)), one, rtol=0, atol=1e-7)

    def test_the_model_given_stays_and_float32_is_worked_on_in_float64(self) -> None:
        model = seeded(lambda: nn.Linear(3, 3)).float()
        before = flat(model)
        x, y = data()
        engine = Retraining.of(model, LOSS, (x.float(), y), (x.float(), y), ev.ConvexFit(weight_decay=0.05))
        assert engine.model.weight.dtype == F64
        engine.run(jobs(1), {"loss": engine.losses}, folder=None, progress=False, description="")
        assert torch.equal(flat(model), before)
        assert model.weight.dtype == torch.float32

    def test_what_was_not_reached_is_said(self) -> None:
        recipe = ev.ConvexFit(tolerance=1e-13, max_iterations=1)
        with pytest.warns(inf.ConvergenceWarning, match="gradient of norm .* raise max_iterations"):
            recipe.train(seeded(mlp), objective(), data(), torch.arange(20), seed=0)


class TestGradientDescent:
    def test_steps_on_a_quadratic_are_those_of_its_formula(self) -> None:
        x = data()[0]
        y = x.sum(1, keepdim=True)
        model = seeded(lambda: nn.Linear(3, 1, bias=False))
        kept = torch.arange(2, 17)
        recipe = ev.GradientDescent(
            7, None, 0.1, momentum=0.0, weight_decay=0.2, schedule="constant", start="trained"
        )
        objective = inf.SupervisedObjective(nn.MSELoss(), reduction="mean")
        found = recipe.train(model, objective, (x, y), kept, seed=0).weight[0].detach()
        A = 2 * x[kept].T @ x[kept] / len(kept) + 0.2 * torch.eye(3, dtype=F64)
        optimum = torch.linalg.solve(A, 2 * x[kept].T @ y[kept, 0] / len(kept))
        step = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - 0.1 * A, 7)
        torch.testing.assert_close(found, optimum + step @ (model.weight[0].detach() - optimum))

    @pytest.mark.parametrize("make", [mlp, cnn])
    @pytest.mark.parametrize(
        "options",
        [
            {"optimizer": "sgd", "batch_size": 4},
            {"optimizer": "adam", "batch_size": 4, "schedule": "constant", "weight_decay": 0.01},
            {"optimizer": "adamw", "batch_size": None},
            {"optimizer": "sgd", "start": "trained", "batch_size": 6},
        ],
    )
    def test_at_once_or_one_by_one_is_the_same(
        self, make: Callable[[], nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = ev.GradientDescent(**({"epochs": 3, "learning_rate": 0.05} | options))
        model = seeded(make)
        alone = run(model, recipe, at_once=1)

        def refuse(*_: Any) -> None:
            raise AssertionError("one by one")

        monkeypatch.setattr(ev.GradientDescent, "train", refuse)
        torch.testing.assert_close(run(model, recipe, at_once=3, jobs=jobs(6)[:6])[:4], alone)
        assert alone.std(0).min() > 1e-4  # the subsets matter, so that a mix-up would show

    @pytest.mark.parametrize("make", [normalised, dropping])
    def test_what_cannot_be_vectorised_is_trained_one_by_one_in_train_mode(
        self, make: Callable[[], nn.Module]
    ) -> None:
        recipe = ev.GradientDescent(2, 5, 0.05)
        model = seeded(make)
        together = run(model, recipe)
        x, y = data(6, seed=1)
        for job, losses in zip(jobs(), together, strict=True):
            trained = recipe.train(model, objective(), data(), job.kept, job.seed)
            assert not trained.training
            with torch.no_grad():
                expected = nn.functional.cross_entropy(trained(x), y, reduction="none")
            torch.testing.assert_close(losses, expected)
        torch.manual_seed(5)
        eval_only = recipe.train(seeded(mlp), objective(), data(), jobs()[0].kept, 0)
        assert not torch.equal(flat(eval_only)[:15], flat(trained)[:15])

    def test_batch_statistics_are_learnt(self) -> None:
        trained = ev.GradientDescent(1, 5).train(seeded(normalised), objective(), data(), torch.arange(20), 0)
        assert isinstance(trained, nn.Sequential)
        assert int(trained[1].num_batches_tracked) == 4

    def test_every_sample_kept_is_drawn_once_an_epoch_and_no_other(self) -> None:
        recipe = ev.GradientDescent(2, 4)
        kept = torch.stack([job.kept for job in jobs(2)])
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
        batches = list(recipe._batches(optimizer, kept, [0, 1], 24))
        for member in range(2):
            drawn = torch.cat([batch[member] for batch in batches]).reshape(2, 15)
            assert torch.equal(drawn.sort(1).values, kept[member].expand(2, -1))
            assert not torch.equal(drawn[0], drawn[1])

    def test_without_a_point_the_others_keep_their_order(self) -> None:
        recipe = ev.GradientDescent(1, None)
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
        everyone = torch.arange(24)
        (whole,) = recipe._batches(optimizer, everyone[None], [3], 24)
        (rest,) = recipe._batches(optimizer, everyone[everyone != 7][None], [3], 24)
        assert torch.equal(whole[whole != 7], rest[0])

    def test_the_rate_falls_along_half_a_cosine(self) -> None:
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
        rates = [
            optimizer.param_groups[0]["lr"]
            for _ in ev.GradientDescent(2, 12, 0.1)._batches(optimizer, torch.arange(24)[None], [0], 24)
        ]
        assert rates == pytest.approx([0.1 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)])

    def test_seeds_decide_everything_and_leave_the_global_state_alone(self) -> None:
        model, recipe = seeded(dropping), ev.GradientDescent(2, 5)
        before = torch.get_rng_state()
        one = run(model, recipe)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert torch.equal(run(model, recipe), one)
        others = [replace(job, seed=job.seed + 10) for job in jobs()]
        assert not torch.allclose(run(model, recipe, jobs=others), one)

    def test_from_scratch_forgets_the_parameters_but_the_frozen_ones(self) -> None:
        model = seeded(mlp)
        model[0].bias.requires_grad_(False)  # type: ignore[index]
        recipe = ev.GradientDescent(1, learning_rate=1e-9)
        fresh = recipe.train(model, objective(), data(), torch.arange(24), seed=1)
        assert torch.equal(fresh[0].bias, model[0].bias)  # type: ignore[index]
        assert not torch.allclose(fresh[0].weight, model[0].weight, atol=1e-3)  # type: ignore[index]
        gone_on = replace(recipe, start="trained").train(model, objective(), data(), torch.arange(24), seed=1)
        torch.testing.assert_close(flat(gone_on), flat(model), rtol=0, atol=1e-6)

    def test_modules_that_cannot_be_reset_are_named(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.inner(x) * self.scale
                return result

        with pytest.raises(inf.InvalidInputError, match=r"root.*Scaled.*reset_parameters.*start='trained'"):
            run(seeded(Scaled), ev.GradientDescent(1))


@dataclass(frozen=True)
class Stopping:
    """Trains as given, and stops before one of its jobs."""

    inner: Any
    stop: int | None
    log: list[int]

    def __repr__(self) -> str:
        return repr(self.inner)

    def train(self, model: Any, objective: Any, data: Any, kept: Any, seed: int) -> nn.Module:
        if seed == self.stop:
            raise KeyboardInterrupt
        self.log.append(seed)
        trained: nn.Module = self.inner.train(model, objective, data, kept, seed)
        return trained


class TestResumption:
    def test_a_run_that_was_stopped_goes_on_to_the_same_result(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("influence_framework.evaluation.retraining.SAVE_EVERY", 0.0)
        recipe, model = ev.GradientDescent(1), seeded(mlp)
        log: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            run(model, Stopping(recipe, 2, log), folder=tmp_path / "runs")
        assert log == [0, 1]
        found = run(model, Stopping(recipe, None, log), folder=tmp_path / "runs")
        assert log == [0, 1, 2, 3]
        torch.testing.assert_close(found, run(model, recipe))
        again = run(model, Stopping(recipe, 0, log), folder=tmp_path / "runs")
        assert torch.equal(again, found)
        assert not list((tmp_path / "runs").glob("*.new"))

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda: run(seeded(cnn), ev.GradientDescent(1), folder=FOLDER[0]), "model"),
            (lambda: run(seeded(mlp), ev.GradientDescent(2), folder=FOLDER[0]), "recipe"),
            (lambda: run(seeded(mlp), ev.GradientDescent(1), folder=FOLDER[0], jobs=jobs(3)), "jobs"),
            (lambda: run(seeded(mlp), ev.GradientDescent(1), folder=FOLDER[0], jobs=jobs(4, 14)), "jobs"),
        ],
    )
    def test_results_of_something_else_are_refused(
        self, change: Callable[[], Any], what: str, tmp_path: Path
    ) -> None:
        FOLDER[:] = [tmp_path / "runs"]
        run(seeded(mlp), ev.GradientDescent(1), folder=tmp_path / "runs")
        kept = (tmp_path / "runs" / "results.npz").read_bytes()
        with pytest.raises(inf.InvalidInputError, match=f"something else; what differs: {what}"):
            change()
        assert (tmp_path / "runs" / "results.npz").read_bytes() == kept

    @pytest.mark.parametrize("which", ["test data", "training data"])
    def test_other_data_is_noticed(self, which: str, tmp_path: Path) -> None:
        model, recipe, folder = seeded(mlp), ev.GradientDescent(1), tmp_path / "runs"
        run(model, recipe, folder=folder)
        points = {"test data": data(6, seed=1), "training data": data()}
        points[which][0][2, 1] += 1e-6
        engine = Retraining.of(model, LOSS, points["test data"], points["training data"], recipe)
        with pytest.raises(inf.InvalidInputError, match=f"what differs: {which}. Choose"):
            engine.run(jobs(), {"loss": engine.losses}, folder=folder, progress=False, description="")

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(inf.InvalidInputError, match=r"no manifest\.json\): choose another folder"):
            run(seeded(mlp), ev.GradientDescent(1), folder=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_manifest_that_cannot_be_read_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text("{")
        with pytest.raises(inf.InvalidInputError, match=r"manifest\.json cannot be read"):
            run(seeded(mlp), ev.GradientDescent(1), folder=tmp_path)


FOLDER: list[Path] = []


def test_a_loop_of_ones_own_is_a_recipe() -> None:
    class Own:
        def train(self, model: Any, objective: Any, data: Any, kept: Any, seed: int) -> nn.Module:
            return small.net(3)

    x, y = small.points(5)
    engine = Retraining.of(small.net(3), LOSS, (x, y), (x, y), Own())
    found = engine.run(
        [Job(torch.arange(3), 0)] * 2, {"loss": engine.losses}, folder=None, progress=False, description=""
    )["loss"]
    expected = nn.functional.cross_entropy(small.net(3)(x), y, reduction="none").detach()
    torch.testing.assert_close(found, expected.expand(2, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ev.ConvexFit(weight_decay=-1), "weight_decay must be zero or more, got -1"),
        (lambda: ev.ConvexFit(tolerance=0), "tolerance must be positive"),
        (lambda: ev.ConvexFit(max_iterations=0), "max_iterations must be a positive integer"),
        (lambda: ev.GradientDescent(epochs=0), "epochs must be a positive integer, got 0"),
        (lambda: ev.GradientDescent(batch_size=1.5), "batch_size must be a positive integer"),  # type: ignore[arg-type]
        (lambda: ev.GradientDescent(optimizer="lion"), "optimizer must be one of sgd, adam, adamw"),  # type: ignore[arg-type]
        (lambda: ev.GradientDescent(schedule="step"), "schedule must be one of constant, cosine"),  # type: ignore[arg-type]
        (lambda: ev.GradientDescent(start="warm"), "start must be one of scratch, trained"),  # type: ignore[arg-type]
        (lambda: retraining(seeded(mlp), "sgd"), "The recipe says how to train.*got str"),
        (lambda: retraining(seeded(mlp), ev.GradientDescent(), (data(3)[0], data(2)[1])), "same number"),
        (lambda: retraining(seeded(dropping).train(), ev.GradientDescent()), "train mode"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(inf.InvalidInputError, match=message):
        make()
