"""kronfluence 1.0.1: losses are summed, damping is added to eigenvalues of the mean, scores are positive."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from adapter import Method, Task, fitted_once
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as Base
from torch import nn


class Summed(Base):
    def __init__(self, loss: nn.Module, classification: bool) -> None:
        super().__init__()
        self.loss, self.classification = loss, classification

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
        x, y = batch
        outputs = model(x)
        if not sample:
            return self.loss(outputs, y)
        # A draw from the model's own predictions, as its documentation has it.
        with torch.no_grad():
            drawn = (
                torch.multinomial(outputs.softmax(1), 1).flatten()
                if self.classification
                else torch.normal(outputs.detach(), std=0.5**0.5)
            )
        return self.loss(outputs, drawn)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
        return self.compute_train_loss(batch, model)


def scored(analyzer: Analyzer, task: Task, size: int, arguments: ScoreArguments) -> Any:
    common = {"score_args": arguments, "overwrite_output_dir": True}
    if task.measure == "self":
        analyzer.compute_self_scores("s", "f", task.train, size, **common)
        return analyzer.load_self_scores("s")["all_modules"]
    analyzer.compute_pairwise_scores(
        "s",
        "f",
        task.test,
        task.train,
        per_device_query_batch_size=len(task.test),
        per_device_train_batch_size=size,
        **common,
    )
    return analyzer.load_pairwise_scores("s")["all_modules"]


def strategy(name: str) -> Method:
    @fitted_once
    def method(task: Task) -> Iterator[Any]:
        base = Summed(task.loss("sum"), task.kind == "classification")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            analyzer = Analyzer(
                "comparison",
                prepare_model(task.model(), base),
                base,
                cpu=True,
                log_level=logging.ERROR,
                disable_tqdm=True,
                output_dir=folder,
            )
            size = min(500, len(task.x))
            analyzer.fit_all_factors(
                "f",
                task.train,
                per_device_batch_size=size,
                factor_args=FactorArguments(strategy=name),
                overwrite_output_dir=True,
            )
            strength = yield
            while True:
                yield scored(analyzer, task, size, ScoreArguments(damping_factor=strength))
                strength = yield

    return method


METHODS = {name: strategy(name) for name in ("ekfac", "kfac")}
