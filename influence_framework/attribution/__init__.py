"""Scores between two loaders, of any length, in bounded memory, to a result or to a store on disk."""

from influence_framework.attribution.executors import SequentialExecutor, TorchDistributedExecutor
from influence_framework.attribution.outputs import Matrix, Mean, Output, Scored, SelfInfluence, TopK
from influence_framework.attribution.reading import Stored
from influence_framework.attribution.run import attribute

__all__ = [
    "Matrix",
    "Mean",
    "Output",
    "Scored",
    "SelfInfluence",
    "SequentialExecutor",
    "Stored",
    "TopK",
    "TorchDistributedExecutor",
    "attribute",
]
