"""Forwards of a live engine that share a micro step, and calls of a layer that share a forward, draw their own bits."""

from typing import Any

import deepspeed
import torch

from ds_quant.engine.engine_class import mix_in
from ds_quant.linear import recomputation
from ds_quant.linear.step_key import StepKey


class _ForwardNumberingEngine:
    """Mixed into the class of a live engine, below what names the step and the micro step.

    The second forward of a micro step, say of a policy that is called twice before one backward, gets other bits than
    the first; evaluations and forwards that fail do not count.
    """

    ds_quant_step_key: StepKey
    _ds_quant_micro_step = (-1, 0)
    _ds_quant_forwards = 0

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        step_key = self.ds_quant_step_key
        trains = self.module.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        if trains:
            named = step_key.step, step_key.micro_step
            if named != self._ds_quant_micro_step:
                self._ds_quant_micro_step, self._ds_quant_forwards = named, 0
            step_key.set(named[0], named[1] | self._ds_quant_forwards << 32)
        step_key.begin_forward()
        try:
            result = super().forward(*inputs, **kwargs)  # type: ignore[misc]
        finally:
            step_key.end_forward()
        self._ds_quant_forwards += trains
        return result

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self._ds_quant_micro_step = (-1, 0)
        return result


def number_forwards(engine: Any) -> None:
    """Have the live engine, whose `ds_quant_step_key` is set, tell forwards of one micro step and calls apart."""
    recomputation.follow_reentrant(deepspeed.checkpointing.CheckpointFunction)
    mix_in(engine, _ForwardNumberingEngine)
