"""Which micro step of an optimizer step a forward belongs to, counted here.

DeepSpeed counts calls of `engine.step()`. accelerate and Hugging Face's Trainer call it at the end of an optimizer step
only, so that its count stands still while gradients accumulate. Here a micro step ends with its backward, under either.
Several forwards before one backward belong to one micro step.
"""

import functools
import weakref
from typing import Any

import deepspeed
import torch

from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.seams import check_live

_Engine = deepspeed.runtime.engine.DeepSpeedEngine


class MicroSteps:
    """The count of one engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.proxy(engine)
        self._step: int | None = None
        self._backwards = 0
        self.trained = 0
        """The micro step of the last training forward: that of the gradients which are being reduced."""

    def now(self) -> int:
        """The micro step, from 0, of a forward that begins now."""
        if self._engine.global_steps != self._step:
            self._step, self._backwards = self._engine.global_steps, 0
        return self._backwards

    def end_backward(self) -> None:
        """A backward is over, its gradients added up or reduced."""
        self.now()
        self._backwards += 1

    def begin_anew(self) -> None:
        """A checkpoint was loaded: it begins a step."""
        self._step = None


class _MicroStepsEngine:
    """Mixed into the class of a live engine."""

    ds_quant_micro_steps: MicroSteps

    @functools.wraps(_Engine.forward)
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.module.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            self.ds_quant_micro_steps.trained = self.ds_quant_micro_steps.now()
        return super().forward(*inputs, **kwargs)  # type: ignore[misc]

    def _backward_epilogue(self) -> None:
        super()._backward_epilogue()  # type: ignore[misc]
        self.ds_quant_micro_steps.end_backward()

    @functools.wraps(_Engine.load_checkpoint)
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self.ds_quant_micro_steps.begin_anew()
        return result


def count_micro_steps(engine: Any) -> MicroSteps:
    """The count of the live engine, which begins with the first call."""
    found: MicroSteps | None = getattr(engine, "ds_quant_micro_steps", None)
    if found is None:
        check_live([(engine, "global_steps")])
        found = engine.ds_quant_micro_steps = MicroSteps(engine)
        mix_in(engine, _MicroStepsEngine)
    return found
