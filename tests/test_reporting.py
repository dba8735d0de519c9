"""Pages about scores: what they show of pictures, texts, tokens and rows, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf
from influence_framework.attribution import Stored, attribute
from influence_framework.reporting import Points, report
from influence_framework.reporting.templating import as_json, number
from influence_framework.solving import SolveLog
from tests import small
from tests.pages import Elements, check_self_contained, content, image, said

SCORES = torch.tensor([[3.0, -1.0, 0.0, 2.0, -4.0], [0.5, 0.25, 1.0, -2.0, -0.125]])
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 \"quoted\" 'so'"


def shown(page: Any, side: str, test: int = 0) -> list[tuple[str, str]]:
    """Identifiers and scores on a side of a test point."""
    data = content(page.html)
    return [(data["train"][place]["id"], score) for place, score, *_ in data["tests"][test][side]]


class TestScores:
    def test_extremes_of_every_test_point_are_those_of_its_row(self) -> None:
        page = report(SCORES, count=2)
        assert shown(page, "up") == [("0", "+3.00"), ("3", "+2.00")]
        assert shown(page, "down") == [("4", "−4.00"), ("1", "−1.00")]
        assert shown(page, "up", 1) == [("2", "+1.00"), ("0", "+0.500")]
        assert shown(page, "down", 1) == [("3", "−2.00"), ("4", "−0.125")]

    def test_points_on_the_right_side_of_zero_alone(self) -> None:
        page = report(SCORES)
        assert [identifier for identifier, _ in shown(page, "up")] == ["0", "3"]
        assert [identifier for identifier, _ in shown(page, "down")] == ["4", "1"]

    def test_bars_are_by_the_largest_of_both_sides(self) -> None:
        (case, _) = content(report(SCORES).html)["tests"]
        assert [entry[2] for entry in case["up"]] == [75, 50]
        assert [entry[2] for entry in case["down"]] == [100, 25]

    def test_ranking_over_all_test_points(self) -> None:
        data = content(report(SCORES, count=1).html)
        means = SCORES.mean(0)
        helpful, harmful = data["ranks"]
        expected = [
            (str(i), number(float(means[i]), signed=True)) for i in means.argsort(descending=True).tolist()
        ]
        listed = [(data["train"][place]["id"], score) for place, score, _ in helpful["entries"]]
        assert listed == expected[:2]
        listed = [(data["train"][place]["id"], score) for place, score, _ in harmful["entries"]]
        assert listed == expected[::-1][:2]

    def test_ranking_by_self_influence(self) -> None:
        own = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
        page = report(SCORES, self_influence=own)
        data = content(page.html)
        (ranking,) = [rank for rank in data["ranks"] if rank["title"] == "Largest self-influence"]
        assert [data["train"][entry[0]]["id"] for entry in ranking["entries"]] == ["1", "3", "4", "2", "0"]
        assert "By self-influence" in said(page.html)
        places = [area["data-rank"] for area in Elements(page.html).of("div") if "data-rank" in area]
        assert places == [str(i) for i in range(len(data["ranks"]))]

    def test_what_is_not_finite_is_counted_and_in_no_ranking(self) -> None:
        scores = SCORES.clone()
        scores[0, 0], scores[0, 4], scores[1, 2] = float("nan"), -float("inf"), float("inf")
        page = report(scores)
        assert [identifier for identifier, _ in shown(page, "up")] == ["3"]
        assert [identifier for identifier, _ in shown(page, "down")] == ["1"]
        assert shown(page, "up", 1)[0] == ("0", "+0.500")
        assert "3 scores are not finite (NaN or infinity), and in no ranking" in said(page.html)
        assert "7 scores from −2.00 to +2.00" in said(page.html)

    def test_nothing_finite(self) -> None:
        page = report(torch.full((2, 3), float("nan")))
        assert "6 scores are not finite" in said(page.html)
        assert [test["up"] for test in content(page.html)["tests"]] == [[], []]

    def test_the_distribution_counts_every_score(self) -> None:
        scores = torch.cat([-torch.ones(1, 30), torch.ones(1, 10)], dim=1)
        page = report(scores)
        bars = [bar for bar in Elements(page.html).of("rect") if bar["class"] in ("up", "down")]
        heights = {bar["class"]: float(bar["height"] or 0) for bar in bars}
        assert heights == pytest.approx({"down": 100, "up": 100 * np.log(11) / np.log(31)}, abs=0.1)
        assert "40 scores from −1.00 to +1.00, −0.500 on average; 25% of them are positive" in said(page.html)

    def test_how_to_read_the_sign(self) -> None:
        text = said(report(SCORES).html)
        assert "Positive: the point helps, for up-weighting it lowers that loss; negative: it harms." in text
        assert "removing a point from 5 changes the loss by about +score/5." in text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(-129.4, "−129"), (1683.2, "+1,683"), (46.0, "+46.0"), (-0.5, "−0.500"), (0.00012, "+1.2e−04")],
    )
    def test_number(self, value: float, text: str) -> None:
        assert number(value, signed=True) == text
        assert number(abs(value), signed=False) == text[1:]


class TestPoints:
    def page(self, points: Any, **options: Any) -> Any:
        return content(report(torch.ones(1, len(points)), train=Points(points, **options)).html)

    @pytest.mark.parametrize(
        "make",
        [
            lambda grey: torch.from_numpy(grey).double() / 255,
            lambda grey: torch.from_numpy(grey)[:, None],
            lambda grey: np.stack([grey] * 3, axis=-1),
            lambda grey: [Image.fromarray(one) for one in grey],
            lambda grey: (torch.from_numpy(grey).double() - 10) / 20,
        ],
        ids=["floats", "bytes", "channels last", "pillow", "normalised"],
    )
    def test_pictures_keep_their_pixels(self, make: Callable[[Any], Any]) -> None:
        grey = np.random.default_rng(0).integers(0, 256, (3, 5, 6), dtype=np.uint8)
        grey[:, 0, 0], grey[:, 0, 1] = 0, 255
        data = self.page(make(grey))
        assert data["kinds"]["train"] == "picture"
        for point, expected in zip(data["train"], grey, strict=True):
            found = np.asarray(image(point["item"]).convert("L")).astype(int)
            assert np.abs(found - expected).max() <= 1

    def test_large_pictures_become_small(self) -> None:
        data = self.page(torch.rand(1, 3, 300, 200))
        assert image(data["train"][0]["item"]).size == (64, 96)
        assert len(data["train"][0]["item"]) < 8000

    def test_texts(self) -> None:
        data = self.page(["one", "two", "x" * 5000])
        assert data["kinds"]["train"] == "text"
        assert [len(point["item"]) for point in data["train"]] == [3, 3, 2002]

    @pytest.mark.parametrize(
        "make",
        [
            lambda: pd.DataFrame({"age": [31, 25], "name": ["a", "b"], "size": [1.5, -2.0]}),
            lambda: [{"age": 31, "name": "a", "size": 1.5}, {"age": 25, "name": "b", "size": -2.0}],
        ],
        ids=["pandas", "mappings"],
    )
    def test_rows(self, make: Callable[[], Any]) -> None:
        data = self.page(make())
        assert data["columns"] == ["age", "name", "size"]
        assert [point["item"] for point in data["train"]] == [["31", "a", "1.5"], ["25", "b", "−2"]]

    def test_rows_of_numbers_take_names(self) -> None:
        data = self.page(torch.tensor([[1.0, 2.0]]), columns=["a", "b"])
        assert (data["columns"], data["train"][0]["item"]) == (["a", "b"], ["1", "2"])
        data = self.page(pd.Series([1.0, 2.0]))
        assert [point["item"] for point in data["train"]] == [["1"], ["2"]]

    def test_rows_of_both_sides_share_a_table_where_columns_agree(self) -> None:
        rows = [{"a": 1}, {"a": 2}]
        assert content(report(torch.ones(2, 2), test=rows, train=rows).html)["together"]
        assert not content(report(torch.ones(2, 2), test=rows, train=[{"b": 1}] * 2).html)["together"]

    def test_token_ids_are_decoded_up_to_the_padding(self) -> None:
        words = ["<pad>", "a ", "b "]
        data = self.page(torch.tensor([[1, 2, 0, 0], [2, 0, 1, 0]]), decode=words.__getitem__, padding=0)
        assert [point["item"] for point in data["train"]] == [["a ", "b "], ["b ", "<pad>", "a "]]

    def test_labels_and_marks(self) -> None:
        data = self.page(["x", "y"], labels=torch.tensor([3, 4]), marks=[None, "wrong"])
        assert data["train"] == [
            {"id": "0", "item": "x", "label": "3"},
            {"id": "1", "item": "y", "label": "4", "mark": "wrong"},
        ]

    def test_a_loader_shows_what_it_yields_with_its_labels(self) -> None:
        x, y = torch.rand(7, 4, 4), torch.arange(7)
        loader = DataLoader(TensorDataset(x, y), batch_size=3)
        data = content(report(torch.ones(1, 7), train=loader).html)
        assert [point["label"] for point in data["train"]] == list("012345")
        assert (
            np.abs(np.asarray(image(data["train"][5]["item"]).convert("L")) / 255 - x[5].numpy()).max() < 0.01
        )

    def test_a_loader_of_fields_shows_its_token_ids(self) -> None:
        batches = [{"input_ids": torch.tensor([[1, 2], [2, 1]]), "attention_mask": torch.ones(2, 2).long()}]
        data = content(report(torch.ones(1, 2), train=Points(batches, decode=str)).html)
        assert [point["item"] for point in data["train"]] == [["1", "2"], ["2", "1"]]

    def test_each_training_point_is_in_the_page_once(self) -> None:
        texts = [f"text of point {i}" for i in range(6)]
        scores = torch.arange(6.0).repeat(20, 1)
        html = report(scores, train=texts, count=2, self_influence=scores[0]).html
        assert html.count("text of point 5") == 1

    def test_only_what_is_shown_is_in_the_page(self) -> None:
        scores = torch.cat([torch.arange(1.0, 41.0), torch.zeros(60)])[None]
        html = report(scores, train=[f"text of point {i}." for i in range(100)], count=2).html
        assert "text of point 39." in html
        assert "text of point 38." in html
        assert "text of point 37." not in html


class TestTokens:
    WORDS: list[list[str]] = [["a ", "b ", "c"], ["d ", "e"], ["f"], [], ["g ", "h"]]  # noqa: RUF012
    TOKENS = torch.tensor(
        [
            [[9.0, -9.0, 1.0], [4.5, -1.0, 0.0], [7.0, 0.0, 0.0], [0.0] * 3, [-9.0, 3.0, 0.0]],
            [[0.0] * 3] * 5,
        ]
    )

    def codes(self, page: Any) -> dict[str, str]:
        data = content(page.html)
        case = data["tests"][0]
        return {data["train"][e[0]]["id"]: e[3] for e in [*case["up"], *case["down"]]}

    def test_levels_are_by_the_largest_beside_the_test_point(self) -> None:
        page = report(SCORES, train=self.WORDS, token_scores=self.TOKENS)
        assert self.codes(page) == {"0": "9i1", "3": "", "4": "i3", "1": "4a"}
        assert "A token's colour is what it adds to the score of its sequence" in said(page.html)

    def test_a_function_is_asked_for_what_is_shown_alone(self) -> None:
        asked = []

        def scores(test: int, positions: list[int]) -> torch.Tensor:
            asked.append((test, positions))
            return self.TOKENS[test][positions]

        page = report(SCORES, train=self.WORDS, token_scores=scores, count=1)
        assert asked == [(0, [0, 4]), (1, [2, 3])]
        assert self.codes(page) == {"0": "9i1", "4": "i3"}

    @pytest.mark.parametrize(
        ("tokens", "train", "message"),
        [
            (torch.zeros(2, 5, 3), ["text"] * 5, "pass these by train=Points"),
            (torch.zeros(5, 2, 3), WORDS, r"expected shape \(2, 5, T\), got \(5, 2, 3\)"),
            (torch.zeros(2, 5, 2), WORDS, "have 2 tokens, but a sequence shown has 3"),
            (lambda test, positions: torch.zeros(1, 3), WORDS, r"test point 0: expected shape \(4, T\)"),
            (torch.full((2, 5, 3), float("nan")), WORDS, "test point 0 are not finite"),
            ("bright", WORDS, "got str"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_does_not_fit(self, tokens: Any, train: Any, message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            report(SCORES, train=train, token_scores=tokens)


class TestTokensOfTestPoints:
    WORDS: list[list[str]] = [["who ", "is ", "it"], ["what"]]  # noqa: RUF012
    TOKENS = torch.zeros(2, 5, 3)
    TOKENS[0, :, 0] = torch.tensor([9.0, -4.5, 0.0, 1.0, -9.0])
    TOKENS[0, 0, 2] = -9.0

    def test_they_have_levels_for_every_training_point_beside_them(self) -> None:
        page = report(SCORES, test=self.WORDS, test_token_scores=self.TOKENS)
        data = content(page.html)
        found = {data["train"][e[0]]["id"]: e[3:] for side in ("up", "down") for e in data["tests"][0][side]}
        assert found == {
            "0": [None, "90i"],
            "3": [None, "100"],
            "4": [None, "i00"],
            "1": [None, "d00"],  # -4.5 of 9, to the even level
        }
        assert "A test point's own tokens show what they add" in said(page.html)
        assert "own tokens" not in said(report(SCORES, test=self.WORDS).html)

    def test_both_sides_together(self) -> None:
        page = report(
            SCORES,
            test=self.WORDS,
            train=TestTokens.WORDS,
            token_scores=TestTokens.TOKENS,
            test_token_scores=lambda test, positions: self.TOKENS[test][positions],
        )
        assert content(page.html)["tests"][0]["up"][0][3:] == ["9i1", "90i"]

    @pytest.mark.parametrize(
        ("tokens", "test", "message"),
        [
            (torch.zeros(2, 5, 3), ["text"] * 2, "pass these by test=Points"),
            (torch.zeros(2, 5, 2), WORDS, "test_token_scores have 2 tokens, but a sequence shown has 3"),
            (torch.zeros(2, 4, 3), WORDS, r"test_token_scores: expected shape \(2, 5, T\)"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_does_not_fit(self, tokens: Any, test: Any, message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            report(SCORES, test=test, test_token_scores=tokens)


class TestSafety:
    def test_hostile_words_stay_words(self) -> None:
        page = report(
            SCORES,
            test=Points([HOSTILE] * 2, labels=[HOSTILE] * 2, marks=[HOSTILE] * 2),
            train=Points([{HOSTILE: HOSTILE}] * 5, labels=[HOSTILE] * 5),
            test_ids=[HOSTILE, "other"],
            train_ids=[HOSTILE] * 5,
            title=HOSTILE,
        )
        check_self_contained(page.html)
        data = content(page.html)
        assert data["columns"] == [HOSTILE]
        assert data["tests"][0] | {"up": [], "down": []} == {
            "id": HOSTILE,
            "item": HOSTILE,
            "label": HOSTILE,
            "mark": HOSTILE,
            "most": 3.0,
            "least": -4.0,
            "up": [],
            "down": [],
        }
        assert data["train"][0] == {"id": HOSTILE, "item": [HOSTILE], "label": HOSTILE}
        assert "<script>alert" not in page.html
        assert HOSTILE.split("\u2028")[0].strip() in said(page.html)

    def test_half_a_character_can_be_written(self, tmp_path: Path) -> None:
        page = report(torch.ones(1, 1), train=["half \ud83d of it"], title="half \ud83d")
        assert "half ? of it" in page.save(tmp_path / "page.html").read_text(encoding="utf-8")

    def test_no_number_that_is_no_json(self) -> None:
        with pytest.raises(ValueError, match="JSON"):
            as_json({"score": float("nan")})


def test_a_thousand_test_points_stay_small() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1000, 3000, generator=generator)
    pictures = torch.rand(3000, 3, 8, 8, generator=generator)
    page = report(scores, test=pictures[:1000], train=Points(pictures, labels=range(3000)))
    # A test point takes its picture and twelve entries; a training point, once, its picture.
    assert len(page.html) < 1000 * (600 + 12 * 30) + 3000 * 700
    # What is in the document does not depend on how many points there are; a script shows ten at a time.
    elements = Elements(page.html)
    few = Elements(report(scores[:2], test=pictures[:2], train=Points(pictures, labels=range(3000))).html)
    assert abs(len(elements.found) - len(few.found)) < 80
    assert len(elements.found) < 400
    assert len(content(page.html)["tests"]) == 1000


class TestMade:
    @pytest.fixture
    def model(self) -> inf.TorchInfluenceFunctionModel:
        return small.fitted()

    @pytest.mark.parametrize("output", ["matrix", {"name": "top_k", "k": 3}, "mean", "self_influence"], ids=str)
    def test_a_store_and_its_result_give_the_same_points(
        self, output: Any, model: inf.TorchInfluenceFunctionModel, tmp_path: Path
    ) -> None:
        test = None if output == "self_influence" else [small.points(5, 7)]
        scored = attribute(model, test, small.batches(), output=output, store=tmp_path / "store")
        stored = report(tmp_path / "store", train=[f"text {i}" for i in range(7)])
        direct = report(scored, train=[f"text {i}" for i in range(7)], model=model)
        assert content(stored.html) == content(direct.html)
        text = said(stored.html)
        for line in ("Solver DirectSolver(", "Curvature GaussNewton(", "λ 0.1, in units of the curvature"):
            assert line in text
            assert line in said(direct.html)
        assert "What came of the solves" in text
        assert f"torch {torch.__version__}" in text
        cells = [block.cells() for block in Stored.read(tmp_path / "store").solves]
        assert cells == [block.summary() for block in model.report.blocks]
        assert all(cell in text for row in cells for cell in row)

    def test_a_mean_and_self_influences_are_rankings(self, model: inf.TorchInfluenceFunctionModel) -> None:
        scored = attribute(model, None, small.batches(), output="self_influence")
        page = report(scored)
        data = content(page.html)
        own = scored.columns["score"]
        order = np.argsort(-own).tolist()
        assert [int(data["train"][entry[0]]["id"]) for entry in data["ranks"][0]["entries"]] == order
        assert "cases" not in [area.get("id") for area in Elements(page.html).of("div")]

    def test_top_k_shows_what_the_matrix_shows(self, model: inf.TorchInfluenceFunctionModel) -> None:
        test = [small.points(5, 7)]
        whole = content(report(attribute(model, test, small.batches()), count=2).html)
        kept = attribute(model, test, small.batches(), output={"name": "top_k", "k": 2})
        page = report(kept, count=2)
        for one, other in zip(whole["tests"], content(page.html)["tests"], strict=True):
            for side in ("up", "down"):
                shown = [[entry[1:] for entry in case[side]] for case in (one, other)]
                assert shown[0] == shown[1]
        assert "The extreme scores that were kept" in said(page.html)

    def test_normalized_scores_say_so(self, model: inf.TorchInfluenceFunctionModel) -> None:
        output = {"name": "matrix", "normalize": "l_relatif"}
        text = said(report(attribute(model, [small.points(2)], small.batches(), output=output)).html)
        assert "scores are divided by a size of each point's own (l_relatif)" in text
        assert "+score/7" not in text

    def test_failures_come_first(self) -> None:
        model = small.fitted(solver={"name": "cg", "maxiter": 1, "rtol": 1e-12}, on_failure="ignore")
        scored = attribute(model, [small.points(2)], small.batches())
        text = said(report(scored, model=model).html)
        assert "Not everything was solved to what the solver promises: 2 of 2" in text

    def test_solves_of_several_runs_are_added(self) -> None:
        one = inf.BlockTotals("full", 0.1, "CgSolver", 3, 1, 7, 1e-3, (0.1, 2.0), 0.5)
        other = inf.BlockTotals("full", 0.1, "CgSolver", 2, 0, 9, None, (0.05, 1.0), 0.25)
        both = inf.BlockTotals("full", 0.1, "CgSolver", 5, 1, 9, 1e-3, (0.05, 2.0), 0.75)
        assert one + other == both
        assert SolveLog().report().blocks == ()


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: report(SCORES, train=["a"] * 4), "scores are of 5 training points, but 4 were given"),
            (lambda: report(SCORES, test=torch.rand(3, 2, 2)), "scores are of 2 test points, but 3 were given"),
            (lambda: report(SCORES, train=Points(labels=[1])), "5 training points, but there are 1 labels"),
            (lambda: report(SCORES, train=Points(marks=[None])), "5 training points, but there are 1 marks"),
            (lambda: report(SCORES, train="abcde"), "Expected a sequence of training points"),
            (lambda: report(SCORES, train=[object()] * 5), "hold a object, which is no picture"),
            (lambda: report(SCORES, train=torch.rand(5, 2, 2, 2, 2)), r"shape \(2, 2, 2, 2\), which is no"),
            (lambda: report(SCORES, train=Points(["a"] * 5, kind="picture")), "cannot be shown as pictures"),
            (lambda: report(SCORES, train=Points([[1]] * 5, kind="tokens")), "pass decode="),
            (lambda: Points(["a"], kind="pictures"), "Did you mean 'picture'"),  # type: ignore[arg-type]
            (lambda: report(SCORES, train=Points(torch.rand(5, 2), columns=["a"])), "2 columns, and 1 names"),
            (lambda: report(SCORES, train=[(torch.rand(4, 2), torch.zeros(4))]), "the loader yields 4"),
            (
                lambda: report(SCORES, train=[(torch.rand(5, 2), torch.zeros(5), list("abcde"))]),
                "differs from position 0 on",
            ),
            (lambda: report(SCORES[0]), r"expected|Expected scores of shape \(n_test, n_train\), got \(5,\)"),
            (lambda: report("nowhere"), "nowhere does not exist"),
            (lambda: report(3), "got int"),
            (lambda: report(SCORES, test_ids=[1]), "test_ids: expected 2 identifiers"),
            (lambda: report(SCORES, count=0), "count must be a positive integer"),
            (lambda: report(SCORES, self_influence=torch.ones(4)), "one number for each of 5 training points"),
            (lambda: report(SCORES, self_influence="nowhere"), "nowhere does not exist"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_what_does_not_fit(self, make: Callable[[], Any], message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            make()

    def test_stores(self, tmp_path: Path) -> None:
        model = small.fitted()
        attribute(model, [small.points(2)], small.batches(), store=tmp_path / "whole")
        attribute(model, None, small.batches(), output="factors", store=tmp_path / "factors")
        with pytest.raises(inf.InvalidInputError, match="factors, and no scores"):
            report(tmp_path / "factors")
        with pytest.raises(inf.InvalidInputError, match="leave model out"):
            report(tmp_path / "whole", model=model)
        with pytest.raises(inf.InvalidInputError, match="leave test_ids and train_ids out"):
            report(tmp_path / "whole", test_ids=[0, 1])
        with pytest.raises(inf.InvalidInputError, match="expected that output, got 'matrix'"):
            report(tmp_path / "whole", self_influence=tmp_path / "whole")
        other = attribute(model, None, [small.points(4)], output="self_influence")
        with pytest.raises(inf.InvalidInputError, match="of 4 training points, which are not the 7"):
            report(tmp_path / "whole", self_influence=other)
        with pytest.raises(inf.InvalidInputError, match="leave test out"):
            report(other, test=["a"])
        (tmp_path / "whole" / "ids.npz").unlink()
        with pytest.raises(inf.InvalidInputError, match="are not finished"):
            report(tmp_path / "whole")

    @pytest.mark.parametrize("module", ["jinja2", "PIL.Image"])
    def test_without_the_extra_the_remedy_is_named(self, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(inf.InfluenceError, match=r"pip install 'influence-framework\[report\]'"):
            report(SCORES)

    def test_a_page_is_written_at_once_or_not_at_all(self, tmp_path: Path) -> None:
        page = report(SCORES)
        written = page.save(tmp_path / "page.html")
        assert written.read_text(encoding="utf-8") == page.html
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        with pytest.raises(inf.InvalidInputError, match="Cannot write"):
            page.save(tmp_path / "none" / "page.html")
        with pytest.raises(inf.InvalidInputError, match="Cannot write"):
            page.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
