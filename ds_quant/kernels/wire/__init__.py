"""Gradients on the wire. `ops` has the operations, `numerics.wire` what they compute."""

from ds_quant.kernels.wire.ops import dequantize, quantize, reduce
from ds_quant.numerics.wire import Parts, Residuals, WireFormat, code_bytes, num_blocks, scale_bytes

__all__ = [
    "Parts",
    "Residuals",
    "WireFormat",
    "code_bytes",
    "dequantize",
    "num_blocks",
    "quantize",
    "reduce",
    "scale_bytes",
]
