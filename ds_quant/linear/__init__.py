"""Linear layers whose products are quantized, and which layers of a model become such.

Begin with `modules` (the layers) and `convert` (a model's layers are replaced). `recipe` says what is quantized in each
of the three products; `simulated` and `int8` compute them.
"""

from ds_quant.linear.modules import QuantizedModule, QuantLinear, describe

__all__ = ["QuantLinear", "QuantizedModule", "describe"]
