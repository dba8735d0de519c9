"""From scores and timings to tables and plots."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("svg")

from cases import NETS, SEED, Case, Judging
from matplotlib import pyplot as plt

from influence_framework.evaluation import Estimate

OURS = "ours"
ADVISED = "as advised"


@dataclass(frozen=True)
class Library:
    title: str
    distributions: tuple[str, ...]
    marker: str
    colour: str


LIBRARIES = {
    OURS: Library("influence_framework", ("influence-framework", "torch"), "o", "#d62728"),
    "pydvl": Library("pydvl", ("pydvl", "torch"), "s", "#1f77b4"),
    "kronfluence": Library("kronfluence", ("kronfluence", "torch"), "^", "#2ca02c"),
    "dattri": Library("dattri", ("dattri", "torch"), "D", "#9467bd"),
    "captum": Library("captum", ("captum", "torch"), "v", "#8c564b"),
    "trak": Library("TRAK", ("traker", "torch"), "P", "#ff7f0e"),
}
PICTURE = "comparison.svg"
START, END = "<!-- comparison: start, written by make bench -->", "<!-- comparison: end -->"


@dataclass(frozen=True)
class Result:
    """One method on one case, at its best λ; with an error where it could not do it.

    Attributes:
        library: Which.
        method: Its name.
        accuracy: With its interval.
        strength: The best λ.
        fit: Seconds.
        score: Seconds.
        memory: Peak beyond what the process held before, MiB.
        error: Why there is nothing of these.
    """

    library: str
    method: str
    accuracy: Estimate | None = None
    strength: str = ""
    fit: float = 0.0
    score: float = 0.0
    memory: float = 0.0
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.fit + self.score

    @property
    def several(self) -> bool:
        """Whether it is of several nets."""
        return self.method.endswith("nets")

    @classmethod
    def of(cls, folder: Path, library: str, judging: Judging) -> list[Result]:
        """The results of a library in a folder."""
        results = []
        for path in sorted(folder.glob(f"{library}.*.json")):
            method = path.stem.partition(".")[2]
            notes = json.loads(path.read_text())
            with np.load(path.with_name(path.name.replace(".json", ".npz"))) as scores:
                found = {
                    strength: (judging.value(scores[strength]), scores[strength])
                    for strength in notes["by strength"]
                }
            if not found:
                results.append(cls(library, method, error=notes["error"]))
                continue
            best = max(found, key=lambda strength: found[strength][0])
            accuracy = judging.judge(found[best][1])
            results.append(cls(library, method, accuracy, best, **notes["by strength"][best]))
        return results


def front(results: Sequence[Result]) -> list[Result]:
    """Those that no other beats in accuracy without taking longer, the quickest first."""
    ordered = sorted(judged(results), key=lambda r: r.seconds)
    kept: list[Result] = []
    for result in ordered:
        if not kept or shown(result) > shown(kept[-1]):
            kept.append(result)
    return kept


def judged(results: Sequence[Result]) -> list[Result]:
    """Those with an accuracy, the best first; of equal ones, the quickest."""
    found = [result for result in results if result.accuracy is not None]
    return sorted(found, key=lambda result: (-shown(result), result.seconds))


def shown(result: Result) -> float:
    """The accuracy to the three digits that are shown: what differs in later ones is no difference."""
    return round(result.accuracy.value, 3) if result.accuracy is not None else -np.inf


def name(result: Result) -> str:
    return f"{LIBRARIES[result.library].title}: {result.method}"


def table(results: Sequence[Result]) -> list[str]:
    on_front = front(results)
    lines = [
        "| Method | Accuracy | λ | Fit, s | Score, s | Memory, MiB | Front |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in judged(results):
        label = f"**{name(result)}**" if result.library == OURS else name(result)
        lines.append(
            f"| {label} | {result.accuracy:.3f} | {result.strength} | {result.fit:.3f} | {result.score:.3f} | "
            f"{result.memory:.0f} | {'●' if result in on_front else ''} |"
        )
    for result in results:
        if result.error:
            reason = (
                re.sub(r"\s+", " ", result.error).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
            )
            lines.append(f"| {name(result)} | cannot: {reason} | | | | | |")
    return lines


def verdict(results: Sequence[Result]) -> list[str]:
    """Who is best, and whose the front is, in words."""
    mine = [r for r in judged(results) if r.library == OURS]
    peers = [r for r in judged(results) if r.library != OURS]
    lines = []
    for what, several in (("Of one net", False), ("Of several nets", True)):
        ours = next((r for r in mine if r.several is several), None)
        peer = next((r for r in peers if r.several is several), None)
        if ours is not None and peer is not None:
            lead = shown(ours) - shown(peer)
            lines.append(
                f"{what}: {ours.method} of ours {ours.accuracy:.3f} in {ours.seconds:.3f} s, {name(peer)} "
                f"{peer.accuracy:.3f} in {peer.seconds:.3f} s; a lead of {lead:+.3f}."
            )
    said = next((r for r in mine if r.method == ADVISED), None)
    ours = next((r for r in mine if not r.several), None)
    if said is not None and ours is not None:
        lines.append(
            f"What `inf.advise` recommends: {said.accuracy:.3f} in {said.seconds:.3f} s, the advice included; "
            f"{shown(ours) - shown(said):.3f} below the best of ours."
        )
    others = [name(r) for r in front(results) if r.library != OURS]
    lines.append(f"On the front beside ours: {', '.join(others)}." if others else "The front is of ours alone.")
    return lines


def picture(path: Path, cases: Sequence[Case], found: Mapping[str, Sequence[Result]]) -> None:
    plt.rcParams["svg.hashsalt"] = "comparison"
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5))
    for axis, case in zip(axes.flat, cases, strict=False):
        results = judged(found[case.name])
        for key, library in LIBRARIES.items():
            mine = [r for r in results if r.library == key]
            axis.scatter(
                [r.seconds for r in mine],
                [r.accuracy.value for r in mine],  # type: ignore[union-attr]
                marker=library.marker,
                color=library.colour,
                label=library.title,
                s=40,
                alpha=0.85,
                zorder=3 if key == OURS else 2,
            )
        steps = front(results)
        axis.step(
            [r.seconds for r in steps],
            [r.accuracy.value for r in steps],  # type: ignore[union-attr]
            where="post",
            color="#d62728",
            linewidth=0.8,
            alpha=0.6,
        )
        axis.set_xscale("log")
        axis.set_title(case.title.rpartition(", a tenth")[0] or case.title, fontsize=9)
        axis.set_xlabel("seconds to fit and score", fontsize=8)
        axis.set_ylabel(case.unit, fontsize=8)
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def short(cases: Sequence[Case], found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Best of each library and case, of one net."""
    lines = [
        "| | " + " | ".join(library.title for library in LIBRARIES.values()) + " |",
        "|---" * (len(LIBRARIES) + 1) + "|",
    ]
    for case in cases:
        cells = []
        best = {}
        for key in LIBRARIES:
            of_library = [r for r in judged(found[case.name]) if r.library == key and not r.several]
            best[key] = of_library[0] if of_library else None
        top = max(f"{r.accuracy.value:.3f}" for r in best.values() if r is not None and r.accuracy is not None)
        for result in best.values():
            if result is None or result.accuracy is None:
                cells.append("cannot")
                continue
            value = f"{result.accuracy.value:.3f}"
            cells.append(f"{f'**{value}**' if value == top else value}, {result.seconds:.2g} s")
        lines.append(
            f"| {case.title.partition(', ')[0]}, {case.title.split(', ')[1]}: {case.unit} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def write(
    root: Path,
    cases: list[Case],
    judgings: Mapping[str, Judging],
    found: Mapping[str, Sequence[Result]],
    versions: Mapping[str, str],
    strengths: Sequence[float],
    seconds: float | None,
) -> None:
    """``docs/benchmarks.md`` with its picture, and the short form in ``README.md``."""
    picture(root / "docs" / "images" / PICTURE, cases, found)
    summary = short(cases, found)
    took = ", from what an earlier run measured" if seconds is None else f" in {seconds / 60:.0f} minutes"
    load = os.getloadavg()[2]
    grid = ", ".join(f"{strength:g}" for strength in sorted(strengths))
    lines = [
        "# Benchmarks",
        "",
        "How well scores predict retraining, beside other libraries, in what time and memory. Written by "
        f"`make bench` (`python benchmarks/comparison/compare.py`){took}; no figure is entered by hand.",
        "",
        f"![Accuracy against time of every method on every problem](images/{PICTURE})",
        "",
        "Best of each library, of one net: accuracy, and seconds to fit and score.",
        "",
        *summary,
        "",
        "## How it was measured",
        "",
        "- Versions: " + "; ".join(versions.values()) + f"; Python {platform.python_version()}, "
        f"{platform.machine()}, one thread, float32. Each library runs in an environment of its own.",
        f"- The machine has {os.cpu_count()} cores; on average {load:.0f} processes wanted to run while this "
        "was measured, so that times are to be compared with each other only.",
        f"- Every method is judged at its best λ of {grid}, in units of the curvature of the mean loss; where "
        "a library sums over samples or divides by the number of parameters, λ is converted.",
        "- Each method runs in a process of its own, once to warm up and once for each λ. Times are those of "
        "the best λ: fit is all that comes before test points are known, score the rest. dattri works on the "
        "curvature only when it scores. Memory is the peak beyond what the process held before.",
        f"- Seeds: {SEED} for data, subsets and nets; methods of several nets see seeds {SEED} to {NETS - 1}, "
        "all others the first. How the nets are trained stands in `benchmarks/comparison/cases.py`.",
        "- Intervals are 95 %: by bootstrap over test points, for LDS over subsets too, for AUROC over "
        "training points. All methods of a problem are judged by the same retrained models, so that "
        "differences between methods are surer than the intervals.",
        "- ● marks the front: no other method is more accurate in less time.",
        "",
    ]
    for case in cases:
        results = found[case.name]
        lines += [f"## {case.title}", "", case.truth, ""]
        for sentence in (*judgings[case.name].notes, *verdict(results)):
            lines += [sentence, ""]
        lines += [*table(results), ""]
    (root / "docs" / "benchmarks.md").write_text("\n".join(lines))
    readme = root / "README.md"
    text = readme.read_text()
    if START in text:
        before, rest = text.split(START)
        after = rest.split(END)[1]
        readme.write_text("\n".join([before + START, *summary, END + after]))
