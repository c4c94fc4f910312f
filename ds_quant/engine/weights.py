"""A live engine tells the quantized layers when their weights were written.

`safe_set_full_fp32_param` needs no telling: it writes the optimizer's own copy, which the next step hands on (stages 0
to 2), or a partition (stage 3, where no layer keeps codes).
"""

import functools
from typing import Any

import deepspeed

from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.seams import check_live
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.weight_codes import weights_changed

_Engine = deepspeed.runtime.engine.DeepSpeedEngine
_Gathered = deepspeed.zero.GatheredParameters


class _WeightsEngine:
    """Mixed into the class of a live engine: says so whenever one of its methods may have written weights."""

    @functools.wraps(_Engine.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        steps: int | None = self.global_steps  # type: ignore[attr-defined]
        try:
            result = super().step(*args, **kwargs)  # type: ignore[misc]
            if self.global_steps == steps:  # type: ignore[attr-defined]
                steps = None  # in the midst of an accumulation
            return result
        finally:
            # Also after an error: what was written until then stays.
            if steps is not None:
                weights_changed()

    @functools.wraps(_Engine.load_checkpoint)
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            weights_changed()

    @functools.wraps(_Engine.load_module_state_dict)
    def load_module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_module_state_dict(*args, **kwargs)  # type: ignore[misc]
        finally:
            weights_changed()


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


def attach_weights(engine: Any) -> None:
    """Have the layers of the live engine quantize their weights once for each step, and shared inputs once."""
    check_live([(engine, "global_steps")])
    _tell_of_gathered_parameters()
    mix_in(engine, _WeightsEngine)
    if engine.zero_optimization_partition_weights():
        for module in engine.module.modules():
            if isinstance(module, QuantizedModule):
                module.watch_input()
