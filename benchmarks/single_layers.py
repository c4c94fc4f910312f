"""A quantized layer by itself, as it is in a model."""

from __future__ import annotations

from typing import TypeVar

from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.step_key import remove_forward_counter

L = TypeVar("L", bound=QuantizedModule)


def as_in_a_model(layer: L) -> L:
    """The layer, which counts no steps any more: a model or its engine does that once for all layers."""
    remove_forward_counter(layer)
    return layer
