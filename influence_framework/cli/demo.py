"""The demonstration: a net trained on digits with flipped labels, and scores that find them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from influence_framework.compose import compose
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.registry import Registry, default_registry
from influence_framework.reporting.templating import require_extra

CLASSES = 10
PIXELS = 64
HIDDEN = 32
CHUNK = 256
"""Points to solve for at a time."""

SOLVER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"cg": {"block": True, "rtol": 1e-4, "maxiter": 1000}}
"""What is set for a solver beyond its defaults: here many similar right-hand sides need few digits each."""

REGULARIZATION: Mapping[str, float] = {"hessian": 0.2}
DEFAULT_REGULARIZATION = 0.02
"""λ where none is given: the Hessian needs one above the magnitude of its most negative eigenvalue."""

FRACTIONS = (0.1, 0.2)
"""Shares of each ranking in which flipped labels are counted."""


@dataclass(frozen=True)
class Settings:
    """What is computed, on how much data.

    Attributes:
        solver: Name of the solver.
        source: Name of the curvature source.
        regularization: λ; suited to the source where left out.
        seed: Of split, flipped labels, initial parameters and order of training.
        training_images: How many to train on.
        test_images: How many to test on.
        flipped: Share of the training labels to flip.
        epochs: Passes of the training.
    """

    solver: str = "cg"
    source: str = "gauss_newton"
    regularization: float | None = None
    seed: int = 0
    training_images: int = 1437
    test_images: int = 360
    flipped: float = 0.1
    epochs: int = 20

    @property
    def strength(self) -> float:
        """λ."""
        if self.regularization is not None:
            return self.regularization
        return REGULARIZATION.get(self.source, DEFAULT_REGULARIZATION)


@dataclass(frozen=True, eq=False)
class Digits:
    """Images as rows of 64 grey values in [0, 1], and their labels.

    Attributes:
        x: Training images.
        y: Their labels, some of them wrong.
        truth: Their true labels.
        x_test: Test images.
        y_test: Their labels, all of them right.
    """

    x: Float[Tensor, "n 64"]
    y: Int[Tensor, " n"]
    truth: Int[Tensor, " n"]
    x_test: Float[Tensor, "m 64"]
    y_test: Int[Tensor, " m"]

    @property
    def flipped(self) -> Bool[Tensor, " n"]:
        """Which training labels are wrong."""
        return self.y != self.truth


@dataclass(frozen=True, eq=False)
class Ranking:
    """Training images in some order, the most suspicious first.

    Attributes:
        name: What it is by.
        order: Their indices.
        loss_without: Mean test loss of a net trained again without the first tenth.
    """

    name: str
    order: Int[Tensor, " n"]
    loss_without: float

    def found(self, flipped: Bool[Tensor, " n"], fraction: float) -> int:
        """How many of ``flipped`` are among the first ``fraction`` of the ranking."""
        return int(flipped[self.order[: top(len(self.order), fraction)]].sum())


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that is printed and shown.

    Attributes:
        settings: What was asked for.
        data: Images and labels.
        net: The trained net.
        composition: How the influence model was put together, as keyword arguments of ``compose``.
        scores: Influence of each training image on each test image's loss.
        self_influence: Of each training image on its own loss.
        test_loss: Mean loss on the test images.
        rankings: By self-influence, by influence on the mean test loss and by training loss.
        chance: A random order, to compare with.
        warnings: What the solver reported.
    """

    settings: Settings
    data: Digits
    net: nn.Module
    composition: Mapping[str, Any]
    scores: Float[Tensor, "m n"]
    self_influence: Float[Tensor, " n"]
    test_loss: float
    rankings: tuple[Ranking, ...]
    chance: Ranking
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many the net has."""
        return sum(parameter.numel() for parameter in self.net.parameters())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads cost more than tensors this small gain from them, many times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run(settings: Settings, *, progress: bool = False, registry: Registry = default_registry) -> Result:
    """Train, score and rank.

    Args:
        settings: What to compute.
        progress: Whether to show progress on standard error, if that is a terminal.
        registry: Where solver and source are looked up.

    Raises:
        InfluenceError: A distribution, solver or source is missing, or the composition cannot be solved.
    """
    require_extra("demo", "The demo", "sklearn.datasets", "jinja2", "PIL.Image")
    composition = composed(settings, registry)
    data = load(settings)
    net = train(data, settings, progress=progress)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = compose(net, nn.CrossEntropyLoss(), **composition, registry=registry)
        model.fit([(data.x, data.y)])
        scores = influences_on_test(model, data, progress=progress)
        own = model.self_influences(data.x, data.y)
    if not (torch.isfinite(scores).all() and torch.isfinite(own).all()):
        raise NonFiniteError(
            f"The solver {settings.solver!r} returned NaN or infinity at λ = {settings.strength:g}: raise it "
            "with --regularization."
        )
    suspicion = {
        "self-influence": own,
        "influence on the test loss": -scores.mean(0),
        "training loss": losses(net, data.x, data.y),
        "chance": torch.rand(len(data.y), generator=torch.Generator().manual_seed(settings.seed)),
    }
    rankings = []
    for name, score in _bar(suspicion.items(), "Training again", "net", progress):
        order = score.argsort(descending=True, stable=True)
        rankings.append(Ranking(name, order, loss_without(order, data, settings)))
    *ranked, chance = rankings
    test_loss = losses(net, data.x_test, data.y_test).mean().item()
    reported = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    return Result(settings, data, net, composition, scores, own, test_loss, tuple(ranked), chance, reported)


def composed(settings: Settings, registry: Registry = default_registry) -> dict[str, Any]:
    """The keyword arguments of ``compose``; unknown names raise here, before anything is computed."""
    registry.lookup("solver", settings.solver)
    source = registry.lookup("source", settings.source)
    # The graphs of a data set this small fit into memory, and further products are cheaper with them.
    kept = {"precompute_grad": True} if "precompute_grad" in source.options else {}
    return {
        "solver": {"name": settings.solver, **SOLVER_OPTIONS.get(settings.solver, {})},
        "source": {"name": settings.source, **kept},
        "hessian_regularization": settings.strength,
    }


def load(settings: Settings) -> Digits:
    """Scikit-learn's digits, split and with some training labels flipped, all by the seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.data).float() / 16
    y = torch.from_numpy(bunch.target).long()
    wanted = settings.training_images + settings.test_images
    if wanted > len(y):
        raise InvalidInputError(f"There are {len(y)} digits, not {wanted}: ask for fewer.")
    generator = torch.Generator().manual_seed(settings.seed)
    test, training = torch.randperm(len(y), generator=generator)[:wanted].tensor_split([settings.test_images])
    given = y[training].clone()
    flipped = torch.randperm(len(given), generator=generator)[: round(settings.flipped * len(given))]
    given[flipped] += torch.randint(1, CLASSES, flipped.shape, generator=generator)
    return Digits(x[training], given % CLASSES, y[training], x[test], y[test])


def train(data: Digits, settings: Settings, *, progress: bool = False) -> nn.Module:
    """A small net fitted to the given labels: few passes and weight decay, so that it learns few by heart."""
    generator = torch.Generator().manual_seed(settings.seed)
    layers = [_linear(PIXELS, HIDDEN, generator), nn.Tanh(), _linear(HIDDEN, CLASSES, generator)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in _bar(range(settings.epochs), "Training", "epoch", progress):
        for batch in torch.randperm(len(data.y), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
    return net.eval()


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer initialised by ``generator`` alone."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def influences_on_test(
    model: TorchInfluenceFunctionModel, data: Digits, *, progress: bool = False
) -> Float[Tensor, "m n"]:
    """Influence of each training image on the loss of each test image."""
    chunks = torch.arange(len(data.y_test)).split(CHUNK)
    return torch.cat(
        [
            model.influences(data.x_test[chunk], data.y_test[chunk], data.x, data.y)
            for chunk in _bar(chunks, "Influences", "chunk", progress)
        ]
    )


def loss_without(order: Int[Tensor, " n"], data: Digits, settings: Settings) -> float:
    """Mean test loss of a net trained in the same way without the first tenth of ``order``."""
    kept = order[top(len(order), FRACTIONS[0]) :].sort().values
    rest = replace(data, x=data.x[kept], y=data.y[kept], truth=data.truth[kept])
    return losses(train(rest, settings), data.x_test, data.y_test).mean().item()


def losses(net: nn.Module, x: Float[Tensor, "n 64"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy of each image."""
    with torch.no_grad():
        return nn.functional.cross_entropy(net(x), y, reduction="none")


def accuracy(net: nn.Module, x: Float[Tensor, "n 64"], y: Int[Tensor, " n"]) -> float:
    """Share of images whose most probable class is their label."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def top(count: int, fraction: float) -> int:
    """How many of ``count`` are ``fraction`` of it."""
    return round(fraction * count)


def _bar(steps: Any, what: str, unit: str, progress: bool) -> Any:
    """``steps`` with a progress bar, on a terminal only."""
    return tqdm(steps, what, unit=unit, leave=False, disable=None if progress else True)
