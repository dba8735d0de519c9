"""What a page says in words: how to read the scores, how they are distributed, and how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from influence_framework.attribution.outputs import Array, Mean, SelfInfluence, TopK
from influence_framework.attribution.reading import Stored
from influence_framework.attribution.run import composition
from influence_framework.reporting.scores import BINS, Distribution
from influence_framework.reporting.templating import number
from influence_framework.reports import SUMMARY, BlockTotals, SolveReport

if TYPE_CHECKING:
    from influence_framework.influence import TorchInfluenceFunctionModel

BLOCKS = 30
"""Blocks that the table of solves lists by themselves."""


def lede(stored: Stored) -> str:
    """How many points there are."""
    train = f"{len(stored.train_ids):,} training points"
    if stored.output == SelfInfluence.name:
        return f"The influence of {train}, each on its own loss."
    if stored.output == Mean.name:
        return f"The influence of {train} on the mean {stored.quantity} of the test points."
    tests = len(stored.test_ids)
    return (
        f"The influence of {train} on the {stored.quantity} of {tests:,} test point{'s' if tests > 1 else ''}."
    )


def sides(stored: Stored) -> tuple[tuple[str, str], tuple[str, str]]:
    """Titles of the training points with the largest and the smallest scores, and what their signs say."""
    said = f"lowered the {stored.quantity}", f"raised the {stored.quantity}"
    titles = ("Most helpful", "Most harmful") if stored.of_loss else ("Most positive", "Most negative")
    return (titles[0], said[0]), (titles[1], said[1])


def notices(lost: int, failures: tuple[str, ...]) -> list[str]:
    """What a reader has to know before all else."""
    said = []
    if lost:
        what = "score is" if lost == 1 else "scores are"
        said.append(
            f"{lost:,} {what} not finite (NaN or infinity), and in no ranking. A λ that is larger, or another "
            "solver, may help."
        )
    said += [f"Not everything was solved to what the solver promises: {line}" for line in failures]
    return said


def chart(found: Distribution | None, stored: Stored) -> dict[str, Any] | None:
    """The bars of the distribution: their heights count scores on a logarithmic scale."""
    if found is None:
        return None
    most = math.log1p(max(found.bars))
    width = (found.high - found.low) / BINS
    bars = []
    for i, bar in enumerate(found.bars):
        middle = found.low + (i + 0.5) * width
        side = "up" if middle > 0 else "down" if middle < 0 else "none"
        bars.append({"height": round(100 * math.log1p(bar) / most, 1), "side": side})
    low, high = (number(end, signed=True) for end in (found.low, found.high))
    kept = "The extreme scores that were kept: " if stored.output == TopK.name else ""
    text = (
        f"{kept}{found.count:,} scores from {low} to {high}, {number(found.mean, signed=True)} on average; "
        f"{found.positive:.0%} of them are positive. The heights count scores on a logarithmic scale, so that "
        "single ones can be seen."
    )
    inside = found.low < 0 < found.high
    return {
        "text": text,
        "alt": f"Histogram of {found.count:,} scores, most of them between the extremes",
        "bars": bars,
        "zero": round(-found.low / width, 2) if inside else None,
        "low": low,
        "high": high,
    }


def facts(stored: Stored, model: TorchInfluenceFunctionModel | None) -> list[tuple[str, str]]:
    """Composition, λ, units and what else tells how the scores were made."""
    made = composition(model) if model is not None else stored.manifest
    found: list[tuple[str, str]] = []
    for term, key in (("Solver", "solver"), ("Curvature", "source")):
        if key in made:
            found.append((term, str(made[key])))
    if "blocks" in made:
        found.append(("λ", strengths(made["blocks"])))
    found.append(("Scores", f"{stored.output}: {stored.manifest.get('units', '')}"))
    if normalize := stored.manifest["output"].get("normalize"):
        found.append(("Divided by", str(normalize)))
    for term, ids in (("Training points", stored.train_ids), ("Test points", stored.test_ids)):
        if len(ids):
            found.append((term, _identifiers(ids)))
    for name, version in dict(stored.manifest.get("versions", {})).items():
        found.append((str(name), str(version)))
    return found


def strengths(blocks: Mapping[str, float]) -> str:
    """λ of all blocks."""
    low, high = min(blocks.values()), max(blocks.values())
    between = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    names = ", ".join(list(blocks)[:4]) + (", …" if len(blocks) > 4 else "")
    return f"{between}, in units of the curvature of the mean training loss; blocks: {len(blocks)} ({names})"


def _identifiers(ids: Array) -> str:
    return f"{len(ids):,}, from {ids[0]} to {ids[-1]}" if len(ids) > 1 else f"1, {ids[0]}"


def solves(blocks: tuple[BlockTotals, ...]) -> dict[str, Any] | None:
    """The table of what came of the solves, those that failed first; ``None`` where nothing is known."""
    if not blocks:
        return None
    rows = [block.cells() for block in sorted(blocks, key=lambda block: -block.failed)[:BLOCKS]]
    if len(blocks) > BLOCKS:
        rest = blocks[BLOCKS:]
        rows.append((f"… and {len(rest)} more", *[""] * (len(SUMMARY) - 1)))
    return {"names": SUMMARY, "rows": rows}


def solved(
    stored: Stored, model: TorchInfluenceFunctionModel | None, given: SolveReport | None
) -> tuple[tuple[BlockTotals, ...], tuple[str, ...]]:
    """What came of the solves, and what failed among them: from a report, else the store, else the model."""
    report = given if given is not None else model.report if model is not None else None
    if report is None:
        return stored.solves, stored.failures
    failures = report.failures(quiet=True)
    return tuple(block.totals() for block in report.blocks), (failures,) if failures else ()
