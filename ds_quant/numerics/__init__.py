"""Pure functions of the quantizers: tensors in, tensors out. They know no model and no DeepSpeed.

Begin with `format` (what a number format is), `integer` (the layers' integers), `blockwise` and `codes` (states of
optimizers) and `wire` (messages). `random` has the bits of stochastic rounding. Steps of optimizers are a module each:
`adam`, `lion`, `sgd`, `ademamix`.
"""

from ds_quant.numerics.blockwise import (
    QuantizedBlocks,
    dequantize_blockwise,
    from_bitsandbytes,
    group_size,
    quantize_blockwise,
    to_bitsandbytes,
)
from ds_quant.numerics.codes import CodeMap, code_map, code_values
from ds_quant.numerics.format import fake_quantize_to, named_format, quantize_to
from ds_quant.numerics.integer import Quantized, dequantize, expand_scale, fake_quantize, integer_values, quantize
from ds_quant.numerics.random import derive_key, fold_key, random_bits, uniform, uniform16

__all__ = [
    "CodeMap",
    "Quantized",
    "QuantizedBlocks",
    "code_map",
    "code_values",
    "dequantize",
    "dequantize_blockwise",
    "derive_key",
    "expand_scale",
    "fake_quantize",
    "fake_quantize_to",
    "fold_key",
    "from_bitsandbytes",
    "group_size",
    "integer_values",
    "named_format",
    "quantize",
    "quantize_blockwise",
    "quantize_to",
    "random_bits",
    "to_bitsandbytes",
    "uniform",
    "uniform16",
]
