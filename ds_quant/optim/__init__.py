"""AdamW whose moments are stored in few bits.

Begin with `adamw` (the optimizer) and `state` (a moment). `setup` makes one from the JSON, `adopt` from a live AdamW.
"""

from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.group_options import MOMENTS
from ds_quant.optim.state import QuantizedMoment

__all__ = ["MOMENTS", "QuantAdamW", "QuantizedMoment"]
