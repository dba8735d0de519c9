"""The solver ``ekfac`` against kronfluence and pydvl.

kronfluence is compared on the empirical Fisher, where nothing is random and scores must agree. It sums losses
over a batch, divides second moments by the number of samples, adds its damping to the eigenvalues and gives
``+g_testᵀ (C + λI)⁻¹ g``: the normalisation and sign of this framework.

pydvl is compared on the Fisher information, of which it has its own notion. Its scores must agree where the
framework is given its pseudo-gradients too.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import problems
import torch
from analyzer import IN_MEMORY, Kronfluence
from common import HEADER, quickest, relative_error, row
from kronfluence.task import Task
from pseudo_gradients import PydvlFisher
from pydvl.influence.torch import EkfacInfluence
from timing import paired
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import influence_framework as inf

WIDTHS = [64, 1024, 512, 10]


@dataclass(frozen=True)
class Setting:
    """A trained net, its data and λ."""

    what: str
    net: nn.Module
    data: problems.Digits
    strength: float

    def ours(self, batch_size: int, source: Any = "empirical_fisher", **solver: Any) -> Tensor:
        """Fit and all scores with ``ekfac``."""
        model = inf.compose(
            self.net,
            problems.LOSS,
            solver={"name": "ekfac", **solver},
            source=source,
            hessian_regularization=self.strength,
        ).fit(self.data.loader(batch_size))
        return model.influences(self.data.x_test, self.data.y_test, self.data.x, self.data.y)

    def by_batch(self, source: Any = "empirical_fisher") -> Callable[[int], Callable[[], Tensor]]:
        return lambda size: partial(self.ours, size, source)


class Classification(Task):
    """Cross-entropy, summed over the batch as kronfluence asks."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def against_kronfluence(setting: Setting, sizes: Sequence[int], runs: int) -> str:
    mine = quickest(setting.by_batch(), sizes)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        data = setting.data
        points = TensorDataset(data.x, data.y), TensorDataset(data.x_test, data.y_test)
        peer = Kronfluence(setting.net, Classification(), *points, setting.strength, folder)
        theirs = peer.quickest(sizes)
        pairing = paired(partial(setting.ours, mine), lambda: peer.run(theirs), runs)
        off = relative_error(setting.ours(mine), peer.run(theirs))
    notes = f"batch {mine}, scores differ by {off:.0e}", f"batches {', '.join(map(str, theirs))}"
    return row(f"{setting.what}, λ = {setting.strength:.2g}", pairing, *notes)


def pydvl_scores(setting: Setting, size: int) -> Tensor:
    """Fit at batch 500 and all scores with pydvl, ``size`` training points at a time."""
    data = setting.data
    model = EkfacInfluence(setting.net, update_diagonal=True, hessian_regularization=setting.strength)
    model.fit(data.loader(500))
    if size >= len(data.x):
        return model.influences(data.x_test, data.y_test, data.x, data.y)
    factors = model.influence_factors(data.x_test, data.y_test)
    parts = zip(data.x.split(size), data.y.split(size), strict=True)
    return torch.cat([model.influences_from_factors(factors, x, y) for x, y in parts], dim=1)


def against_pydvl(setting: Setting, runs: int) -> Iterator[str]:
    """pydvl with the training points in parts of the best size, and all at once as it takes them by itself."""
    mine = quickest(setting.by_batch("gauss_newton"), (100, 500, 1500))
    best = quickest(lambda size: partial(pydvl_scores, setting, size), (10, 25, 100))
    exact = setting.ours(mine, "gauss_newton", samples="exact")
    drawn = [setting.ours(mine, "gauss_newton", seed=seed) for seed in (0, 1)]
    ours = (
        f"batch {mine}, one draw; correlation with exact expectations {correlation(drawn[0], exact):.4f}, "
        f"of two seeds {correlation(*drawn):.4f}"
    )
    found, again = pydvl_scores(setting, best), pydvl_scores(setting, best)
    off = relative_error(setting.ours(mine, PydvlFisher()), found)
    agreement = (
        f"correlation with exact expectations {correlation(found, exact):.4f}; "
        f"differs by {relative_error(found, again):.0e} from a second run, "
        f"by {off:.0e} from ours with its pseudo-gradients"
    )
    what = f"{setting.what}, λ = {setting.strength:.2g}"
    pairing = paired(partial(setting.ours, mine, "gauss_newton"), partial(pydvl_scores, setting, best), runs)
    yield row(what, pairing, ours, f"{best} training points at a time; {agreement}")
    whole = partial(pydvl_scores, setting, len(setting.data.x))
    pairing = paired(partial(setting.ours, mine, "gauss_newton"), whole, min(runs, 3))
    yield row(what, pairing, ours, "all training points at once, as `influences` takes them")


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1])


def covered_only(net: nn.Module) -> nn.Module:
    """The net with everything frozen but linear layers and convolutions, all that kronfluence covers."""
    net.requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.requires_grad_(True)
    return net


def dense(data: problems.Digits) -> Setting:
    net = problems.train(problems.seeded(lambda: problems.dense(WIDTHS)), data, steps=60, lr=1e-3)
    return Setting("Digits, 64-1024-512-10", net, data, 1e-3)


def convolutional(data: problems.Digits) -> Setting:
    images = problems.images(data, 500, 50)
    net = problems.train(problems.seeded(problems.convolutional), images, steps=60, lr=1e-2)
    return Setting("500 + 50 images of 3 × 32 × 32, three `Conv2d`", covered_only(net), images, 1e-2)


def transformer(data: problems.Digits) -> Setting:
    sequences = problems.sequences(data, 200, 20)
    net = problems.train(problems.seeded(problems.Transformer), sequences, steps=10, lr=1e-3)
    what = "200 + 20 sequences of 64 tokens, four encoders of width 128"
    return Setting(what, covered_only(net), sequences, 1e-2)


def report(runs: int) -> Iterator[str]:
    data = problems.digits()
    digits = dense(data)
    compared = (digits, convolutional(data), transformer(data))
    yield from (
        "## Against kronfluence: fit + all pairwise scores, empirical Fisher",
        "",
        "Each side at its best batch sizes: one of ours, one for each of kronfluence's passes (covariances, "
        "eigenvalues, scores). kronfluence covers linear layers and convolutions; the rest is frozen on both "
        "sides. Its files lie in memory, with neither log nor progress bar.",
        "",
        HEADER.format(peer="kronfluence"),
    )
    for setting, sizes in zip(compared, ((25, 100, 500), (25, 100, 500), (20, 50, 200)), strict=True):
        with warnings.catch_warnings():
            # kronfluence calls what torch has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            yield against_kronfluence(setting, sizes, runs)
    yield from (
        "",
        "## Against pydvl: fit + all pairwise scores, `update_diagonal=True`",
        "",
        HEADER.format(peer="pydvl"),
    )
    yield from against_pydvl(digits, runs)
