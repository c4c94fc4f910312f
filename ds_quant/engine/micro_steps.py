"""Which micro step of an optimizer step a forward belongs to, counted here.

DeepSpeed counts calls of `engine.step()`. accelerate and Hugging Face's Trainer call it at the end of an optimizer step
only, so that its count stands still while gradients accumulate. Here a micro step ends with its backward, under either.
Several forwards before one backward belong to one micro step.
"""

from typing import Any

from ds_quant.engine.parts import Loading, Part


class MicroSteps(Part):
    """The count of one engine."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._step: int | None = None
        self._backwards = 0
        self.trained = 0
        """The micro step of the last training forward: that of the gradients which are being reduced."""
        engine.ds_quant_micro_steps = self

    def now(self) -> int:
        """The micro step, from 0, of a forward that begins now."""
        if self.engine.global_steps != self._step:
            self._step, self._backwards = self.engine.global_steps, 0
        return self._backwards

    def before_forward(self, *, trains: bool) -> None:
        if trains:
            self.trained = self.now()

    def after_backward(self) -> None:
        self.now()
        self._backwards += 1

    def after_load(self, loading: Loading, path: str | None) -> None:
        self._step = None  # a checkpoint begins a step
