"""Optimizers whose states are stored in few bits.

Begin with `adamw` (AdamW itself), `base` (what all optimizers share) and `state` (a state). `lion`, `sgd`,
`ademamix` are a rule each on `elementwise`. `setup` makes one of `kinds` from the JSON, `adopt` one from a live AdamW.
"""

from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.ademamix import QuantAdEMAMix
from ds_quant.optim.group_options import MOMENTS
from ds_quant.optim.lion import QuantLion
from ds_quant.optim.sgd import QuantSGD
from ds_quant.optim.state import QuantizedMoment, QuantizedState

__all__ = ["MOMENTS", "QuantAdEMAMix", "QuantAdamW", "QuantLion", "QuantSGD", "QuantizedMoment", "QuantizedState"]
