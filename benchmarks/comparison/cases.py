"""The problems of the comparison, what is true of each, and how scores are judged by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import sklearn.datasets
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework import evaluation
from influence_framework.evaluation import Estimate

SEED = 0
NETS = 5
"""Nets of different seeds that ensembles are made of; all other methods see the first."""

Judge = Callable[[Any], Estimate]
RESAMPLES = 200


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: Of its folder.
        title: For readers.
        truth: What is measured, in a sentence.
        unit: Of the accuracy.
        kind: ``"classification"`` or ``"regression"``.
        measure: ``"pairs"`` or ``"self"``.
        net: Description of the net.
        recipe: How it is trained.
        data: Makes the data.
        judge: From data, trained net, folder and progress to what judges scores.
    """

    name: str
    title: str
    truth: str
    unit: str
    kind: str
    measure: str
    net: dict[str, Any]
    recipe: Any
    data: Callable[[], Data]
    judge: Callable[[Case, Data, nn.Module, Path], Judging]

    @property
    def loss(self) -> nn.Module:
        return nn.CrossEntropyLoss() if self.kind == "classification" else nn.MSELoss()

    def initial(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return nets.build(self.net).eval()

    def trained(self, data: Data) -> list[nn.Module]:
        """Nets of several seeds; a single one where the optimum is the same for all."""
        convex = isinstance(self.recipe, evaluation.ConvexFit)
        model, x, y = self.initial(), data.x, data.y
        if convex:
            model, x = model.double(), x.double()
            y = y.double() if y.is_floating_point() else y
        objective = inf.SupervisedObjective(self.loss, reduction="mean")
        kept = torch.arange(len(x))
        found = [self.recipe.train(model, objective, (x, y), kept, s) for s in range(1 if convex else NETS)]
        return [net.float() for net in found]

    def write(self, folder: Path, data: Data, trained: Sequence[nn.Module]) -> None:
        """What adapters read."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "data.npz", **{name: tensor.numpy() for name, tensor in vars(data).items()})
        for number, net in enumerate(trained):
            state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
            np.savez(folder / f"checkpoint{number}.npz", **state)
        described = {"kind": self.kind, "measure": self.measure, "net": self.net}
        (folder / "task.json").write_text(json.dumps(described))


@dataclass(frozen=True)
class Judging:
    """How scores of a case are judged.

    Attributes:
        value: From scores to accuracy, by which λ is chosen.
        judge: The same with its interval.
        notes: Lines for readers: the noise ceiling, or baselines.
    """

    value: Callable[[Any], float]
    judge: Judge
    notes: tuple[str, ...] = ()


def shuffled(bunch: Any, train: int, test: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(SEED))[: train + test]
    x = torch.as_tensor(np.asarray(bunch.data), dtype=torch.float32)[order]
    return x, torch.as_tensor(np.asarray(bunch.target))[order]


def digits(test: int, square: bool = False) -> Callable[[], Data]:
    def data() -> Data:
        x, y = shuffled(sklearn.datasets.load_digits(), 1000, test)
        x = (x / 16).reshape(-1, 8, 8) if square else x / 16
        return Data(x[:1000], y[:1000].long(), x[1000:], y[1000:].long())

    return data


def standardised(values: Tensor, count: int) -> Tensor:
    return (values - values[:count].mean(0)) / values[:count].std(0)


def diabetes() -> Data:
    x, y = shuffled(sklearn.datasets.load_diabetes(), 353, 89)
    x, y = standardised(x, 353), standardised(y.float()[:, None], 353)
    return Data(x[:353], y[:353], x[353:], y[353:])


def breast_cancer() -> Data:
    x, y = shuffled(sklearn.datasets.load_breast_cancer(), 455, 114)
    x = standardised(x, 455)
    given = torch.where(flipped(), 1 - y[:455], y[:455])
    return Data(x[:455], given.long(), x[455:], y[455:].long())


def flipped() -> Tensor:
    """Which training labels of the breast cancer data are wrong: a tenth."""
    wrong = torch.zeros(455, dtype=torch.bool)
    wrong[torch.randperm(455, generator=torch.Generator().manual_seed(SEED + 1))[:45]] = True
    return wrong


def leave_one_out(points: int | None) -> Callable[[Case, Data, nn.Module, Path], Judging]:
    def judging(case: Case, data: Data, net: nn.Module, folder: Path) -> Judging:
        chosen = None
        if points is not None:
            order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(SEED + 2))
            chosen = order[:points].sort().values
        truth = evaluation.leave_one_out(
            net,
            case.loss,
            *(data.x_test, data.y_test, data.x, data.y),
            recipe=case.recipe,
            points=chosen,
            folder=folder,
            progress=True,
        )
        return Judging(
            lambda scores: truth.agreement(scores, resamples=1).mean.value,
            lambda scores: truth.agreement(scores, resamples=RESAMPLES).mean,
        )

    return judging


def datamodels(subsets: int, repeats: int) -> Callable[[Case, Data, nn.Module, Path], Judging]:
    def judging(case: Case, data: Data, net: nn.Module, folder: Path) -> Judging:
        truth = evaluation.retrain_on_subsets(
            net,
            case.loss,
            *(data.x_test, data.y_test, data.x, data.y),
            recipe=case.recipe,
            subsets=subsets,
            repeats=repeats,
            seed=SEED,
            folder=folder,
            progress=True,
        )
        ceiling = truth.ceiling(resamples=RESAMPLES)
        single = replace(truth, losses=truth.losses.mean(1, keepdim=True))  # whose ceiling is not asked for
        return Judging(
            lambda scores: evaluation.linear_datamodeling_score(scores, single, resamples=1).mean.value,
            lambda scores: evaluation.linear_datamodeling_score(scores, single, resamples=RESAMPLES).mean,
            (f"A perfect predictor of the expected losses would reach {ceiling:.3f} (noise ceiling).",),
        )

    return judging


def mislabels(case: Case, data: Data, net: nn.Module, folder: Path) -> Judging:
    curves = evaluation.mislabel_detection(net, case.loss, data.x, data.y, flipped(), {})
    baselines = ", ".join(f"{name} {curve.auroc:.3f}" for name, curve in curves.items())
    return Judging(
        lambda scores: evaluation.detection_curve(scores, flipped(), resamples=1).auroc.value,
        lambda scores: evaluation.detection_curve(scores, flipped(), resamples=RESAMPLES).auroc,
        (f"Baselines without any influence: {baselines}.",),
    )


DESCENT = evaluation.GradientDescent(epochs=20, batch_size=50, learning_rate=0.1, weight_decay=1e-3)
CASES = (
    Case(
        "digits-logistic",
        "Digits, logistic regression, 650 parameters",
        "Change of the loss of 50 test images when one of 200 of 1,000 training images is left out and the "
        "model refitted; correlation with the scores, mean over the test images.",
        "correlation",
        "classification",
        "pairs",
        {"name": "logistic", "sizes": [64, 10]},
        evaluation.ConvexFit(weight_decay=1e-2),
        digits(50),
        leave_one_out(200),
    ),
    Case(
        "digits-mlp",
        "Digits, a net with one hidden layer, 1,810 parameters",
        "Linear datamodeling score: losses of 100 test images by nets trained on 100 random halves of 1,000 "
        "training images, mean over four seeds.",
        "LDS",
        "classification",
        "pairs",
        {"name": "mlp", "sizes": [64, 24, 10]},
        DESCENT,
        digits(100),
        datamodels(100, 4),
    ),
    Case(
        "digits-cnn",
        "Digits, a convolutional net, 1,898 parameters",
        "Linear datamodeling score: losses of 100 test images by nets trained on 60 random halves of 1,000 "
        "training images, mean over four seeds.",
        "LDS",
        "classification",
        "pairs",
        {"name": "cnn", "sizes": [8, 8, 10]},
        DESCENT,
        digits(100, square=True),
        datamodels(60, 4),
    ),
    Case(
        "diabetes",
        "Diabetes, linear regression, 11 parameters",
        "Change of the loss of 89 test patients when one of 353 training patients is left out and the model "
        "refitted; correlation with the scores, mean over the test patients.",
        "correlation",
        "regression",
        "pairs",
        {"name": "logistic", "sizes": [10, 1]},
        evaluation.ConvexFit(weight_decay=1e-2),
        diabetes,
        leave_one_out(None),
    ),
    Case(
        "breast-cancer",
        "Breast cancer, a net with one hidden layer, 530 parameters, a tenth of the labels flipped",
        "Probability that self-influence ranks a flipped label before a right one (area under the ROC curve), "
        "of 455 training points.",
        "AUROC",
        "classification",
        "self",
        {"name": "mlp", "sizes": [30, 16, 2]},
        evaluation.GradientDescent(epochs=20, batch_size=50, learning_rate=0.05, weight_decay=1e-2),
        breast_cancer,
        mislabels,
    ),
)
