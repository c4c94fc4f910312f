"""Output gradients of layers that give queries, keys and values in one: each part has scales of its own.

G [tokens, out] is cut along its features in equal parts. With granularity `token` (`row`) a scale is of one token and
part, with `tensor` of one part over all tokens, as the published version of Chitsaz et al., EMNLP 2024 (arXiv
2407.11722), quantizes the gradient of GPT-2's fused projection in some of its runs. The parts of one matrix are put one
below the other, so that a scale is that of a row and one call quantizes all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.patterns import matches
from ds_quant.config import LinearConfig
from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.recipe import Quantizer
from ds_quant.numerics.integer import Quantized

_QKV = 3


def parts_of(config: LinearConfig, name: str, out_features: int) -> int:
    """In how many parts the output gradient of the layer `name` is cut, 1 for none.

    Raises:
        ConfigError: it does not divide, or the layer has no name to be found by.
    """
    patterns = config.gradient.split_qkv if config.gradient else ()
    where = "ds_quant.linear.gradient.split_qkv"
    if patterns and not name:
        fix = "remove it, or convert a model"
        raise fail(where, list(patterns), "absent for a layer by itself, which has no name", fix)
    if not matches(name, patterns):
        return 1
    if out_features % _QKV:
        allowed = f"layers whose features make {_QKV} equal parts"
        raise fail(where, f"{name} of {out_features} output features", allowed, "leave it out of the patterns")
    return _QKV


class InParts(NamedTuple):
    """A matrix [tokens, features] whose parts are quantized apart."""

    rows: Quantized
    """[tokens * parts, features / parts], or [parts, tokens * features / parts] with one scale for each part."""
    shape: tuple[int, int, int]
    """Tokens, parts, features of a part."""
    by_token: bool

    @property
    def device(self) -> torch.device:
        return self.rows.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[tokens, features] in dtype, dequantized."""
        tokens, parts, width = self.shape
        values = kernels.dequantize(self.rows, dtype)
        if not self.by_token:
            values = values.reshape(parts, tokens, width).transpose(0, 1)
        return values.reshape(tokens, parts * width)


def quantize(g: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int) -> InParts:
    """g [tokens, features] by a quantizer with `parts`, of granularity `row` or `tensor`; they divide the features."""
    tokens, parts, width = g.shape[0], quantizer.parts, g.shape[1] // quantizer.parts
    apart, by_token = g.detach().reshape(tokens, parts, width), quantizer.granularity == "row"
    shape = (tokens * parts, width) if by_token else (parts, tokens * width)
    rows = (apart if by_token else apart.transpose(0, 1)).reshape(shape)
    to = quantizer._replace(granularity="row").format
    found = kernels.quantize(rows, None, to, quantizer.rounding, key, stream)
    return InParts(found, (tokens, parts, width), by_token)
