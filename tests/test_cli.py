"""The command ``influence``: what it prints, what it writes, and what it says when something is wrong."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import influence_framework as inf
from influence_framework.cli import demo, page
from influence_framework.cli.main import main
from influence_framework.cli.report import report
from influence_framework.inverses import Inverse, make_solution

SMALL = demo.Settings(solver="direct", training_images=400, test_images=60)


@dataclass(frozen=True, eq=False)
class Times(Inverse):
    """A multiple of the identity; negative ones are remarked on."""

    base: inf.LinearOperator
    regularization: float
    factor: float

    def _solve(self, columns: torch.Tensor) -> inf.Solution:
        if self.factor < 0:
            warnings.warn("it is negative", inf.IndefiniteOperatorWarning, stacklevel=2)
        count = columns.shape[1]
        return make_solution(self.factor * columns, torch.zeros(count), [inf.StopReason.CONVERGED] * count)


class Negative:
    def fit(self, operator: inf.LinearOperator, regularization: float) -> Times:
        return Times(operator, regularization, -1.0)


class NotANumber:
    def fit(self, operator: inf.LinearOperator, regularization: float) -> Times:
        return Times(operator, regularization, float("nan"))


def plugin(**solvers: type[Any]) -> Any:
    @inf.hookimpl
    def register_solvers(register: Any) -> None:
        for name, solver in solvers.items():
            register(name, solver)

    return SimpleNamespace(register_solvers=register_solvers)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run(SMALL)


@pytest.fixture(scope="module")
def html(result: demo.Result) -> str:
    return page.render(result)


class TestDemo:
    def test_flipped_labels(self) -> None:
        data = demo.load(SMALL)
        assert int(data.flipped.sum()) == 40
        assert data.y.min() >= 0
        assert data.y.max() < demo.CLASSES
        assert len(data.y) == 400
        assert len(data.y_test) == 60
        again = demo.load(SMALL)
        assert torch.equal(data.y, again.y)
        assert not torch.equal(data.y, demo.load(replace(SMALL, seed=1)).y)

    def test_threads_are_left_alone(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        with pytest.raises(inf.UnknownMethodError):
            demo.run(replace(SMALL, solver="none"))
        assert torch.get_num_threads() == 2
        torch.set_num_threads(before)

    def test_global_random_state_is_left_alone(self) -> None:
        state = torch.get_rng_state()
        first = demo.train(demo.load(SMALL), replace(SMALL, epochs=1))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        second = demo.train(demo.load(SMALL), replace(SMALL, epochs=1))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_too_many_images(self) -> None:
        with pytest.raises(inf.InvalidInputError, match="1797 digits"):
            demo.load(replace(SMALL, training_images=1797))

    def test_finds_flipped_labels(self, result: demo.Result) -> None:
        """Far better than chance, which is 4 of 40 in a tenth of the ranking."""
        flipped = result.data.flipped
        for ranking in result.rankings:
            assert ranking.found(flipped, 0.1) >= 16, ranking.name
            assert ranking.found(flipped, 0.2) >= 20, ranking.name

    def test_rankings_are_recomputed(self, result: demo.Result) -> None:
        """Counts as a plain loop would have them, from scores by one dense solve in double precision."""
        data = result.data
        net = demo.train(data, SMALL).double()
        x, x_test = data.x.double(), data.x_test.double()
        model = inf.compose(
            net, nn.CrossEntropyLoss(), solver="direct", source="gauss_newton", hessian_regularization=0.02
        ).fit([(x, data.y)])
        own = model.influences(x, data.y).diagonal().tolist()
        mean = model.influences(x_test, data.y_test, x, data.y).mean(0)
        losses = [nn.functional.cross_entropy(net(x[i]), data.y[i]).item() for i in range(len(x))]
        torch.testing.assert_close(
            result.self_influence.double(), torch.tensor(own).double(), rtol=1e-2, atol=1e-2
        )
        suspicions = (own, (-mean).tolist(), losses)
        for ranking, suspicion in zip(result.rankings, suspicions, strict=True):
            first = sorted(range(len(x)), key=lambda i: -suspicion[i])[:80]
            assert ranking.found(data.flipped, 0.1) == sum(bool(data.flipped[i]) for i in first[:40])
            assert ranking.found(data.flipped, 0.2) == sum(bool(data.flipped[i]) for i in first)

    def test_loss_after_training_again(self, result: demo.Result) -> None:
        data, ranking = result.data, result.rankings[1]
        kept = [i for i in range(len(data.y)) if i not in ranking.order[:40].tolist()]
        rest = replace(data, x=data.x[kept], y=data.y[kept], truth=data.truth[kept])
        net = demo.train(rest, SMALL)
        expected = nn.functional.cross_entropy(net(data.x_test), data.y_test).item()
        assert ranking.loss_without == pytest.approx(expected)
        assert ranking.loss_without < result.test_loss

    def test_report(self, result: demo.Result) -> None:
        text = report(result)
        flipped = result.data.flipped
        for ranking in result.rankings:
            row = next(line for line in text.splitlines() if line.startswith(f"  {ranking.name}"))
            counts = [str(ranking.found(flipped, fraction)) for fraction in (0.1, 0.2)]
            assert row.removeprefix(f"  {ranking.name}").split() == [*counts, f"{ranking.loss_without:.3f}"]
        assert re.search(r"chance +4\.0 +8\.0 ", text)
        assert "400 training images, 40 with a flipped label" in text
        assert "λ = 0.02" in text

    @pytest.mark.parametrize(("source", "strength"), [("hessian", 0.2), ("empirical_fisher", 0.02)])
    def test_regularization_suits_the_source(self, source: str, strength: float) -> None:
        settings = replace(SMALL, source=source, training_images=200, epochs=10)
        result = demo.run(settings)
        assert result.composition["hessian_regularization"] == strength
        assert demo.run(replace(settings, regularization=0.5)).settings.strength == 0.5

    def test_cg_agrees_with_direct(self, result: demo.Result) -> None:
        iterative = demo.run(replace(SMALL, solver="cg"))
        assert iterative.warnings == ()
        torch.testing.assert_close(iterative.scores, result.scores, rtol=1e-2, atol=0.05)

    def test_what_the_solver_reports_is_shown_once(self) -> None:
        registry = inf.Registry({"one": plugin(negative=Negative)}, installed=False)
        result = demo.run(replace(SMALL, solver="negative"), registry=registry)
        assert result.warnings == ("it is negative",)
        html = page.render(result)
        assert "What the solver reported" in html
        assert html.count("it is negative") == 1

    def test_nan_is_no_ranking(self) -> None:
        registry = inf.Registry({"one": plugin(nan=NotANumber)}, installed=False)
        with pytest.raises(inf.InfluenceError, match="NaN"):
            demo.run(replace(SMALL, solver="nan"), registry=registry)


class Elements(HTMLParser):
    """Collects the attributes of every element, and the elements left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


class TestPage:
    def test_is_self_contained(self, html: str) -> None:
        assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<iframe", html)
        elements = Elements(html)
        assert elements.open == []
        for _, attributes in elements.found:
            for name in ("src", "href", "srcset", "data"):
                assert (attributes.get(name) or "data:").startswith("data:")

    def test_every_image_is_described(self, html: str) -> None:
        images = Elements(html).of("img")
        assert len(images) > page.SUSPICIOUS
        for image in images:
            assert re.fullmatch(r"(Test|Training) image \d+: a \d, .+", image["alt"] or "")
        assert all(picture["aria-label"] for picture in Elements(html).of("svg"))

    def test_flipped_labels_are_marked_in_words(self, result: demo.Result, html: str) -> None:
        flipped = sum("(flipped)" in (image["alt"] or "") for image in Elements(html).of("img"))
        assert flipped == html.count('class="tile flipped"') == len(re.findall(r"⚑</span> really <b>", html))
        first = result.rankings[0].order[: page.SUSPICIOUS]
        assert flipped >= int(result.data.flipped[first].sum()) > 0

    def test_counts(self, result: demo.Result, html: str) -> None:
        cells = re.findall(r'class="found" role="cell">([^<]+)<', html)
        expected = [
            text
            for ranking in result.rankings
            for text in (
                *(str(ranking.found(result.data.flipped, fraction)) for fraction in (0.1, 0.2)),
                f"{ranking.loss_without:.3f}",
            )
        ]
        assert cells[: len(expected)] == expected
        assert cells[len(expected) :] == ["4.0", "8.0", f"{result.chance.loss_without:.3f}"]

    def test_cases(self, result: demo.Result) -> None:
        """Misclassified ones come first; each shows the extremes of its row of scores."""
        cases = list(page._cases(result))
        right = result.net(result.data.x_test).argmax(1) == result.data.y_test
        assert len(cases) == page.CASES
        assert [case.right for case in cases] == sorted(case.right for case in cases)
        assert sum(not case.right for case in cases) == min(page.MISCLASSIFIED, int((~right).sum())) > 0
        for case in cases:
            (index,) = map(int, re.findall(r"^Test image (\d+):", case.alt))
            scores = result.scores[index]
            assert case.harmful[0].score == page.number(scores.min().item(), signed=True)
            assert case.helpful[0].score == page.number(scores.max().item(), signed=True)
            assert case.harmful[0].score.startswith("−")
            assert case.helpful[0].score.startswith("+")
            assert len(case.harmful) == len(case.helpful) == page.TILES

    def test_pieces_of_a_ranking_hold_all_flipped_labels(self, result: demo.Result) -> None:
        for ranking in result.rankings:
            bins = page._row(ranking, result.data.flipped).bins
            assert sum(share / 100 * 8 for share in bins) == pytest.approx(40)

    def test_image(self) -> None:
        pixels = torch.zeros(64)
        pixels[9] = 1.0
        image = Image.open(BytesIO(base64.b64decode(page.png(pixels).removeprefix("data:image/png;base64,"))))
        assert image.size == (8, 8)
        assert image.getpixel((1, 1)) == 0
        assert image.getpixel((0, 0)) == 255

    @pytest.mark.parametrize(
        ("value", "text"),
        [(-129.4, "−129"), (1683.2, "+1,683"), (46.0, "+46.0"), (-0.5, "−0.500"), (0.00012, "+1.2e−04")],
    )
    def test_number(self, value: float, text: str) -> None:
        assert page.number(value, signed=True) == text
        assert page.number(abs(value), signed=False) == text[1:]


class TestCommand:
    def test_demo(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        small = replace(SMALL, seed=3)

        def settings(solver: str, source: str, regularization: float | None, seed: int) -> demo.Settings:
            return replace(small, solver=solver, source=source, regularization=regularization, seed=seed)

        monkeypatch.setattr(demo, "Settings", settings)
        assert main(["demo", "--solver", "direct", "--seed", "3", "--output", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        path = tmp_path / "influence-demo.html"
        assert f"Wrote {path} (" in printed.out
        result = demo.run(small)
        assert printed.out.startswith(report(result))
        assert path.read_text(encoding="utf-8") == page.render(result)
        assert printed.err == ""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--solver", "direkt"], "Unknown solver 'direkt'. Did you mean 'direct'?"),
            (["--source", "hessien"], "Unknown curvature source 'hessien'. Did you mean 'hessian'?"),
            (["--output", "/no/such/folder/page.html"], "the folder /no/such/folder does not exist"),
        ],
    )
    def test_wrong_arguments(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["demo", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("influence: ")
        assert message in printed.err
        assert printed.err.count("\n") == 1

    @pytest.mark.parametrize("module", ["sklearn.datasets", "jinja2", "PIL.Image"])
    def test_missing_extra(
        self, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        assert main(["demo"]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert "pip install 'influence-framework[demo]'" in printed.err
        assert main(["plugins"]) == 0

    @pytest.mark.parametrize(
        "arguments", [[], ["demo", "--seed", "-1"], ["demo", "--seed", "x"], ["new-plugin"], ["unknown"]]
    )
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "usage: influence" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["demo", "--help"], ["plugins", "--help"], ["new-plugin", "--help"], ["--version"]],
    )
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert "influence" in capsys.readouterr().out

    def test_reader_that_stops_reading(self) -> None:
        code = "import sys; from influence_framework.cli.main import main; sys.exit(main(['plugins', '-v']))"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        process.stdout.close()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors == b""

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def run(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "run", run)
        assert main(["demo"]) == 130
        assert capsys.readouterr().err == "influence: interrupted\n"

    def test_plugins_imports_nothing_of_the_extra(self) -> None:
        code = (
            # A plugin may bring the third of them, jinja2, itself.
            "import sys; from influence_framework.cli.main import main; main(['plugins']); "
            "sys.exit(bool({'sklearn', 'PIL', 'influence_framework.cli.demo'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
