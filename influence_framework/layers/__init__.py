"""Layers in matrix form: their inputs and output gradients, from the only hooks put on a model."""

from influence_framework.layers.cover import Cover, cover
from influence_framework.layers.statistics import (
    LayerBatch,
    Rows,
    contract_positions,
    fisher_rows,
    layer_batch,
    layer_batches,
    true_gradients,
)
from influence_framework.layers.tape import Layer, Tape, Use, record

__all__ = [
    "Cover",
    "Layer",
    "LayerBatch",
    "Rows",
    "Tape",
    "Use",
    "contract_positions",
    "cover",
    "fisher_rows",
    "layer_batch",
    "layer_batches",
    "record",
    "true_gradients",
]
