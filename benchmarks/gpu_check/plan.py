"""The steps of the acceptance, in order, and the seconds that each has."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """A step: the module of its name in this package has its `run`."""

    number: int
    name: str
    title: str
    seconds: int
    """Its part of the whole where all steps run and each takes its time. It is killed when its time is over; what it
    has recorded until then counts."""


STEPS = (
    Step(1, "device", "device, driver, versions, bandwidth, bf16 rate", 30),
    Step(2, "int_mm", "torch._int_mm by layout and size", 35),
    Step(3, "kernels", "quantizers, keys and the wire against their definitions", 80),
    Step(4, "triton_kernels", "Triton's GEMM and AdamW, bit for bit", 40),
    Step(5, "optimizer", "QuantAdamW in its formats, flat and in 148 tensors", 75),
    Step(6, "layers", "Linear and Conv1D against `simulated`: times, launches, waits", 70),
    Step(7, "models", "GPT-2 small and blocks of 2048 and 4096 beside bf16 and torchao", 110),
    Step(8, "training", "pretrain.py with full_int8.json: stages, offload, stop and resume", 150),
)

TOTAL_SECONDS = 590
"""Below the ten minutes that one command often has on machines that are lent."""


def by_numbers(numbers: list[int]) -> list[Step]:
    """Those steps, in their order."""
    return [step for step in STEPS if step.number in numbers]


def allowed(step: Step, still_to_run: list[Step], seconds_left: float) -> float:
    """The step's share of what is left: what earlier ones did not need goes to all of those that are still to run."""
    return seconds_left * step.seconds / sum(each.seconds for each in still_to_run)
