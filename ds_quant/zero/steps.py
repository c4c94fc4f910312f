"""A live engine tells the quantized layers which step a forward belongs to."""

from typing import Any

import torch
from deepspeed import comm as dist

from ds_quant.conversion import remove_forward_counter
from ds_quant.stepkey import StepKey
from ds_quant.zero.engine_class import mix_in
from ds_quant.zero.forwards import number_forwards
from ds_quant.zero.seams import check_live

_ENGINE_COUNTERS = ("global_steps", "micro_steps")
"""Set in DeepSpeedEngine.__init__, so they can be looked up on a live engine only."""


class _StepNamingEngine:
    """Mixed into the class of a live engine: tells the quantized layers which step a forward belongs to."""

    ds_quant_step_key: StepKey

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        # Both counters stand still until engine.step(), hence also during the backward of this forward. A checkpoint
        # holds the first; the second restarts at 0, which is where a step begins.
        accumulation = self.gradient_accumulation_steps()  # type: ignore[attr-defined]
        self.ds_quant_step_key.set(self.global_steps, self.micro_steps % accumulation)  # type: ignore[attr-defined]
        return super().forward(*inputs, **kwargs)  # type: ignore[misc]


def attach_steps(engine: Any, step_key: StepKey) -> None:
    """Drive `step_key` from the live engine, with the seed of rank 0 on all ranks."""
    check_live((engine, name) for name in _ENGINE_COUNTERS)
    seed = torch.tensor([step_key.seed], dtype=torch.int64, device=engine.device)
    dist.broadcast(seed, src=0)
    step_key.reseed(int(seed.item()), dist.get_rank())
    step_key.local(torch.device(engine.device))  # keys are made there from now on
    remove_forward_counter(engine.module)
    engine.ds_quant_step_key = step_key
    number_forwards(engine)
    mix_in(engine, _StepNamingEngine)
