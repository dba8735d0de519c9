"""kronfluence as one side of a comparison."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

from common import quickest
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import Dataset

IN_MEMORY = Path("/dev/shm")
"""Where its files take no time."""


class Kronfluence:
    """Fit and all scores with kronfluence, every stage at a batch size of its own, its files in memory."""

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        train: Dataset[Any],
        test: Dataset[Any],
        strength: float,
        folder: str,
    ) -> None:
        self.train, self.test = train, test
        self.analyzer = Analyzer(
            "benchmark",
            prepare_model(copy.deepcopy(net), task),
            task,
            cpu=True,
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=folder,
        )
        self.factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        self.damping = ScoreArguments(damping_factor=strength)

    def covariances(self, size: int) -> None:
        self.analyzer.fit_covariance_matrices(
            "f", self.train, size, factor_args=self.factors, overwrite_output_dir=True
        )

    def bases(self) -> None:
        self.analyzer.perform_eigendecomposition("f", self.factors, overwrite_output_dir=True)

    def eigenvalues(self, size: int) -> None:
        self.analyzer.fit_lambda_matrices(
            "f", self.train, size, factor_args=self.factors, overwrite_output_dir=True
        )

    def scores(self, size: int) -> Tensor:
        self.analyzer.compute_pairwise_scores(
            "s",
            "f",
            self.test,
            self.train,
            per_device_query_batch_size=len(cast(Sized, self.test)),
            per_device_train_batch_size=size,
            score_args=self.damping,
            overwrite_output_dir=True,
        )
        scores: Tensor = self.analyzer.load_pairwise_scores("s")["all_modules"]
        return scores

    def quickest(self, sizes: Sequence[int]) -> list[int]:
        """The best batch size of each stage that reads the data."""
        self.covariances(sizes[-1])
        self.bases()
        stages: tuple[Callable[[int], object], ...] = (self.covariances, self.eigenvalues, self.scores)
        return [quickest(partial(partial, stage), sizes) for stage in stages]

    def run(self, sizes: Sequence[int]) -> Tensor:
        self.covariances(sizes[0])
        self.bases()
        self.eigenvalues(sizes[1])
        return self.scores(sizes[2])
