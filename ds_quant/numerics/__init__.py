"""Pure functions of the quantizers: tensors in, tensors out. They know no model and no DeepSpeed."""

from ds_quant.numerics.integer import Quantized, dequantize, expand_scale, fake_quantize, integer_values, quantize
from ds_quant.numerics.random import derive_key, fold_key, random_bits, uniform

__all__ = [
    "Quantized",
    "dequantize",
    "derive_key",
    "expand_scale",
    "fake_quantize",
    "fold_key",
    "integer_values",
    "quantize",
    "random_bits",
    "uniform",
]
