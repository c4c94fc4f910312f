"""A live engine tells the quantized layers which step, micro step and forward they are in.

With `linear.forward_full_precision_from` the step also says whether a forward is quantized: for evaluation too, and for
the model called by itself after a step.

All three stand still during a forward and its backward, recomputed layers included, so that these draw the same bits.
The second forward of a micro step, say of a policy that is called twice before one backward, gets other bits than the
first; evaluations and forwards that fail do not count.
"""

from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from ds_quant.base.log import say
from ds_quant.engine.micro_steps import MicroSteps
from ds_quant.engine.parts import Loading, Part
from ds_quant.linear import recomputation
from ds_quant.linear.step_key import SEED_MASK, StepKey, remove_forward_counter


def seed_of_first_rank(engine: Any, seed: int) -> int:
    """`seed` of rank 0, on all ranks; its low 63 bits count."""
    sent = torch.tensor([seed & SEED_MASK], dtype=torch.int64, device=engine.device)
    dist.broadcast(sent, src=0)
    return int(sent.item())


class Steps(Part):
    """Drives the step key of an engine's model, with the seed of rank 0 on all ranks."""

    def __init__(self, engine: Any, step_key: StepKey, micro_steps: MicroSteps) -> None:
        super().__init__(engine)
        self._step_key, self._micro_steps = step_key, micro_steps
        self._micro_step = (-1, 0)
        self._forwards = 0
        step_key.reseed(seed_of_first_rank(engine, step_key.seed), dist.get_rank())
        step_key.local(torch.device(engine.device))  # keys are made there from now on
        remove_forward_counter(engine.module)
        recomputation.follow_reentrant(deepspeed.checkpointing.CheckpointFunction)
        engine.ds_quant_step_key = step_key
        self._reach()

    def before_forward(self, *, trains: bool) -> None:
        # A checkpoint holds the step; the micro steps restart at 0.
        step, micro_step = self.engine.global_steps, self._micro_steps.now()
        if trains:
            if (step, micro_step) != self._micro_step:
                self._micro_step, self._forwards = (step, micro_step), 0
            micro_step |= self._forwards << 32
        self._step_key.set(step, micro_step)
        self._step_key.loss_share = 1 / self.engine.gradient_accumulation_steps()
        self._reach()
        self._step_key.begin_forward()

    def after_forward(self, *, trains: bool, failed: bool) -> None:
        self._step_key.end_forward()
        self._forwards += trains and not failed

    def after_writing(self) -> None:
        self._reach()

    def _reach(self) -> None:
        quantized = self._step_key.quantizes_forward
        self._step_key.reach(self.engine.global_steps)
        if quantized and not self._step_key.quantizes_forward:
            say(f"step {self.engine.global_steps}: the forward is in full precision from here on")

    def after_load(self, loading: Loading, path: str | None) -> None:
        self._micro_step = (-1, 0)
