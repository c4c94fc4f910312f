"""A live engine tells the quantized layers which step a forward belongs to."""

from typing import Any

import torch
from deepspeed import comm as dist

from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.forwards import number_forwards
from ds_quant.engine.micro_steps import count_micro_steps
from ds_quant.linear.convert import remove_forward_counter
from ds_quant.linear.step_key import SEED_MASK, StepKey


class _StepNamingEngine:
    """Mixed into the class of a live engine: tells the quantized layers which step a forward belongs to."""

    ds_quant_step_key: StepKey

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        # Both stand still during the backward of this forward. A checkpoint holds the first and begins the second anew.
        micro_step = self.ds_quant_micro_steps.now()  # type: ignore[attr-defined]
        self.ds_quant_step_key.set(self.global_steps, micro_step)  # type: ignore[attr-defined]
        return super().forward(*inputs, **kwargs)  # type: ignore[misc]


def seed_of_first_rank(engine: Any, seed: int) -> int:
    """`seed` of rank 0, on all ranks; its low 63 bits count."""
    sent = torch.tensor([seed & SEED_MASK], dtype=torch.int64, device=engine.device)
    dist.broadcast(sent, src=0)
    return int(sent.item())


def attach_steps(engine: Any, step_key: StepKey) -> None:
    """Drive `step_key` from the live engine, with the seed of rank 0 on all ranks."""
    count_micro_steps(engine)
    step_key.reseed(seed_of_first_rank(engine, step_key.seed), dist.get_rank())
    step_key.local(torch.device(engine.device))  # keys are made there from now on
    remove_forward_counter(engine.module)
    engine.ds_quant_step_key = step_key
    number_forwards(engine)
    mix_in(engine, _StepNamingEngine)
