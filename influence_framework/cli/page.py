"""The demonstration's page: one HTML file with nothing outside it."""

from __future__ import annotations

import base64
import io
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
from influence_framework.cli.report import composition_text

CASES = 6
MISCLASSIFIED = 4
TILES = 8
SUSPICIOUS = 50
BINS = 50


@dataclass(frozen=True)
class Tile:
    """One training image with its label and a score.

    Attributes:
        image: A data URI.
        alt: What the image is, in words.
        label: The label that was trained on.
        truth: The true label.
        score: As text, with its sign where it has one.
        width: Of its bar, in per cent of the largest shown beside it.
    """

    image: str
    alt: str
    label: int
    truth: int
    score: str
    width: int

    @property
    def flipped(self) -> bool:
        """Whether it was trained on with a wrong label."""
        return self.label != self.truth


@dataclass(frozen=True)
class Case:
    """One test image, and what pushed the prediction for it which way.

    Attributes:
        image: A data URI.
        alt: What the image is, in words.
        truth: Its label.
        predicted: The most probable class.
        confidence: Its probability, as text.
        loss: As text.
        harmful: The training images with the most negative scores.
        helpful: Those with the most positive ones.
    """

    image: str
    alt: str
    truth: int
    predicted: int
    confidence: str
    loss: str
    harmful: tuple[Tile, ...]
    helpful: tuple[Tile, ...]

    @property
    def right(self) -> bool:
        """Whether the prediction is."""
        return self.predicted == self.truth


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


def render(result: Result) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("influence_framework.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("demo.html.jinja").render(_context(result))


def _context(result: Result) -> dict[str, Any]:
    data, flipped = result.data, result.data.flipped
    count, wrong = len(data.y), int(flipped.sum())
    sizes = [top(count, fraction) for fraction in FRACTIONS]
    suspicious = result.rankings[0].order[:SUSPICIOUS]
    return {
        "count": count,
        "wrong": wrong,
        "test_count": len(data.y_test),
        "accuracy": f"{accuracy(result.net, data.x_test, data.y_test):.1%}",
        "net": f"{PIXELS}–{HIDDEN}–{CLASSES}",
        "parameters": result.parameters,
        "seed": result.settings.seed,
        "composition": composition_text(result),
        "arguments": result.composition,
        "fractions": [f"{fraction:.0%}" for fraction in FRACTIONS],
        "sizes": sizes,
        "chance": [f"{wrong * size / count:.1f}" for size in sizes],
        "test_loss": f"{result.test_loss:.3f}",
        "chance_loss": f"{result.chance.loss_without:.3f}",
        "rows": [_row(ranking, flipped) for ranking in result.rankings],
        "suspicious": _tiles(result, suspicious, result.self_influence, signed=False),
        "suspicious_flipped": int(flipped[suspicious].sum()),
        "cases": list(_cases(result)),
        "warnings": result.warnings,
    }


def _row(ranking: Ranking, flipped: Bool[Tensor, " n"]) -> Row:
    pieces = flipped[ranking.order].double().tensor_split(min(BINS, len(flipped)))
    return Row(
        ranking.name,
        tuple(ranking.found(flipped, fraction) for fraction in FRACTIONS),
        f"{ranking.loss_without:.3f}",
        tuple(round(100 * piece.mean().item(), 1) for piece in pieces),
    )


def _cases(result: Result) -> Iterator[Case]:
    """Misclassified test images with the largest losses first, then others with the largest losses."""
    data = result.data
    with torch.no_grad():
        probabilities = result.net(data.x_test).softmax(1)
    confidence, predicted = probabilities.max(1)
    loss = losses(result.net, data.x_test, data.y_test)
    order = loss.argsort(descending=True, stable=True)
    right = (predicted == data.y_test)[order]
    wrong = order[~right][:MISCLASSIFIED]
    for index in torch.cat([wrong, order[right][: CASES - len(wrong)]]).tolist():
        score = result.scores[index]
        ranked = score.argsort(stable=True)
        harmful = [j for j in ranked[:TILES].tolist() if score[j] < 0]
        helpful = [j for j in ranked.flip(0)[:TILES].tolist() if score[j] > 0]
        tiles = _tiles(result, torch.tensor([*harmful, *helpful], dtype=torch.int64), score, signed=True)
        truth, guess = int(data.y_test[index]), int(predicted[index])
        yield Case(
            image=png(data.x_test[index]),
            alt=f"Test image {index}: a {truth}, predicted to be a {guess}",
            truth=truth,
            predicted=guess,
            confidence=f"{confidence[index].item():.0%}",
            loss=f"{loss[index].item():.2f}",
            harmful=tiles[: len(harmful)],
            helpful=tiles[len(harmful) :],
        )


def _tiles(
    result: Result, indices: Int[Tensor, " k"], score: Float[Tensor, " n"], *, signed: bool
) -> tuple[Tile, ...]:
    data = result.data
    largest = score[indices].abs().max().item() if len(indices) else 1.0
    return tuple(
        Tile(
            image=png(data.x[j]),
            alt=_description(j, int(data.y[j]), int(data.truth[j])),
            label=int(data.y[j]),
            truth=int(data.truth[j]),
            score=number(score[j].item(), signed=signed),
            width=round(100 * abs(score[j].item()) / largest) if largest else 0,
        )
        for j in indices.tolist()
    )


def _description(index: int, label: int, truth: int) -> str:
    if label == truth:
        return f"Training image {index}: a {truth}, labelled so"
    return f"Training image {index}: a {truth}, labelled {label} (flipped)"


def number(value: float, *, signed: bool) -> str:
    """About three digits, with a true minus sign."""
    size = abs(value)
    sign = "+" if signed else ""
    if 0 < size < 0.01:
        return f"{value:{sign}.1e}".replace("-", "−")
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:{sign},.{decimals}f}".replace("-", "−")


def png(pixels: Float[Tensor, " 64"]) -> str:
    """An image as a data URI: dark ink on white, in its 8 × 8 pixels."""
    from PIL import Image

    levels = (255 * (1 - pixels.reshape(8, 8).clamp(0, 1))).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.numpy()).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
