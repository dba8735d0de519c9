"""``influence run`` and ``influence top``: what they write and print, and what they refuse before any work."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from influence_framework.attribution import Stored, attribute
from influence_framework.cli.config import Config, lines_of
from influence_framework.cli.imports import load, modules_beside
from influence_framework.cli.main import main
from influence_framework.compose import compose

PROJECT = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)
called = []

def net():
    called.append("net")
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()

def needs(width):
    raise AssertionError

def fails():
    raise RuntimeError("no such file: weights.pt")

class Loader:
    delay = 0.0
    def __init__(self, count=60):
        self.count = count
    def __iter__(self):
        for start in range(0, self.count, 10):
            part = slice(start, start + 10)
            time.sleep(self.delay)
            yield x[part].double(), y[part], [f"p{i}" for i in range(start, start + len(x[part]))]

class Slow(Loader):
    delay = 0.02

def pairs():
    return [batch[:2] for batch in Loader()]

train = Loader()
test = [(x[:4].double() + 1, y[:4])]

def shuffled():
    return DataLoader(TensorDataset(x.double(), y), batch_size=10, shuffle=True)
"""

CONFIG = """
model = "{name}:net"
loss = "torch.nn.functional:cross_entropy"
train = "{name}:pairs"
test = "{name}:test"
store = "scores"
output = "matrix"
hessian_regularization = 1e-2

[solver]
name = "direct"
"""


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a module that no other test has imported."""
    unique = "project_" + re.sub(r"\W", "_", request.node.name)
    yield unique
    sys.modules.pop(unique, None)


@pytest.fixture
def config(tmp_path: Path, name: str) -> Callable[..., Path]:
    """Writes a project and its config, with lines of it replaced."""

    def write(**changed: str | None) -> Path:
        (tmp_path / f"{name}.py").write_text(PROJECT)
        text = CONFIG.format(name=name)
        for key, line in changed.items():
            text, count = re.subn(rf"(?m)^{key} = .*$", (line or "").format(name=name), text)
            assert count == 1, key
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def scores(path: Path) -> np.ndarray:
    """What the config asks for, from the library itself."""
    config = Config.read(path)
    with modules_beside(path):
        things = load(config)
    model = compose(things["model"], things["loss"], **config.composition)
    model.fit([batch[:2] for batch in things["train"]])
    return attribute(model, things["test"], things["train"]).array


def test_scores_are_those_of_the_library(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert main(["run", str(path)]) == 0
    said = capsys.readouterr()
    store = path.parent / "scores"
    np.testing.assert_array_equal(zarr.open_array(store / "scores.zarr", mode="r")[:], scores(path))
    assert "Scores (matrix) of 60 training points with 4 test points." in said.out
    assert "solver   DirectSolver()" in said.out
    assert f"store    {store} (" in said.out
    assert "s for the fit" in said.out
    assert re.search(r"full +0\.01 +DirectSolver +4 +0 ", said.out), "the report of the solves"
    assert said.out.strip().endswith(f"Next: influence top {store} --test 0")
    assert "240/240" in said.err, "a bar counts scores"
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", said.err), "and tells the time left"


def test_factors_of_test_points_are_compressed(config: Callable[..., Path]) -> None:
    path = config(output="query_rank = 1")
    assert main(["run", str(path)]) == 0
    stored = Stored.read(path.parent / "scores")
    assert stored.query_error is not None
    assert (stored.query_error > 0).all()
    assert not np.allclose(stored.matrix[:], scores(path), rtol=1e-3)


def test_a_plan_is_printed_before_the_fit_and_before_the_scores(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(name='name = "ekfac"\npartitions = 2')
    assert main(["run", str(path), "--no-progress"]) == 0
    said = capsys.readouterr().err.splitlines()
    starts = [line for line in said if line.startswith(("Fit", "Scores"))]
    assert starts == [
        "Fitting EkfacSolver to the training data …",
        "Fit of EkfacSolver to 60 samples: 4 passes over the training data.",
        "Scores of 60 training points with 4 test points, 4 of these at a time: 1 pass over the training data.",
    ]
    assert len([line for line in said if re.match(r"  (time     about|memory|disk) ", line)]) == 6


def test_without_progress_nothing_but_the_summary_is_shown(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(config()), "--no-progress"]) == 0
    assert capsys.readouterr().err == "Fitting DirectSolver to the training data …\n"


def test_a_store_that_exists_is_gone_on_with_only_where_asked_for(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert main(["run", str(path)]) == 0
    capsys.readouterr()
    assert main(["run", str(path)]) == 2
    assert re.search(r"line 6: store: .* holds scores already: .*--resume", capsys.readouterr().err)
    # With or without bars it is the same work.
    assert main(["run", str(path), "--resume", "--no-progress"]) == 0
    assert "Nothing was left to be solved." in capsys.readouterr().out


def test_a_folder_that_is_no_store_is_refused_first(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = config()
    (path.parent / "scores").mkdir()
    (path.parent / "scores" / "thesis.txt").write_text("all of it")
    assert main(["run", str(path), "--resume"]) == 2
    assert "exists and is no store of scores" in capsys.readouterr().err
    assert name not in sys.modules


def test_a_run_that_was_killed_goes_on_to_the_same_scores(config: Callable[..., Path]) -> None:
    path = config(train='train = "{name}:Slow"', output='output = "matrix"\nmemory_budget = 4000')
    command = [sys.executable, "-m", "influence_framework.cli.main", "run", str(path), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = path.parent / "scores" / "state.npz"
    while not state.exists():
        assert process.poll() is None, "it has to be killed before it ends"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with np.load(state) as saved:
        before = len(saved["done"])
    killed = zarr.open_array(path.parent / "scores" / "scores.zarr", mode="r")
    assert 0 < before < killed.nchunks
    assert main(["top", str(path.parent / "scores"), "--test", "0"]) == 2
    assert main(["run", str(path), "--resume", "--no-progress"]) == 0
    np.testing.assert_array_equal(
        zarr.open_array(path.parent / "scores" / "scores.zarr", mode="r")[:], scores(path)
    )


class TestTop:
    """The training points are named p0 to p59."""

    @pytest.fixture(params=["matrix", "top_k"])
    def store(self, request: pytest.FixtureRequest, config: Callable[..., Path]) -> Path:
        output = {"matrix": '"matrix"', "top_k": '{{name = "top_k", k = 3}}'}[request.param]
        path = config(train='train = "{name}:train"', output=f"output = {output}")
        assert main(["run", str(path), "--no-progress"]) == 0
        return path.parent / "scores"

    def test_tables_of_the_most_helpful_and_most_harmful_points(
        self, store: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        row = scores(store.parent / "config.toml")[2]
        capsys.readouterr()
        assert main(["top", str(store), "--test", "2", "-k", "3"]) == 0
        helpful, harmful = capsys.readouterr().out.split("Most harmful:")
        best, worst = np.argsort(-row)[:3], np.argsort(row)[:3]
        assert listed(helpful) == [(f"p{i}", str(i), f"{row[i]:+.4g}") for i in best]
        assert listed(harmful) == [(f"p{i}", str(i), f"{row[i]:+.4g}") for i in worst]

    def test_how_to_read_them(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["top", str(store), "--test", "2"]) == 0
        said = capsys.readouterr().out
        assert "the loss of test point 2 (DirectSolver, GaussNewton)" in said
        assert "Positive: the point helps, for up-weighting it lowers that loss" in said
        assert "removing a point from 60 changes the loss by about +score/60" in said

    def test_a_test_point_has_to_be_named_and_to_exist(
        self, store: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert main(["top", str(store)]) == 2
        assert "Which of 4 test points? Name one by --test: 0, 1, 2, 3." in capsys.readouterr().err
        assert main(["top", str(store), "--test", "7"]) == 2
        assert "There is no test point '7': their identifiers are 0, 1, 2, 3." in capsys.readouterr().err


def listed(text: str) -> list[tuple[str, str, str]]:
    """Identifier, position and score of each row."""
    return re.findall(r"(?m)^ +\d+ +(\S+) +(\d+) +(\S+)$", text)


@pytest.mark.parametrize("output", ["mean", "self_influence"])
def test_top_of_one_score_for_each_training_point(
    output: str, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    without = {"test": None} if output == "self_influence" else {}
    path = config(output=f'output = "{output}"', **without)
    assert main(["run", str(path), "--no-progress"]) == 0
    assert f"Next: influence top {path.parent / 'scores'}\n" in capsys.readouterr().out
    assert main(["top", str(path.parent / "scores"), "-k", "2"]) == 0
    kept = Stored.read(path.parent / "scores").columns["score"]
    helpful, harmful = capsys.readouterr().out.split("Most harmful:")
    assert [int(i) for i, _, _ in listed(helpful)] == np.argsort(-kept)[:2].tolist()
    assert [int(i) for i, _, _ in listed(harmful)] == [i for i in np.argsort(kept)[:2] if kept[i] < 0]
    assert main(["top", str(path.parent / "scores"), "--test", "0"]) == 2
    assert "leave --test out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no store of scores"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text("{}")), "are not finished"),
    ],
)
def test_top_of_what_is_no_store(
    make: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "s")
    assert main(["top", str(tmp_path / "s")]) == 2
    assert said in capsys.readouterr().err


BAD: dict[str, tuple[dict[str, str | None], str]] = {
    "an unknown key": (
        {"hessian_regularization": "hessian_regularisation = 1"},
        "line 8: hessian_regularisation: unknown key. Did you mean 'hessian_regularization'?",
    ),
    "a missing key": ({"store": ""}, "config.toml: store: missing; expected a folder"),
    "a wrong type": (
        {"model": "model = 3"},
        "line 2: model: expected an import path 'module:attribute', got 3.",
    ),
    "a truth value for a number": (
        {"hessian_regularization": "hessian_regularization = true"},
        "line 8: hessian_regularization: expected a number, {fraction = 0.1}",
    ),
    "a negative λ": (
        {"hessian_regularization": "hessian_regularization = -1.0"},
        "line 8: hessian_regularization: The regularisation must be finite and not negative",
    ),
    "an unknown solver": (
        {"name": 'name = "dirct"'},
        "line 11: solver.name: Unknown solver 'dirct'. Did you mean",
    ),
    "an unknown option": (
        {"name": 'name = "cg"\nrtool = 1e-3'},
        "line 12: solver.rtool: 'cg' has no option 'rtool'. Did you mean 'rtol'?",
    ),
    "an option of an option": (
        {"name": 'name = "cg"\n[solver.preconditioner]\nname = "nystroem"\nrnak = 3'},
        "line 14: solver.preconditioner.rnak: 'nystroem' has no option 'rnak'. Did you mean 'rank'?",
    ),
    "an option out of range": ({"name": 'name = "cg"\nrtol = -1.0'}, "line 12: solver.rtol: "),
    "an unknown output": (
        {"output": 'output = "matirx"'},
        "line 7: output: Unknown output 'matirx'; expected one of",
    ),
    "an unknown option of an output": (
        {"output": 'output = {{name = "top_k", kk = 3}}'},
        "line 7: output.kk: The output 'top_k' has no option 'kk'",
    ),
    "an unknown executor": (
        {"output": 'executor = "sequental"'},
        "line 7: executor: Unknown executor 'sequental'. Did you mean 'sequential'?",
    ),
    "an executor whose processes are not there": (
        {"output": 'executor = "torch_distributed"'},
        "line 7: executor: is for processes that torchrun starts: torchrun",
    ),
    "an executor without a cluster": (
        {"output": 'executor = "dask"'},
        "line 7: executor: There is no Dask client: make one first",
    ),
    "an address that is none": (
        {"output": 'executor = {{name = "dask", address = 3}}'},
        "line 7: executor.address: address must be a scheduler's",
    ),
    "processes that are neither divided nor not": (
        {"output": 'executor = {{name = "torch_distributed", divided = "yes"}}'},
        "line 7: executor.divided: divided must be true or false, got 'yes'.",
    ),
    "a threshold that is none": (
        {"output": 'source = {{name = "dask", least = 0}}'},
        "line 7: source.least: least must be a positive number of samples, got 0.",
    ),
    "a preconditioner that is none": (
        {"name": 'name = "cg"\npreconditioner = 3'},
        "line 12: solver.preconditioner: The preconditioner must be a solver instance",
    ),
    "unknown blocks": ({"output": 'blocks = "per_leyer"'}, "line 7: blocks: expected 'full'"),
    "blocks of other parameters": (
        {"output": 'blocks = {{a = ["0.weight", "0.bias", "2.weight", "2.bais"]}}'},
        "line 7: blocks: ",
    ),
    "λ of other blocks": (
        {"hessian_regularization": "hessian_regularization = {{ful = 0.1}}"},
        "line 8: hessian_regularization: hessian_regularization names the block 'ful'",
    ),
    "a policy": ({"output": 'on_failure = "warm"'}, "line 7: on_failure: on_failure must be one of"),
    "a budget": ({"output": "memory_budget = 0"}, "line 7: memory_budget: expected a positive number of bytes"),
    "no rank": (
        {"output": "query_rank = 0"},
        "line 7: query_rank: expected a positive whole number, got 0",
    ),
    "compression of test points that there are not": (
        {"test": None, "output": 'output = "self_influence"\nquery_rank = 2'},
        "line 8: query_rank: is of test points; the output 'self_influence' has none",
    ),
    "no test points": ({"test": None}, "config.toml: test: missing; the output 'matrix' is of pairs."),
    "test points too many": (
        {"output": 'output = "self_influence"'},
        "line 5: test: the output 'self_influence' is of training points alone",
    ),
    "no TOML": ({"model": "model = "}, "is not TOML: Invalid value (at line 2, column 9)"),
    "no import path": ({"model": 'model = "net"'}, "line 2: model: 'net' is no import path"),
    "no module": (
        {"model": 'model = "{name}s:net"'},
        "line 2: model: no module 'project_",
    ),
    "a module that is not installed in a package": (
        {"loss": 'loss = "torch.nn.losses:CrossEntropyLoss"'},
        "line 3: loss: no module 'torch.nn.losses' is found",
    ),
    "no attribute": (
        {"train": 'train = "{name}:trian"'},
        "line 4: train: 'project_",
    ),
    "a function with arguments": (
        {"model": 'model = "{name}:needs"'},
        "expected a torch.nn.Module, or a function that returns one, got an object of type function. It takes",
    ),
    "a function that fails": (
        {"model": 'model = "{name}:fails"'},
        "calling it failed: RuntimeError: no such file: weights.pt (",
    ),
    "no model": ({"model": 'model = "{name}:x"'}, "line 2: model: 'project_"),
    "no loss": ({"loss": 'loss = "{name}:x"'}, "line 3: loss: 'project_"),
    "a loader that shuffles": (
        {"train": 'train = "{name}:shuffled"'},
        ":shuffled': The loader shuffles, so that",
    ),
    "no data": ({"train": 'train = "{name}:x"'}, "Data is a DataLoader or any re-iterable"),
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_before_any_work(
    case: str, config: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, said = BAD[case]
    path = config(**changed)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["run", str(path)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert "Fitting" not in shown.err
    assert not (path.parent / "scores").exists()


def test_all_that_is_wrong_is_said_at_once(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = config(model="modle = 1", train="train = 2", output="preflight = 3")
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [re.search(r"config.toml(?:, line (\d+))?: (\w+)", line)[0] for line in said] == [  # type: ignore[index]
        "config.toml, line 2: modle",
        "config.toml, line 4: train",
        "config.toml, line 7: preflight",
        "config.toml: model",
    ]
    path = config(name='name = "cgg"', output='output = "al"')
    assert main(["run", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    path = config(model='model = "{name}:nett"', loss='loss = "tochr:x"')
    assert main(["run", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert sys.modules[name].called == [], "nothing is called before all is imported"


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.toml")]) == 2
    assert "Cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_line_of_every_value(ending: str) -> None:
    text = """# a comment
a = 1

b = [
  1,  # one
  {c = 2},
]
d.e = '''
f = 3
'''
[g]  # a table
h = {i = 4, j = {k = 5}}
[[l]]
m = 6

[[l]]
m = 7
"""
    assert lines_of(text.replace("\n", ending)) == {
        ("a",): 2,
        ("b",): 4,
        ("b", 0): 4,
        ("b", 1): 4,
        ("b", 1, "c"): 4,
        ("d",): 8,
        ("d", "e"): 8,
        ("g",): 11,
        ("g", "h"): 12,
        ("g", "h", "i"): 12,
        ("g", "h", "j"): 12,
        ("g", "h", "j", "k"): 12,
        ("l",): 13,
        ("l", 0): 13,
        ("l", 0, "m"): 14,
        ("l", 1): 16,
        ("l", 1, "m"): 17,
    }
