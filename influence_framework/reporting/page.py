"""Scores as one page to read: who helped, who harmed, and how the scores were made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_framework.attribution.outputs import SelfInfluence
from influence_framework.attribution.reading import Stored
from influence_framework.errors import InvalidInputError
from influence_framework.loading import core_version
from influence_framework.reporting.facts import chart, facts, lede, notices, sides, solved
from influence_framework.reporting.facts import solves as table_of_solves
from influence_framework.reporting.points import Points, Shown
from influence_framework.reporting.scores import (
    Both,
    Extract,
    Side,
    both,
    extract,
    own_influence,
    stored_of,
)
from influence_framework.reporting.templating import environment, number, rendered, require_extra
from influence_framework.reporting.tokens import TokenScores, levels
from influence_framework.reports import SolveReport

if TYPE_CHECKING:
    from influence_framework.influence import TorchInfluenceFunctionModel

COUNT = 6
"""Training points on each side of a test point."""

RANKED = 24
"""Training points of a ranking."""

TITLE = "Which training points helped, and which harmed?"


@dataclass(frozen=True)
class Page:
    """A page of HTML with nothing outside it.

    Attributes:
        html: Its text.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, at once or not at all.

        Returns:
            Where it is.

        Raises:
            InvalidInputError: There is no such folder, or it cannot be written to.
        """
        target = Path(path).expanduser().absolute()
        temporary = target.with_name(f"{target.name}.new")
        try:
            temporary.write_text(self.html, encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InvalidInputError(f"Cannot write {target}: {error.strerror}.") from None
        return target


def report(
    scores: Any,
    *,
    test: Any = None,
    train: Any = None,
    self_influence: Any = None,
    token_scores: TokenScores | None = None,
    test_token_scores: TokenScores | None = None,
    model: TorchInfluenceFunctionModel | None = None,
    solves: SolveReport | None = None,
    test_ids: Sequence[Any] | None = None,
    train_ids: Sequence[Any] | None = None,
    count: int = COUNT,
    title: str = TITLE,
) -> Page:
    """A page of HTML that shows scores with the points they are of.

    For every test point the ``count`` training points with the largest positive scores and as many with the
    smallest negative ones; rankings over all test points and by self-influence; how the scores are distributed;
    and how they were made. Pictures and texts are in the page once for each point that is shown.

    Args:
        scores: What ``inf.attribute`` has returned, the path of its store, or scores ``(n_test, n_train)``.
        test: The test points: pictures, texts, rows, a loader, or :class:`Points` with labels. Left out,
            identifiers alone are shown.
        train: The training points likewise.
        self_influence: ``(n_train,)``, or what ``inf.attribute`` has returned or stored of the output
            ``"self_influence"``: adds a ranking.
        token_scores: What each token of a training sequence adds to its score, to colour it: ``(n_test,
            n_train, T)`` as from ``model.token_influences``, or a function of the position of a test point and
            the positions of ``k`` training points that returns ``(k, T)``, so that only those shown are
            computed. The training points have to be tokens.
        test_token_scores: What each token of a test sequence adds to its score with a training point, likewise:
            from ``model.token_influences(..., side="test")``. Colours the test sequence by one of the training
            points beside it, which the reader picks. The test points have to be tokens.
        model: Tells how the scores were made, where they are not from a store, which tells that itself.
        solves: What came of the solves; ``model.report``, of its last call, where left out.
        test_ids: Identifiers of the test points, where ``scores`` is a matrix; their positions where left out.
        train_ids: Of the training points.
        count: How many training points on each side.
        title: Of the page.

    Raises:
        InvalidInputError: What does not fit together, with the remedy; no finished store.
        MissingExtraError: ``pip install 'influence-framework[report]'`` is to be run first.
    """
    data, context = contents(
        scores,
        test=test,
        train=train,
        self_influence=self_influence,
        token_scores=token_scores,
        test_token_scores=test_token_scores,
        model=model,
        solves=solves,
        test_ids=test_ids,
        train_ids=train_ids,
        count=count,
        title=title,
    )
    return Page(rendered(environment().get_template("report.html.jinja"), data, **context))


def contents(
    scores: Any,
    *,
    test: Any = None,
    train: Any = None,
    self_influence: Any = None,
    token_scores: TokenScores | None = None,
    test_token_scores: TokenScores | None = None,
    model: TorchInfluenceFunctionModel | None = None,
    solves: SolveReport | None = None,
    test_ids: Any = None,
    train_ids: Any = None,
    count: int = COUNT,
    ranked: int = RANKED,
    title: str = TITLE,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the script of a page shows, and what its template does; arguments as of :func:`report`.

    ``ranked`` is how many training points a ranking has at most.
    """
    require_extra("report", "A report", "jinja2", "PIL.Image")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInputError(f"count must be a positive integer, got {count!r}.")
    stored = stored_of(scores, test_ids, train_ids)
    if model is not None and "solver" in stored.manifest:
        raise InvalidInputError("The store tells how its scores were made: leave model out.")
    own = None if self_influence is None else own_influence(self_influence, stored)
    if test is not None and not len(stored.test_ids):
        raise InvalidInputError("There are no scores of test points: leave test out.")
    found = extract(stored, count, ranked)
    totals, failures = solved(stored, model, solves)
    rankings = _rankings(stored, found, own, ranked)
    places = _places(found, rankings)
    trained = Points.of(train).shown(stored.train_ids, list(places), "training points")
    tested = _tested(test, stored, found)
    if token_scores is not None and (trained.kind != "tokens" or not found.tests):
        raise InvalidInputError(
            "token_scores colour the tokens of training sequences beside single test points: pass these by "
            "train=Points(ids, decode=...), or as lists of strings."
        )
    if test_token_scores is not None and tested.kind != "tokens":
        raise InvalidInputError(
            "test_token_scores colour the tokens of test sequences: pass these by "
            "test=Points(ids, decode=...), or as lists of strings."
        )
    colours = token_scores, test_token_scores
    tests = [
        _test(i, stored, tested, found.tests[i], places, trained, colours) for i in range(len(found.tests))
    ]
    data = {
        "kinds": {"test": tested.kind, "train": trained.kind},
        "sides": sides(stored),
        "columns": trained.columns,
        "test_columns": tested.columns,
        "together": trained.kind == tested.kind == "row" and trained.columns == tested.columns,
        "tests": tests,
        "train": [
            {"id": str(stored.train_ids[position]), **dict(trained.fields(place))}
            for position, place in places.items()
        ],
        "ranks": [_rank(one, places) for ranking in rankings for one in ranking.sides],
    }
    return data, {
        "title": title,
        "lede": lede(stored),
        "tests": len(tests),
        "coloured": token_scores is not None,
        "picked": test_token_scores is not None,
        "how_to_read": stored.how_to_read(),
        "notices": notices(found.lost, failures),
        "rankings": _numbered(rankings),
        "distribution": chart(found.distribution, stored),
        "facts": facts(stored, model),
        "code": ("Solver", "Curvature"),
        "solves": table_of_solves(totals),
        "version": core_version(),
    }


@dataclass(frozen=True)
class RankedSide:
    """One side of a ranking: its title, what a title says of the scores, and its points."""

    side: str
    title: str
    small: str
    points: Side


@dataclass(frozen=True)
class Ranking:
    """Training points in an order of their own."""

    id: str
    title: str
    text: str
    sides: tuple[RankedSide, ...]


def _rankings(stored: Stored, found: Extract, own: Any, ranked: int) -> list[Ranking]:
    rankings = []
    if found.overall is not None and stored.output != SelfInfluence.name:
        text = "By the mean of their scores over all test points."
        rankings.append(Ranking("overall", "Over all test points", text, _sides(found.overall, stored)))
    if stored.output == SelfInfluence.name and found.overall is not None:
        rankings.append(_own_ranking(found.overall))
    if own is not None:
        rankings.append(_own_ranking(both(own, np.arange(len(own)), ranked)))
    return rankings


def _sides(pair: Both, stored: Stored) -> tuple[RankedSide, ...]:
    helpful, harmful = sides(stored)
    return RankedSide("helpful", *helpful, pair.helpful), RankedSide("harmful", *harmful, pair.harmful)


def _own_ranking(pair: Both) -> Ranking:
    text = (
        "How strongly each training point pulls the model towards its own label. Near the top are points that "
        "the model would not predict from the others: rare ones, hard ones, and wrong labels."
    )
    sides = [RankedSide("helpful", "Largest self-influence", "", pair.helpful)]
    if pair.harmful.positions:
        sides.append(RankedSide("harmful", "Below zero", "the curvature is not positive", pair.harmful))
    return Ranking("own", "By self-influence", text, tuple(sides))


def _places(found: Extract, rankings: Sequence[Ranking]) -> dict[int, int]:
    """Where each training point that is shown stands among them, by its position."""
    sides = [side for pair in found.tests for side in (pair.helpful, pair.harmful)]
    sides += [side.points for ranking in rankings for side in ranking.sides]
    positions = sorted({position for side in sides for position in side.positions})
    return {position: place for place, position in enumerate(positions)}


def _tested(test: Any, stored: Stored, found: Extract) -> Shown:
    if not found.tests:
        return Shown("none", (), [], None, None)
    return Points.of(test).shown(stored.test_ids, range(len(stored.test_ids)), "test points")


def _test(
    i: int,
    stored: Stored,
    tested: Shown,
    pair: Both,
    places: Mapping[int, int],
    trained: Shown,
    colours: tuple[TokenScores | None, TokenScores | None],
) -> dict[str, Any]:
    positions = [*pair.helpful.positions, *pair.harmful.positions]
    of_train, of_test = colours
    coloured: list[list[str | None]] = [[] for _ in positions]
    if of_train is not None:
        sequences = [trained.items[places[p]] for p in positions]
        coloured = [[own] for own in levels("token_scores", of_train, i, positions, sequences, stored)]
    if of_test is not None:
        sequences = [tested.items[i]] * len(positions)
        found = levels("test_token_scores", of_test, i, positions, sequences, stored)
        coloured = [[*(own or [None]), one] for own, one in zip(coloured, found, strict=True)]
    largest = max(map(abs, (*pair.helpful.scores, *pair.harmful.scores)), default=0.0)
    split = len(pair.helpful.positions)
    return {
        "id": str(stored.test_ids[i]),
        **dict(tested.fields(i)),
        "most": pair.helpful.scores[0] if split else 0.0,
        "least": pair.harmful.scores[0] if pair.harmful.scores else 0.0,
        "up": _entries(pair.helpful, places, largest, coloured[:split]),
        "down": _entries(pair.harmful, places, largest, coloured[split:]),
    }


def _entries(
    side: Side, places: Mapping[int, int], largest: float, coloured: Sequence[Sequence[str | None]] = ()
) -> list[list[Any]]:
    entries: list[list[Any]] = []
    for rank, (position, score) in enumerate(zip(side.positions, side.scores, strict=True)):
        width = round(100 * abs(score) / largest) if 0 < largest < math.inf else 100
        entries.append([places[position], number(score, signed=True), width])
        entries[-1].extend(coloured[rank] if coloured else ())
    return entries


def _rank(side: RankedSide, places: Mapping[int, int]) -> dict[str, Any]:
    largest = max(map(abs, side.points.scores), default=0.0)
    entries = _entries(side.points, places, largest)
    return {"side": side.side, "title": side.title, "small": side.small, "entries": entries}


def _numbered(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Rankings for the template, each side by its number for the script."""
    numbered, start = [], 0
    for ranking in rankings:
        places = list(range(start, start + len(ranking.sides)))
        start += len(places)
        numbered.append({"id": ranking.id, "title": ranking.title, "text": ranking.text, "places": places})
    return numbered
