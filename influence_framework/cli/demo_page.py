"""The demonstration's page: a report on its scores, with what they find in front."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence_framework.cli.demo import (
    CLASSES,
    FRACTIONS,
    HIDDEN,
    PIXELS,
    Ranking,
    Result,
    accuracy,
    losses,
    top,
)
from influence_framework.cli.demo_text import composition_text
from influence_framework.reporting import Page, Points
from influence_framework.reporting.page import contents
from influence_framework.reporting.templating import environment, rendered

TILES = 8
SUSPICIOUS = 50
BINS = 50


@dataclass(frozen=True)
class Row:
    """One ranking.

    Attributes:
        name: What it is by.
        found: Flipped labels in the first part of it, for each of the fractions.
        loss: Mean test loss after training again without the first part.
        bins: Share of flipped labels in each of equally long pieces, in per cent.
    """

    name: str
    found: tuple[int, ...]
    loss: str
    bins: tuple[float, ...]


def page(result: Result) -> Page:
    """The page: the report, its test images in the order of :func:`worst_first`."""
    order = worst_first(result)
    data, context = contents(
        result.scores[order],
        test_ids=order.numpy(),
        test=Points(
            images(result.data.x_test[order]),
            labels=list(_readings(result, order)),
            marks=_misread(result, order),
        ),
        train=Points(
            images(result.data.x),
            labels=[f"labelled {label}" for label in result.data.y.tolist()],
            marks=_flips(result),
        ),
        self_influence=result.self_influence,
        title="Influence on digits",
        count=TILES,
        ranked=SUSPICIOUS,
    )
    template = environment("influence_framework.cli").get_template("demo.html.jinja")
    return Page(rendered(template, data, **(context | _context(result))))


def _context(result: Result) -> dict[str, Any]:
    data, flipped = result.data, result.data.flipped
    count, wrong = len(data.y), int(flipped.sum())
    sizes = [top(count, fraction) for fraction in FRACTIONS]
    suspicious = result.rankings[0].order[:SUSPICIOUS]
    net = f"{PIXELS}–{HIDDEN}–{CLASSES}, {result.parameters} parameters"
    right = f"{accuracy(result.net, data.x_test, data.y_test):.1%} of {len(data.y_test)} test images read right"
    return {
        "count": count,
        "wrong": wrong,
        "arguments": result.composition,
        "fractions": [f"{fraction:.0%}" for fraction in FRACTIONS],
        "sizes": sizes,
        "chance": [f"{wrong * size / count:.1f}" for size in sizes],
        "test_loss": f"{result.test_loss:.3f}",
        "chance_loss": f"{result.chance.loss_without:.3f}",
        "rows": [_row(ranking, flipped) for ranking in result.rankings],
        "suspicious": len(suspicious),
        "suspicious_flipped": int(flipped[suspicious].sum()),
        "notices": [f"The solver reported: {warning}" for warning in result.warnings],
        "facts": [
            ("Composition", composition_text(result)),
            ("Score", "∇ℓ(test)ᵀ (C + λI)⁻¹ ∇ℓ(training), with C the curvature of the mean training loss"),
            ("Net", f"{net}, {right}"),
            ("Seed", str(result.settings.seed)),
        ],
        "code": ("Composition",),
    }


def _row(ranking: Ranking, flipped: Bool[Tensor, " n"]) -> Row:
    pieces = flipped[ranking.order].double().tensor_split(min(BINS, len(flipped)))
    return Row(
        ranking.name,
        tuple(ranking.found(flipped, fraction) for fraction in FRACTIONS),
        f"{ranking.loss_without:.3f}",
        tuple(round(100 * piece.mean().item(), 1) for piece in pieces),
    )


def worst_first(result: Result) -> Int[Tensor, " m"]:
    """Misread test images with the largest losses first, then the others with the largest losses."""
    loss = losses(result.net, result.data.x_test, result.data.y_test)
    order = loss.argsort(descending=True, stable=True)
    right = (_read(result) == result.data.y_test)[order]
    return torch.cat([order[~right], order[right]])


def _read(result: Result) -> Int[Tensor, " m"]:
    """Each test image's most probable class."""
    with torch.no_grad():
        outputs: Tensor = result.net(result.data.x_test)
    return outputs.argmax(1)


def _readings(result: Result, order: Int[Tensor, " m"]) -> Iterator[str]:
    loss = losses(result.net, result.data.x_test, result.data.y_test)
    for i, read in zip(order.tolist(), _read(result)[order].tolist(), strict=True):
        yield f"{int(result.data.y_test[i])}, read as {read}; loss {loss[i].item():.2f}"


def _misread(result: Result, order: Int[Tensor, " m"]) -> list[str | None]:
    wrong = _read(result) != result.data.y_test
    return ["misread" if wrong[i] else None for i in order.tolist()]


def _flips(result: Result) -> list[str | None]:
    pairs = zip(result.data.truth.tolist(), result.data.flipped.tolist(), strict=True)
    return [f"really {truth}" if flipped else None for truth, flipped in pairs]


def images(pixels: Float[Tensor, "n 64"]) -> Float[Tensor, "n 8 8"]:
    """Images as pictures: dark ink on white."""
    return 1 - pixels.reshape(-1, 8, 8)
