"""Optimizers whose states are stored in few bits.

Begin with `adamw` (AdamW itself), `base` (what all optimizers share) and `state` (a state). `setup` makes one from the
JSON, `adopt` from a live AdamW.
"""

from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.group_options import MOMENTS
from ds_quant.optim.state import QuantizedMoment, QuantizedState

__all__ = ["MOMENTS", "QuantAdamW", "QuantizedMoment", "QuantizedState"]
