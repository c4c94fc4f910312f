"""What the time of a training step consists of: self times of torch.profiler, in groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

ATTENTION, QUANTIZE, EPILOGUE = "attention", "quantize", "epilogue"
INTEGER, FLOATING = "integer GEMM", "floating GEMM"
OPTIMIZER, REST = "optimizer", "rest"
GROUPS = (INTEGER, FLOATING, QUANTIZE, EPILOGUE, ATTENTION, OPTIMIZER, REST)

_PATTERNS = (
    (EPILOGUE, re.compile(r"ds_quant::.*epilogue")),
    (QUANTIZE, re.compile(r"ds_quant::.*quantize")),
    (ATTENTION, re.compile(r"scaled_dot_product|_flash_attention|_efficient_attention")),
    (OPTIMIZER, re.compile(r"Optimizer\.step#|aten::_(fused|foreach)_")),
    (INTEGER, re.compile(r"::(_int_mm|_?scaled_int8_mm|_?scaled_matmul|int8_matmul)(_out)?$")),
    (FLOATING, re.compile(r"(aten|mkldnn)::(mm|addmm|bmm|baddbmm|linear|matmul|_linear_pointwise)(_out)?$")),
)
_BACKWARD = "autograd::engine::evaluate_function: "


def group_of(name: str) -> str | None:
    """The group of an operator or a range; None for one that tells nothing, as most do."""
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), None)


def self_seconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of each group in one call: of the processor, or on CUDA of the GPU's kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return split(profile.events(), on_gpu=device.type == "cuda")


def split(events: Iterable[Any], *, on_gpu: bool) -> dict[str, float]:
    """Self seconds of the events of a profile by group.

    An event belongs to the outermost of itself and those around it that has a group: a product within attention is
    attention's. What a backward node does belongs to attention if its forward did.
    """
    own = [event for event in events if event.device_type.name == "CPU"]
    in_attention = {
        event.sequence_nr for event in own if event.sequence_nr >= 0 and _outermost_group(event, set()) == ATTENTION
    }
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in own:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[_outermost_group(event, in_attention) or REST] += microseconds * 1e-6
    return seconds


def _outermost_group(event: Any, in_attention: set[int]) -> str | None:
    found = None
    while event is not None:
        if event.name.startswith(_BACKWARD) and event.sequence_nr in in_attention:
            found = ATTENTION
        else:
            found = group_of(event.name) or found
        event = event.cpu_parent
    return found
