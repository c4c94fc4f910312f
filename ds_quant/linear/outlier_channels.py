"""Input features of X with the largest magnitudes, in 8 bits beside others in few: outlier channels.

Of X [tokens, in], with a share r of the features kept,

    absmax     the largest |x| of each feature, over all tokens of the call
    channels   the features with the k largest, k = r * in rounded up; of equal ones the first; in increasing order
    rest       X with zeros in `channels`, by the layer's quantizer
    outliers   X[:, channels], [tokens, k], by the same quantizer in 8 bits: integers of 8 bits; fp8_e4m3 for fp6 and
               fp4; mxfp8 for mxfp6, mxfp4 and nvfp4; mxint8 for nvint4

so that a token, or a block, has a scale for each of the two. They are chosen anew from each call's own X: no state is
held or saved, and a layer that is computed again chooses the same. Mixed precision for outlier channels in training is
OutControl of TetraJet-v2 (arXiv 2510.27527), and in inference that of LLM.int8() (arXiv 2208.07339); the choice by the
largest magnitudes of a call is this module's own.

A feature with a NaN counts as the largest. What rounds stochastically draws other bits for the two parts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.depth import count_of
from ds_quant.linear.recipe import Quantizer
from ds_quant.numerics.integer import Quantized, reduce_groups

_IN_8_BITS = {
    "": "",
    "fp6_e2m3": "fp8_e4m3",
    "fp6_e3m2": "fp8_e4m3",
    "fp4_e2m1": "fp8_e4m3",
    "mxfp6": "mxfp8",
    "mxfp4": "mxfp8",
    "nvfp4": "mxfp8",
    "nvint4": "mxint8",
}
_OUTLIERS = 0x6F75746C << 32
"""Sets the stream of the outliers apart from that of the rest."""


class WithOutliers(NamedTuple):
    """A matrix [rows, features] in two parts."""

    rest: Quantized
    """[rows, features], with zeros in the channels of the other part."""
    outliers: Quantized
    """[rows, k]."""
    channels: Tensor
    """int64 [k], increasing."""

    @property
    def device(self) -> torch.device:
        return self.channels.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[rows, features] in dtype, dequantized."""
        outliers = kernels.dequantize(self.outliers, dtype)
        return kernels.dequantize(self.rest, dtype).index_copy(1, self.channels, outliers)

    def apart(self) -> tuple[tuple[Tensor | None, ...], tuple[tuple[Any, ...], ...]]:
        """Its tensors, and what else `together` needs."""
        parts = (self.rest, self.outliers)
        tensors = [tensor for part in parts for tensor in part[:3]]
        return (*tensors, self.channels), tuple(part[3:] for part in parts)


def together(tensors: Sequence[Any], how: Sequence[Any]) -> WithOutliers:
    """The inverse of `apart`."""
    return WithOutliers(Quantized(*tensors[:3], *how[0]), Quantized(*tensors[3:6], *how[1]), tensors[6])


def channels_of(x: Tensor, share: float) -> Tensor:
    """int64 [k]: the outlier channels of x [tokens, features], in increasing order."""
    absmax = reduce_groups(x.detach().float().abs(), torch.amax, "column", 0)
    order = torch.sort(absmax, descending=True, stable=True).indices
    return torch.sort(order[: count_of(share, x.shape[-1])]).values


def in_8_bits(quantizer: Quantizer) -> Quantizer:
    """That of the outliers."""
    name = _IN_8_BITS[quantizer.format_name]
    rule = quantizer.scale_rule if name == "mxfp8" and quantizer.scale_rule == "up" else "floor"
    return quantizer._replace(bits=8, format_name=name, scale_rule=rule, outlier_share=0.0)


def quantize(x: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int) -> WithOutliers:
    """x [tokens, features] by a quantizer with an `outlier_share`."""
    x = x.detach()
    channels, eight = channels_of(x, quantizer.outlier_share), in_8_bits(quantizer)
    rest = kernels.quantize(x.index_fill(1, channels, 0), None, quantizer.format, quantizer.rounding, key, stream)
    outliers = x.index_select(1, channels)
    return WithOutliers(
        rest,
        kernels.quantize(outliers, None, eight.format, quantizer.rounding, key, stream | _OUTLIERS),
        channels,
    )
