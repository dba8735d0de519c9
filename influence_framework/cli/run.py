"""``influence run``: from a file to a store of scores."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from influence_framework.attribution import (
    Scored,
    SequentialExecutor,
    Stored,
    TorchDistributedExecutor,
    attribute,
)
from influence_framework.attribution.blocks import blocks, shuffles
from influence_framework.attribution.store import MANIFEST
from influence_framework.cli.config import Config
from influence_framework.cli.imports import load, modules_beside
from influence_framework.compose import compose
from influence_framework.errors import InvalidInputError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.parameters import Blocks, ParameterSpace
from influence_framework.planning import plan
from influence_framework.protocols import Fitting, Planning
from influence_framework.regularization import per_block


@dataclass(frozen=True)
class Outcome:
    """What a run has done.

    Attributes:
        config: What was asked for.
        model: Fitted.
        scored: The scores.
        fitting: Seconds that the fit took.
        scoring: Seconds that the scores took.
    """

    config: Config
    model: TorchInfluenceFunctionModel
    scored: Scored
    fitting: float
    scoring: float

    def __str__(self) -> str:
        output, model, store = self.scored.output, self.model, self.config.store
        tests = f" with {len(self.scored.test_ids)} test points" if output.pairs else ""
        strengths = {block.regularization for block in model.fitted.blocks.values()}
        low, high = min(strengths), max(strengths)
        between = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        lines = [
            f"Scores ({output.name}) of {len(self.scored.train_ids)} training points{tests}.",
            f"  solver   {_brief(model.solver)}",
            f"  source   {_brief(model.source)}",
            f"  blocks   {len(model.fitted.blocks)}, λ = {between}",
            f"  store    {store} ({_size(store)})",
            f"  time     {self.fitting:.1f} s for the fit, {self.scoring:.1f} s for the scores",
            "",
            str(model.report) if len(model.report) else "Nothing was left to be solved.",
            "",
            f"A positive score: up-weighting the training point lowers the {Stored.of(self.scored).quantity}.",
            f"Next: {self._next()}",
        ]
        return "\n".join(lines)

    def _next(self) -> str:
        test = ""
        if self.scored.output.name in ("matrix", "top_k"):
            test = f" --test {shlex.quote(str(self.scored.test_ids[0]))}"
        return f"influence top {shlex.quote(str(self.config.store))}{test}"


@dataclass(frozen=True)
class WithoutIdentifiers:
    """A loader of ``(x, y, identifiers)`` as one of ``(x, y)``, which is what a fit takes; or as it is.

    Attributes:
        loader: Of either.
    """

    loader: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch[:2] if isinstance(batch, tuple | list) and len(batch) == 3 else batch

    def __getattr__(self, name: str) -> Any:
        # A loader's sampler and generator tell its random state.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


def _brief(method: Any) -> str:
    """Name of the class, with the options that are not as they would be by themselves."""
    name = type(method).__name__
    if not dataclasses.is_dataclass(method):
        return name
    options = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if field.name != "progress" and getattr(method, field.name) != field.default
    }
    given = (
        f"{option}={_brief(value) if dataclasses.is_dataclass(value) else repr(value)}"
        for option, value in options.items()
    )
    return f"{name}({', '.join(given)})"


def _size(folder: Path) -> str:
    size = float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def run(path: Path, *, resume: bool = False, progress: bool = True) -> Outcome | None:
    """Do what the file says.

    Returns:
        What was done; ``None`` in all but the first of several processes.

    Raises:
        InvalidInputError: Something in the file or in what it names is not right, with key and line; or there
            is a store already, and ``resume`` was not asked for.
    """
    config = Config.read(path)
    _check_store(config, resume=resume)
    with modules_beside(path), _connected(config), _warnings_on_one_line():
        leads = not _is_follower()
        _check_workers(config)
        things = load(config)
        composition = dict(config.composition)
        if progress and leads:
            composition["solver"] = _showing_progress(composition["solver"])
        model = compose(things["model"], things["loss"], **composition)
        _check_blocks(config, model)
        _check_order(config, things)
        start = time.perf_counter()
        if leads:
            print(f"Fitting {type(model.solver).__name__} to the training data …", file=sys.stderr)
        _print_plan(config, model, things)
        fits = isinstance(config.executor, Fitting)
        model.fit(WithoutIdentifiers(things["train"]), executor=config.executor if fits else "sequential")
        fitted = time.perf_counter()
        _print_plan(config, model, things)
        scored = attribute(
            model,
            things.get("test"),
            things["train"],
            output=config.output,
            measurement=things.get("measurement"),
            query_rank=config.query_rank,
            executor=config.executor,
            store=config.store,
            progress=progress,
        )
        end = time.perf_counter()
        return Outcome(config, model, scored, fitted - start, end - fitted) if leads else None


def _print_plan(config: Config, model: TorchInfluenceFunctionModel, things: Mapping[str, Any]) -> None:
    """What the next part of the run takes, where the solver can tell at the price of a few samples."""
    # One of several processes would plan alone, and wait for the others.
    if not isinstance(model.solver, Planning) or not isinstance(config.executor, SequentialExecutor):
        return
    if model.is_fitted:
        train, test, rank = things["train"], things.get("test"), config.query_rank
        found = plan(model, train, test, output=config.output, query_rank=rank, store=True)
    else:
        found = plan(model, WithoutIdentifiers(things["train"]))
    print(found, file=sys.stderr)


def _check_store(config: Config, *, resume: bool) -> None:
    store = config.store
    if not store.exists() or (store.is_dir() and not any(store.iterdir())):
        return
    if not (store / MANIFEST).exists():
        raise config.problem(("store",), f"{store} exists and is no store of scores: choose another folder.")
    if not resume:
        raise config.problem(
            ("store",), f"{store} holds scores already: go on with them by --resume, or choose another folder."
        )


def _check_workers(config: Config) -> None:
    """Raise for an executor that has nothing to work with, before anything is imported."""
    try:
        getattr(config.executor, "workers", 1)
    except InvalidInputError as error:
        raise config.problem(("executor",), error) from None


def _check_order(config: Config, things: Mapping[str, Any]) -> None:
    """Raise for a loader whose points could not be told apart, before the fit and not after it."""
    for name in ("train", "test"):
        if name in things and shuffles(things[name]):
            try:
                next(blocks(things[name], 1), None)
            except InvalidInputError as error:
                raise config.problem((name,), f"{config.values[name]!r}: {error}") from None


def _check_blocks(config: Config, model: TorchInfluenceFunctionModel) -> None:
    """Raise for blocks that do not fit the model, before the data is read."""
    try:
        blocks = Blocks.resolve(model.blocks, ParameterSpace.of(model.model))
    except InvalidInputError as error:
        raise config.problem(("blocks",) if "blocks" in config.values else ("model",), error) from None
    try:
        per_block(model.hessian_regularization, blocks)
    except InvalidInputError as error:
        raise config.problem(("hessian_regularization",), error) from None


def _showing_progress(solver: Any) -> Any:
    """The solver with its own bar, where it has one."""
    if dataclasses.is_dataclass(solver) and any(f.name == "progress" for f in dataclasses.fields(solver)):
        return dataclasses.replace(solver, progress=True)  # type: ignore[type-var]
    return solver


def _is_follower() -> bool:
    """Whether another process speaks for this one."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0


@contextmanager
def _connected(config: Config) -> Iterator[None]:
    """Connect the processes that ``torchrun`` has started, where the executor is for them."""
    if not isinstance(config.executor, TorchDistributedExecutor) or distributed.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        again = "torchrun --nproc-per-node=N -m influence_framework.cli.main run " + shlex.quote(
            str(config.path)
        )
        raise config.problem(("executor",), f"is for processes that torchrun starts: {again}")
    distributed.init_process_group(_backend())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _backend() -> str:
    """What the processes exchange by; each is given a GPU of its own where there are enough of them."""
    here = int(os.environ.get("LOCAL_RANK", "0"))
    # NCCL has no two processes on one GPU.
    if torch.cuda.device_count() < max(here + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        return "gloo"
    torch.cuda.set_device(here)
    # With gloo for what is small, a process that waits in vain is told so, and not ended by NCCL.
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    with warnings.catch_warnings():

        def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            if not _is_follower():
                print(f"warning: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield
