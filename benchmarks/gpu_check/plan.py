"""The steps of the acceptance, in order, and the seconds that each has."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """A step: the module of its name in this package has its `run`."""

    number: int
    name: str
    title: str
    seconds: int
    """After so many it is killed; what it has recorded until then counts."""


STEPS = (
    Step(1, "device", "device, driver, versions, bandwidth, bf16 rate", 30),
    Step(2, "int_mm", "torch._int_mm by layout and size", 35),
    Step(3, "kernels", "quantizers, keys and the wire against their definitions", 80),
    Step(4, "triton_kernels", "Triton's GEMM and AdamW, bit for bit", 45),
    Step(5, "optimizer", "QuantAdamW in its formats, flat and in 148 tensors", 60),
    Step(6, "layers", "Linear and Conv1D against `simulated`: times, launches, waits", 75),
    Step(7, "models", "GPT-2 small and blocks of 2048 and 4096 beside bf16 and torchao", 130),
    Step(8, "training", "pretrain.py with full_int8.json: stages, offload, stop and resume", 130),
)

TOTAL_SECONDS = 590
"""Below the ten minutes that one command has on the machines that are lent: no step begins beyond it."""


def by_numbers(numbers: list[int]) -> list[Step]:
    """Those steps, in their order."""
    return [step for step in STEPS if step.number in numbers]


def seconds_of(name: str, *, dry_run: bool) -> int:
    """Those of the step of that name. A dry run shares its machine with others, and is to find no fault in that."""
    return TOTAL_SECONDS if dry_run else next(step.seconds for step in STEPS if step.name == name)
