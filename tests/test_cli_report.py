"""``influence report``: the page of a store, with its data from the config or from import paths."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from influence_framework.attribution import Stored
from influence_framework.cli.main import main
from tests.pages import check_self_contained, content, said

PROJECT = """
import torch
from torch import nn
from influence_framework.reporting import Points

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(30, 2, 3, generator=generator), torch.randint(0, 3, (30,), generator=generator)

def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double().eval()

def train():
    return [(x[i : i + 10].double(), y[i : i + 10], [f"p{j}" for j in range(i, i + 10)]) for i in (0, 10, 20)]

def other():
    return [(x.double() + 1, y, [f"p{j}" for j in range(30)])]

test = [(x[:4].double() + 1, y[:4])]
texts = [f"text of point {i}" for i in range(30)]
few = texts[:29]

def labelled():
    return Points(texts, labels=y)

ids = torch.arange(30)[:, None]

def decode(token):
    return f"word{token} "
"""

CONFIG = """
model = "{name}:net"
loss = "torch.nn.functional:cross_entropy"
train = "{name}:train"
test = "{name}:test"
store = "scores"
output = "matrix"
hessian_regularization = 1e-2
solver = "direct"
"""

Call = Callable[..., int]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a module that no other test has imported."""
    unique = "reported_" + re.sub(r"\W", "_", request.node.name)
    yield unique
    sys.modules.pop(unique, None)


@pytest.fixture
def folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """A project with a finished store."""
    (tmp_path / f"{name}.py").write_text(PROJECT)
    (tmp_path / "config.toml").write_text(CONFIG.format(name=name))
    assert main(["run", str(tmp_path / "config.toml"), "--no-progress"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command in the folder."""
    monkeypatch.chdir(folder)
    return lambda *arguments: main(["report", *arguments])


def test_identifiers_and_scores_alone(call: Call, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("scores", "-k", "2", "--title", "What taught it?") == 0
    path = folder / "influence-report.html"
    assert re.fullmatch(rf"Wrote {re.escape(str(path))} \(\d+ kB\)\.\n", capsys.readouterr().out)
    html = path.read_text(encoding="utf-8")
    check_self_contained(html)
    data = content(html)
    scores = np.asarray(Stored.read(folder / "scores").matrix[:])
    for row, test in zip(scores, data["tests"], strict=True):
        found = [data["train"][place]["id"] for place, *_ in test["up"]]
        assert found == [f"p{i}" for i in np.argsort(-row)[:2]]
    assert "What taught it?" in said(html)
    assert "DirectSolver" in said(html)
    assert data["kinds"] == {"test": "none", "train": "none"}


def test_the_config_says_what_to_show(call: Call, folder: Path) -> None:
    assert call("scores", "--config", "config.toml", "--output", "page.html") == 0
    data = content((folder / "page.html").read_text(encoding="utf-8"))
    assert data["kinds"] == {"test": "picture", "train": "picture"}
    assert {point["label"] for point in data["train"]} <= {"0", "1", "2"}


def test_import_paths_say_what_to_show(call: Call, folder: Path, name: str) -> None:
    assert call("scores", "--config", "config.toml", "--train", f"{name}:labelled") == 0
    data = content((folder / "influence-report.html").read_text(encoding="utf-8"))
    assert data["kinds"] == {"test": "picture", "train": "text"}
    point = data["train"][0]
    assert point["item"] == f"text of point {point['id'].removeprefix('p')}"
    assert point["label"] in {"0", "1", "2"}


def test_tokens_are_decoded(call: Call, folder: Path, name: str) -> None:
    assert call("scores", "--train", f"{name}:ids", "--decode", f"{name}:decode") == 0
    point = content((folder / "influence-report.html").read_text(encoding="utf-8"))["train"][0]
    assert point["item"] == [f"word{point['id'].removeprefix('p')} "]


def test_a_store_of_self_influences_is_a_ranking(
    call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (folder / "config.toml").read_text().replace('"matrix"', '"self_influence"')
    config = re.sub("(?m)^test = .*$", "", config).replace('"scores"', '"own"')
    (folder / "own.toml").write_text(config)
    assert main(["run", str(folder / "own.toml"), "--no-progress"]) == 0
    assert call("scores", "--self-influence", "own") == 0
    data = content((folder / "influence-report.html").read_text(encoding="utf-8"))
    own = Stored.read(folder / "own").columns["score"]
    first = [data["train"][entry[0]]["id"] for entry in data["ranks"][-1]["entries"]]
    assert first == [f"p{i}" for i in np.argsort(-own)[:24]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], ". is no store of scores"),
        (["scores", "--train", "{name}:few"], "of 30 training points, but 29 were given"),
        (["scores", "--train", "{name}:text"], "--train: '{name}' has no 'text'. Did you mean 'texts'?"),
        (["scores", "--test", "texts"], "--test: 'texts' is no import path"),
        (
            ["scores", "--config", "foreign.toml"],
            "foreign.toml, line 4: train: yields other points than the 30",
        ),
        (["scores", "--config", "none.toml"], "Cannot read none.toml"),
        (["scores", "--output", "none/page.html"], "none does not exist"),
        (["scores", "--self-influence", "scores"], "expected that output, got 'matrix'"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    call: Call,
    folder: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = (folder / "config.toml").read_text()
    (folder / "foreign.toml").write_text(config.replace(f"{name}:train", f"{name}:other"))
    assert call(*(argument.format(name=name) for argument in arguments)) == 2
    errors = capsys.readouterr().err
    assert message.format(name=name) in errors
    assert errors.startswith("influence: ")
    assert errors.count("\n") == 1
    assert not list(folder.glob("*.html*"))


def test_an_unfinished_store_is_refused(call: Call, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "scores" / "ids.npz").unlink()
    assert call("scores") == 2
    assert "are not finished" in capsys.readouterr().err


def test_a_solves_file_that_is_damaged_is_said_to_be(
    call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "scores" / "solves.json").write_text('[{"blocks": [{"block": 1}], "failures": null}]')
    assert call("scores") == 2
    assert "is damaged" in capsys.readouterr().err
