"""Layers in matrix form: their inputs and output gradients, from the only hooks put on a model."""

from influence_framework.layers.covering import Cover, cover
from influence_framework.layers.forms import MatrixForm, UnsupportedLayerError, register_layer
from influence_framework.layers.statistics import (
    LayerBatch,
    Rows,
    Samples,
    contract_positions,
    fisher_rows,
    layer_batch,
    layer_batches,
    samples_at_once,
    true_gradients,
)
from influence_framework.layers.tape import Layer, Tape, Use, record

__all__ = [
    "Cover",
    "Layer",
    "LayerBatch",
    "MatrixForm",
    "Rows",
    "Samples",
    "Tape",
    "UnsupportedLayerError",
    "Use",
    "contract_positions",
    "cover",
    "fisher_rows",
    "layer_batch",
    "layer_batches",
    "record",
    "register_layer",
    "samples_at_once",
    "true_gradients",
]
