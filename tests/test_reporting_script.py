"""What the script of a page puts into it, run by a JavaScript engine on a small document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from py_mini_racer import MiniRacer

from influence_framework.attribution import Stored
from influence_framework.reporting import Page, Points, report
from tests.pages import EMPTY, Elements
from tests.test_reporting import HOSTILE, SCORES, TestTokens, TestTokensOfTestPoints

DOCUMENT = Path(__file__).with_name("document.js").read_text()


class Tree(HTMLParser):
    """The page as nested lists of tag, attributes and children."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root: list[Any] = ["document", {}, []]
        self.open = [self.root]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element: list[Any] = [tag, {name: value or "" for name, value in attributes}, []]
        self.open[-1][2].append(element)
        if tag not in EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open[-1][2].append([tag, {name: value or "" for name, value in attributes}, []])

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data)


class Browser:
    """A page whose script has run."""

    def __init__(self, page: Page) -> None:
        self.engine = MiniRacer()
        self.engine.eval(DOCUMENT)
        self.engine.eval(f"open({json.dumps(Tree(page.html).root)})")
        self.engine.eval(Elements(page.html).scripts[1])

    def do(self, call: str) -> Browser:
        self.engine.eval(call)
        return self

    def all(self, name: str) -> list[dict[str, Any]]:
        """Every element with that tag, or with that class where it begins with a dot."""
        tree = json.loads(self.engine.eval("plain()"))
        return [element for element in walk(tree) if has(element, name)]


def has(element: dict[str, Any], name: str) -> bool:
    if name.startswith("."):
        return name[1:] in element["attributes"].get("class", "").split()
    return bool(element["tag"] == name)


def walk(element: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield element
    for child in element["children"]:
        if isinstance(child, dict):
            yield from walk(child)


def inside(element: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [one for one in walk(element) if has(one, name)]


def text(element: dict[str, Any]) -> str:
    return "".join(child if isinstance(child, str) else text(child) for child in element["children"])


def texts(elements: list[dict[str, Any]]) -> list[str]:
    return [text(element) for element in elements]


@pytest.fixture(scope="module")
def many() -> Page:
    scores = torch.randn(1000, 40, generator=torch.Generator().manual_seed(0))
    labels = [f"class {i % 10}" for i in range(1000)]
    return report(scores, test=Points(torch.rand(1000, 4, 4), labels=labels), train=torch.rand(40, 4, 4))


class TestTestPoints:
    def test_ten_at_a_time(self, many: Page) -> None:
        browser = Browser(many)
        assert len(browser.all(".case")) == 10
        # Each card holds its own picture and twelve tiles, however many test points there are.
        cards = sum(len(list(walk(card))) for card in browser.all(".case"))
        assert cards <= 10 * (12 * 7 + 25)
        assert text(browser.all(".pager")[0]["children"][1]) == "1–10 of 1000"
        assert [button["disabled"] for button in browser.all("button")[:2]] == [True, False]

    def test_turning_pages(self, many: Page) -> None:
        browser = Browser(many).do("turn(0, 2)").do("turn(1, 2)")
        assert text(browser.all(".pager")[1]["children"][1]) == "21–30 of 1000"
        assert text(browser.all(".case")[0]).startswith("class 0Test point 20")
        browser.do("turn(0, 0)")
        assert text(browser.all(".case")[0]).startswith("class 0Test point 10")

    def test_finding(self, many: Page) -> None:
        browser = Browser(many).do("turn(0, 2)").do("type('CLASS 7 ')")
        assert text(browser.all(".pager")[0]["children"][1]) == "1–10 of 100"
        assert all(text(case).startswith("class 7") for case in browser.all(".case"))
        browser.do("type('nothing like it')")
        assert browser.all(".case") == []
        assert text(browser.all(".pager")[0]["children"][1]) == "No test point matches."
        assert not browser.all(".pager")[0]["hidden"]

    def test_orders(self) -> None:
        browser = Browser(report(torch.tensor([[1.0, -1.0], [3.0, -2.0], [2.0, -3.0]])))
        for order, expected in (("given", "012"), ("helpful", "120"), ("harmful", "210")):
            browser.do(f"choose('{order}')")
            assert [text(case)[:12] for case in browser.all(".case")] == [f"Test point {i}" for i in expected]
        assert [pager["hidden"] for pager in browser.all(".pager")] == [True, True]

    def test_sides(self) -> None:
        (case, _) = Browser(report(SCORES, count=2)).all(".case")
        helpful, harmful = inside(case, ".helpful-side")[0], inside(case, ".harmful-side")[0]
        assert texts(inside(helpful, ".score")) == ["+3.00", "+2.00"]
        assert texts(inside(harmful, ".id")) == ["#4", "#1"]
        assert "Most helpful lowered the loss" in text(helpful)
        assert "Most harmful raised the loss" in text(harmful)

    def test_a_side_without_points_says_so(self) -> None:
        (case,) = Browser(report(torch.ones(1, 3))).all(".case")
        assert text(inside(case, ".harmful-side")[0]).endswith("none")


class TestKinds:
    def test_pictures_are_described_and_loaded_when_seen(self) -> None:
        points = Points(torch.rand(5, 4, 4), labels="abcde", marks=[None] * 4 + ["odd"])
        images = Browser(report(SCORES, train=points, test=torch.rand(2, 4, 4))).all("img")
        assert all(image["src"].startswith("data:image/webp;base64,") for image in images)
        assert {image["loading"] for image in images} == {"lazy"}
        alts = [image["alt"] for image in images]
        assert {"Test point 0", "Training point 4: e, odd", "Training point 0: a"} <= set(alts)

    def test_rows_stand_in_one_table_below_the_test_point(self) -> None:
        rows = [{"age": i, "name": f"n{i}"} for i in range(5)]
        (table, _) = Browser(report(SCORES, test=rows[:2], train=rows, count=1)).all(".case")
        assert texts(inside(table, "th")[:4]) == ["", "score", "age", "name"]
        lines = [texts(inside(line, "td")) for line in inside(table, "tr")]
        assert lines == [[], ["", "0", "n0"], [], ["+3.00", "0", "n0"], [], ["−4.00", "4", "n4"]]

    def test_rows_with_other_columns_stand_by_themselves(self) -> None:
        page = report(SCORES, test=[{"q": 7}] * 2, train=[{"age": 1}] * 5)
        assert "q 7" in text(Browser(page).all(".case")[0])

    def test_long_texts_are_cut_until_asked_for(self) -> None:
        browser = Browser(report(SCORES, train=["long " * 200] + ["short"] * 4))
        assert len(browser.all(".cut")) == len(browser.all(".more")) > 0
        before = len(browser.all(".cut"))
        browser.do("press('more', 0)")
        assert len(browser.all(".cut")) == before - 1
        assert text(browser.all(".more")[0]) == "Show less"

    def test_tokens_take_the_colour_of_what_they_add(self) -> None:
        page = report(SCORES, train=TestTokens.WORDS, token_scores=TestTokens.TOKENS)
        (case, _) = Browser(page).all(".case")
        first = inside(case, ".said")[0]
        assert text(first) == "a b c"
        found = [
            (text(t), t["attributes"]["class"], t["properties"]["--level"]) for t in inside(first, ".token")
        ]
        assert found == [("a ", "token up", "9"), ("b ", "token down", "9"), ("c", "token up", "1")]
        assert inside(first, ".token")[1]["title"] == "harms, about 100 % of the largest here"

    @pytest.mark.parametrize("train", [TestTokens.WORDS, torch.rand(5, 4, 4), [{"age": 1}] * 5, None])
    def test_tokens_of_the_test_point_take_the_colour_of_the_training_point_picked(self, train: Any) -> None:
        questions = TestTokensOfTestPoints
        page = report(SCORES, test=questions.WORDS, train=train, test_token_scores=questions.TOKENS)
        browser = Browser(page)

        def coloured() -> list[tuple[str, str, str]]:
            question = inside(browser.all(".case")[0], ".said")[0]
            assert text(question) == "who is it"
            return [
                (text(t), t["attributes"]["class"], t["properties"]["--level"])
                for t in inside(question, ".token")
            ]

        def pressed() -> list[str]:
            case = browser.all(".case")[0]
            return [pick["attributes"]["aria-pressed"] for pick in inside(case, ".pick")]

        # The first is that of the most helpful point, number 0; the third that of the most harmful, number 4.
        assert coloured() == [("who ", "token up", "9"), ("it", "token down", "9")]
        assert pressed() == ["true", "false", "false", "false"]
        browser.do("press('pick', 2)")
        assert coloured() == [("who ", "token down", "9")]
        assert pressed() == ["false", "false", "true", "false"]

    def test_rankings(self) -> None:
        own = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
        browser = Browser(report(SCORES, self_influence=own))
        ranks = [element for element in browser.all("div") if "data-rank" in element["attributes"]]
        assert [text(rank)[1:13] for rank in ranks] == ["Most helpful", "Most harmful", "Largest self"]
        assert texts(inside(ranks[2], ".id")) == ["#1", "#3", "#4", "#2", "#0"]

    def test_without_test_points_there_are_rankings_alone(self) -> None:
        manifest = {"output": {"name": "mean"}}
        columns = {"score": np.array([1.0, -3.0, 2.0])}
        browser = Browser(report(Stored(manifest, np.arange(4), np.arange(3), None, columns)))
        assert browser.all(".case") == browser.all("input") == []
        assert texts(browser.all(".id")) == ["#2", "#0", "#1"]


def test_hostile_words_become_text_and_nothing_else() -> None:
    marked = {"labels": [HOSTILE] * 5, "marks": [HOSTILE] * 5}
    for data in ([HOSTILE] * 5, [{HOSTILE: HOSTILE}] * 5, [[HOSTILE]] * 5):
        page = report(SCORES, test=[HOSTILE] * 2, train=Points(data, **marked), train_ids=[HOSTILE] * 5)
        browser = Browser(page)
        assert browser.all("img") == []
        assert len(browser.all("script")) == 2
        cards = browser.all(".case")
        assert all(text(card).count(HOSTILE) >= 6 for card in cards)
