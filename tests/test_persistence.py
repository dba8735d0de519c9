"""Fitted models on disk: they come back as they were, or are refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import influence_framework as inf
from influence_framework.attribution import attribute
from influence_framework.persistence import files
from tests.faulty_solvers import Exact, Kept, KeptInverse

LOSS = nn.CrossEntropyLoss()
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (40,), generator=GENERATOR)
DATA = list(zip(X.split(17), Y.split(17), strict=True))
RELATIVE = inf.RelativeRegularization(0.1)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()


def fitted(solver: Any = "direct", **options: Any) -> inf.TorchInfluenceFunctionModel:
    settings = {"hessian_regularization": RELATIVE, "preflight": False} | options
    return inf.compose(network(), LOSS, solver=solver, **settings).fit(DATA)


SOLVERS: list[tuple[Any, dict[str, Any]]] = [
    ("direct", {}),
    ("direct", {"source": "hessian", "hessian_regularization": 0.01}),
    ("jacobi", {}),
    ("nystroem", {}),
    ({"name": "nystroem", "rank": "auto"}, {"hessian_regularization": 0.01}),
    ({"name": "arnoldi", "rank": 5}, {}),
    ("ekfac", {}),
    ({"name": "ekfac", "samples": "exact", "dtype": torch.float32}, {"source": "hessian"}),
    ("kfac", {}),
    ({"name": "lissa", "maxiter": 8}, {}),
    ({"name": "cg", "block": True, "x0": torch.ones(51, dtype=torch.float64)}, {}),
    *(({"name": "cg", "preconditioner": name}, {}) for name in ("jacobi", "nystroem", "ekfac", "kfac")),
    ("arnoldi", {"refine": "cg"}),
    ("ekfac", {"refine": {"name": "cg", "maxiter": 20}}),
    ("nystroem", {"refine": {"name": "cg", "preconditioner": "jacobi"}}),
]


@pytest.mark.filterwarnings("ignore:C . λI is not positive definite", "ignore:.*eigenpairs converged")
@pytest.mark.parametrize("blocks", ["full", "per_layer"])
@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=lambda case: str(case)[:60])
def test_every_solver_comes_back_to_the_last_bit(
    solver: Any, options: dict[str, Any], blocks: str, tmp_path: Path
) -> None:
    if blocks == "per_layer" and isinstance(solver, dict) and "x0" in solver:
        solver = {**solver, "x0": None}
    model = fitted(solver, blocks=blocks, on_failure="ignore", **options)
    model.save(tmp_path / "m")
    streams = any(getattr(inverse, "multiplies", False) for inverse in model.inverses.values())
    assert streams is (
        solver in ("cg", "jacobi", "lissa")
        or "refine" in options
        or str(solver).startswith("{'name': 'cg'")
        or str(solver).startswith("{'name': 'lissa'")
    )
    again = inf.load(tmp_path / "m", network(), LOSS, DATA if streams else None)
    assert repr(again) == repr(model)
    for name, part in model.influences_by_block(X[:5], Y[:5], X, Y).items():
        assert torch.equal(again.influences_by_block(X[:5], Y[:5], X, Y)[name], part)
    assert torch.equal(again.influence_factors(X[:5], Y[:5]), model.influence_factors(X[:5], Y[:5]))
    mixed = [m.influences(X[:2], Y[:2], X[:3], Y[:3], mode="perturbation") for m in (model, again)]
    assert torch.equal(*mixed)
    if "refine" not in options:
        moved = [m.with_regularization(0.3).influences(X[:5], Y[:5]) for m in (model, again)]
        assert torch.equal(*moved)
    again.save(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "m")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_else_comes_back_too(tmp_path: Path) -> None:
    model = fitted(
        "ekfac",
        blocks={"b": ["2.weight", "2.bias"], "a": ["0.weight", "0.bias"]},
        hessian_regularization={"a": 0.1, "b": RELATIVE},
        memory_budget=12_345_678,
        on_failure="raise",
        preflight=True,
    )
    model.save(tmp_path / "m")
    again = inf.load(tmp_path / "m", network(), LOSS)
    assert (again.memory_budget, again.on_failure, again.blocks) == (12_345_678, "raise", model.blocks)
    assert again.hessian_regularization == model.hessian_regularization
    assert str(again.preflight) == str(model.preflight)
    # A fraction of the mean eigenvalue is known without the data.
    other = {"a": RELATIVE, "b": inf.RelativeRegularization(0.5)}
    for name, block in again.with_regularization(other | {"a": 0.2}).fitted.blocks.items():
        expected = model.with_regularization(other | {"a": 0.2}).fitted.blocks[name]
        assert block.regularization == expected.regularization
    again.fit(DATA)
    assert torch.equal(again.influences(X[:3], Y[:3]), model.influences(X[:3], Y[:3]))


def test_a_loaded_model_scores_between_loaders_and_to_a_store_that_was_begun_before(tmp_path: Path) -> None:
    model = fitted("ekfac")
    first = attribute(model, DATA, DATA, store=tmp_path / "s").array[:]
    model.save(tmp_path / "m")
    again = attribute(inf.load(tmp_path / "m", network(), LOSS), DATA, DATA, store=tmp_path / "s")
    np.testing.assert_array_equal(again.array[:], first)


class TestWithoutData:
    def test_what_multiplies_in_every_solve_is_refused_at_once(self, tmp_path: Path) -> None:
        fitted("cg").save(tmp_path / "m")
        with pytest.raises(
            inf.InvalidInputError, match=r"CgSolver multiplies .* needs the training data again"
        ):
            inf.load(tmp_path / "m", network(), LOSS)

    def test_what_needs_a_product_now_and_then_says_so_then(self, tmp_path: Path) -> None:
        model = fitted("direct")
        model.save(tmp_path / "m")
        again = inf.load(tmp_path / "m", network(), LOSS)
        for work in (
            lambda: again.residuals(X[:2], Y[:2]),
            lambda: again.influences(X[:2], Y[:2], return_bounds=True),
        ):
            with pytest.raises(
                inf.InvalidInputError, match="loaded without its training data, and this needs it"
            ):
                work()
        whole = inf.load(tmp_path / "m", network(), LOSS, DATA)
        assert torch.equal(whole.residuals(X[:2], Y[:2]), model.residuals(X[:2], Y[:2]))


def damaged(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        change(folder)

    return apply


def tensors_of(folder: Path) -> Path:
    """The largest file, which is the block's."""
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def cut(folder: Path) -> None:
    path = tensors_of(folder)
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def digit(folder: Path) -> None:
    """Another λ, in JSON as good as before."""
    path = folder / "model.json"
    text = path.read_text()
    at = text.index('"regularization": ') + len('"regularization": 0.0')
    path.write_text(text[:at] + ("8" if text[at] != "8" else "7") + text[at + 1 :])


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A manifest written by somebody who knows how its checksum is made."""

    def apply(folder: Path) -> None:
        body = json.loads((folder / "model.json").read_text())
        body.pop("checksum")
        change(body)
        body["checksum"] = files._checksum(body)
        (folder / "model.json").write_text(json.dumps(body))

    return apply


def path_out(body: dict[str, Any]) -> None:
    body["parts"]["block0"]["file"] = "../../" + body["parts"]["block0"]["file"]


def absolute(body: dict[str, Any]) -> None:
    body["parts"]["block0"]["file"] = "/etc/passwd"


def by_path(body: dict[str, Any]) -> None:
    body["composition"]["solver"]["solver"]["name"] = "os.system"


def dtype_by_name(body: dict[str, Any]) -> None:
    body["composition"]["memory_budget"] = {"dtype": "__import__"}


def unknown_tag(body: dict[str, Any]) -> None:
    body["composition"]["memory_budget"] = {"eval": "1"}


def option(body: dict[str, Any]) -> None:
    body["composition"]["solver"]["solver"]["options"] = {"block": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "is damaged: it has .* bytes in place of"),
        (lambda folder: flip(tensors_of(folder), -3), "is damaged: its checksum does not hold"),
        (lambda folder: flip(tensors_of(folder), 20), "is damaged: its checksum does not hold"),
        (lambda folder: tensors_of(folder).unlink(), "is missing"),
        (digit, r"model.json is damaged: its checksum does not hold"),
        (lambda folder: (folder / "model.json").write_text("{"), "is damaged and cannot be read"),
        (lambda folder: (folder / "model.json").write_bytes(b"\x80\x04"), "is damaged and cannot be read"),
        (lambda folder: (folder / "model.json").write_text('{"layers": 3}'), "something else than a model"),
        (lambda folder: (folder / "model.json").write_text("[" * 100_000), "is damaged and cannot be read"),
        (lambda folder: (folder / "model.json").unlink(), "is no saved model: it has no model.json"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (rewritten(lambda body: body.update(version=2)), "has version 2 of the format.*upgrade"),
        (rewritten(path_out), "is none of a saved model"),
        (rewritten(absolute), "is none of a saved model"),
        (rewritten(by_path), r"Unknown solver 'os.system'"),
        (rewritten(option), "has no option 'block'"),
        (rewritten(dtype_by_name), "is not what this version writes"),
        (rewritten(unknown_tag), "is not what this version writes"),
        (rewritten(lambda body: body.pop("blocks")), "is not what this version writes"),
        (rewritten(lambda body: body["blocks"][0].update(values={})), "cannot make anything of what was saved"),
    ],
    # The names of functions made here differ from process to process.
    ids=[f"damage {number}" for number in range(20)],
)
def test_a_folder_that_is_not_whole_is_refused(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    fitted("direct").save(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(inf.errors.InfluenceError, match=message):
        inf.load(tmp_path / "m", network(), LOSS)


def test_pitfall_saved_without_pickle_and_loaded_without_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds JSON and safetensors; neither pickle nor a fit has a part in it."""
    model = fitted({"name": "cg", "preconditioner": "ekfac"})
    for module, name in (("pickle", "dumps"), ("pickle", "loads"), ("torch", "save"), ("torch", "load")):
        monkeypatch.setattr(sys.modules[module], name, forbidden)
    model.save(tmp_path / "m")
    monkeypatch.setattr(type(model.solver), "fit", forbidden)
    monkeypatch.setattr(type(model.solver.preconditioner), "fit", forbidden)
    again = inf.load(tmp_path / "m", network(), LOSS, DATA)
    assert torch.equal(again.influences(X[:3], Y[:3]), model.influences(X[:3], Y[:3]))
    for path in (tmp_path / "m").iterdir():
        assert path.suffix in (".json", ".safetensors")
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + length])
    for name in ("pickle", "torch.load", "importlib", "eval(", "exec("):
        for source in Path(files.__file__).parent.glob("*.py"):
            assert name not in source.read_text()


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be called")


def changed(change: str) -> tuple[nn.Module, Any, Any]:
    """Net, loss and data of which one is not that of the fit."""
    net, loss, data = network(), LOSS, DATA
    if change == "values":
        with torch.no_grad():
            net[0].weight[0, 0] += 1e-9
    elif change == "dtype":
        net = network(torch.float32)
    elif change == "trainable":
        net[0].bias.requires_grad_(False)
    elif change == "shape":
        net[2] = nn.Linear(6, 4).double()
    elif change == "names":
        net = nn.Sequential(net[0], net[1], nn.Identity(), net[2])
    elif change == "loss":
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    elif change == "objective":
        loss = nn.NLLLoss()
    elif change == "data":
        data = [(X.flip(1), Y)]
    elif change == "fewer":
        data = DATA[:-1]
    return net, loss, data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("values", r"'0.weight' of the model has other values"),
        ("dtype", r"'0.weight' of the model has dtype torch.float32 here and torch.float64"),
        ("trainable", r"'0.bias' of the model has trainable False here and True"),
        ("shape", r"'2.weight' of the model has shape \[4, 6\] here and \[3, 6\]"),
        ("names", r"other parameters and buffers: 2.bias, 2.weight, 3.bias, 3.weight"),
        ("loss", "The losses of two samples are"),
        ("objective", "The losses of two samples are"),
        ("data", "fitted to 40 samples, and the training data has as many, but other ones"),
        ("fewer", "fitted to 40 samples, and the training data has 34 here"),
    ],
)
def test_another_net_loss_or_data_is_refused(change: str, message: str, tmp_path: Path) -> None:
    fitted("direct").save(tmp_path / "m")
    net, loss, data = changed(change)
    with pytest.raises(inf.InvalidInputError, match=message):
        inf.load(tmp_path / "m", net, loss, data)


def test_data_in_another_order_and_other_batches_is_the_same(tmp_path: Path) -> None:
    model = fitted({"name": "cg", "rtol": 1e-10, "atol": 0.0})
    model.save(tmp_path / "m")
    again = inf.load(tmp_path / "m", network(), LOSS, [(X[20:], Y[20:]), (X[:20], Y[:20])])
    scores = [m.influences(X[:3], Y[:3]) for m in (model, again)]
    torch.testing.assert_close(*scores, rtol=1e-8, atol=1e-10)


class TestSomebodyElsesSolver:
    def registry(self, *solvers: tuple[str, type]) -> inf.Registry:
        @inf.hookimpl
        def register_solvers(register: Any) -> None:
            for name, cls in solvers:
                register(name, cls)

        return inf.Registry({"mine": SimpleNamespace(register_solvers=register_solvers)})

    def test_comes_back_by_its_name(self, tmp_path: Path) -> None:
        registry = self.registry(("mine", Mine))
        model = fitted("mine", registry=registry)
        model.save(tmp_path / "m", registry=registry)
        again = inf.load(tmp_path / "m", network(), LOSS, DATA, registry=registry)
        assert torch.equal(again.influences(X[:3], Y[:3]), model.influences(X[:3], Y[:3]))
        with pytest.raises(
            inf.UnknownMethodError, match=r"saved with the solver 'mine' of mine .* Unknown solver"
        ):
            inf.load(tmp_path / "m", network(), LOSS)

    def test_that_does_not_take_part_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        registry = self.registry(("exact", Exact))
        model = fitted("exact", registry=registry)
        message = "ExactInverse has no method 'state' and Exact has no method 'restore'"
        with pytest.raises(inf.MissingCapabilityError, match=message):
            model.save(tmp_path / "m", registry=registry)
        assert not (tmp_path / "m").exists()

    def test_without_a_name_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(inf.InvalidInputError, match="Mine has no name in the registry"):
            fitted(Mine()).save(tmp_path / "m")


@dataclass(frozen=True)
class Mine(Kept):
    """A solver of somebody else's, with an option that is no class."""

    inverse = KeptInverse  # type: ignore[assignment]

    def __init__(self, precision: int = 3) -> None:
        object.__setattr__(self, "precision", precision)


class TestWriting:
    def test_a_folder_with_something_else_in_it_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("all of it")
        with pytest.raises(inf.InvalidInputError, match=r"something else than a saved model \(thesis.txt\)"):
            fitted("direct").save(tmp_path)
        (tmp_path / "thesis.txt").rename(tmp_path / "model.json")
        with pytest.raises(inf.InvalidInputError, match="is damaged and cannot be read"):
            fitted("direct").save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model.json"]

    def test_another_model_takes_the_place_of_the_first(self, tmp_path: Path) -> None:
        fitted("direct").save(tmp_path)
        model = fitted("ekfac")
        model.save(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3  # the manifest, what it refers to, and the block
        again = inf.load(tmp_path, network(), LOSS)
        assert torch.equal(again.influences(X[:3], Y[:3]), model.influences(X[:3], Y[:3]))

    def test_a_net_that_changed_since_the_fit_is_not_saved(self, tmp_path: Path) -> None:
        model = fitted("direct")
        with torch.no_grad():
            model.model[0].weight[0, 0] += 1
        with pytest.raises(inf.InvalidInputError, match="has changed since the fit"):
            model.save(tmp_path / "m")

    def test_before_the_fit_there_is_nothing_to_save(self, tmp_path: Path) -> None:
        with pytest.raises(inf.NotFittedError):
            inf.compose(network(), LOSS, solver="direct").save(tmp_path / "m")

    def test_layout_in_memory_and_shared_memory_come_back(self, tmp_path: Path) -> None:
        base = torch.randn(3, 4, 5, dtype=torch.float32)
        named = {
            "rows": base,
            "turned": base.permute(2, 0, 1),
            "the same": base.permute(2, 0, 1),
            "part": base[:, :, 1:3],
            "none": torch.empty(0, 3),
            "number": torch.tensor(2.0),
            "repeated": torch.eye(2).expand(3, -1, -1),
        }
        files.write(tmp_path / "m", {}, [("part", named)])
        body = files.read(tmp_path / "m")
        found = files.tensors(tmp_path / "m", body["parts"]["part"], torch.device("cpu"))
        for name, tensor in named.items():
            assert torch.equal(found[name], tensor)
        assert found["turned"].stride() == named["turned"].stride()
        assert found["turned"] is found["the same"]

    def test_without_safetensors_the_remedy_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = fitted("direct")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'influence-framework\[save\]'"):
            model.save(tmp_path / "m")

    def test_a_save_that_is_killed_leaves_the_earlier_model_or_the_new_one(self, tmp_path: Path) -> None:
        """Killed before each call that opens, renames or removes a file, every time in a process of its own."""
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], env=environment, check=True, capture_output=True, text=True
        )
        kills = int(done.stdout)
        assert kills >= 12
        found = []
        for index in range(kills):
            model = inf.load(tmp_path / str(index), network(), LOSS)
            found.append(type(model.solver).__name__)
            model.save(tmp_path / str(index))  # what the killed one left behind is cleared away
            assert len(list((tmp_path / str(index)).iterdir())) == 3
        assert set(found) == {"DirectSolver", "EkfacSolver"}
        assert found == sorted(found)  # the earlier one until the manifest is replaced, the new one from there


KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from tests.test_persistence import fitted

first, second = fitted("direct"), fitted("ekfac")
folder = Path(sys.argv[1])

def watched(countdown):
    # The kill comes with the call number `countdown` to the operating system that changes something.
    def count(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
            countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

kills = 0
while True:
    path = folder / str(kills)
    first.save(path)
    child = os.fork()
    if not child:
        watched([kills + 1])
        second.save(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        shutil.rmtree(path)
        break
    kills += 1
print(kills)
"""
