"""A live engine tells the quantized layers when their weights were written.

`safe_set_full_fp32_param` needs no telling: it writes the optimizer's own copy, which the next step passes on (stages 0
to 2), or a partition (stage 3, where layers hold codes no longer than the weight that they came with).
"""

import functools
from typing import Any

import deepspeed

from ds_quant.engine.parts import Part
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.weight_codes import weights_changed

_Gathered = deepspeed.zero.GatheredParameters


@functools.cache
def _tell_of_gathered_parameters() -> None:
    """Have every GatheredParameters say so at its end: below stage 3 it does nothing but hold the user's edits."""
    leave = _Gathered.__exit__

    @functools.wraps(leave)
    def __exit__(self: Any, *exc: Any) -> Any:
        try:
            return leave(self, *exc)
        finally:
            weights_changed()

    _Gathered.__exit__ = __exit__


class Weights(Part):
    """Has the layers of a live engine quantize their weights once for each step, and shared inputs once."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        _tell_of_gathered_parameters()
        if engine.zero_optimization_partition_weights():
            for module in engine.module.modules():
                if isinstance(module, QuantizedModule):
                    module.watch_input()

    def after_writing(self) -> None:
        weights_changed()
