"""Which tensors of a live engine are what: weights, fp32 masters, moments, gradients, buffers of communication."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ds_quant.engine.oscillation_reset import OscillationReset

_PLACES = {
    "weights": ("bit16_groups_flat", "bf16_groups_flat", "fp16_groups_flat", "fp16_partitioned_groups_flat"),
    "masters": (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_flat",
        "fp32_groups",
        "fp32_partitioned_groups_flat",
    ),
    "gradients": (
        "averaged_gradients",
        "all_grad_tensors",
        "grad_partitions_flat_buffer",
        "fp32_groups_gradients_flat",
    ),
    "communication": ("_DeepSpeedZeroOptimizer_Stage3__ipg_bucket_flat_buffer",),
}
"""Attributes of DeepSpeed's optimizer wrappers: stages 1 and 2, BF16_Optimizer, the two of stage 0, stage 3."""


def memory_parts(engine: Any) -> dict[str, list[Tensor]]:
    """Tensors by what they are for. A tensor may occur twice; gradients that are not there now are left out.

    What `oscillation_reset` holds counts as moments.
    """
    wrapper = engine.optimizer
    parts: dict[str, list[Tensor]] = {role: [] for role in ("weights", "masters", "moments", "gradients")}
    parts["communication"] = []
    for parameter in engine.module.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        # What stage 3 has gathered of a parameter is a buffer of its all-gather, not a weight of this rank.
        parts["weights" if partition is None else "communication"].append(parameter.data)
        parts["weights"] += [] if partition is None else [partition]
        parts["gradients"] += [] if parameter.grad is None else [parameter.grad]
    parts["weights"] += [buffer.data for buffer in engine.module.buffers()]
    for role, names in _PLACES.items():
        for name in names:
            parts[role] += _tensors(getattr(wrapper, name, None))
    parts["gradients"] += pending_gradients(engine)
    for master in list(parts["masters"]):
        # With offloading they are on the host, as the masters are.
        parts["masters" if engine.zero_cpu_offload() else "gradients"] += [] if master.grad is None else [master.grad]
    parts["communication"] += gradient_buckets(engine)
    inner = getattr(wrapper, "optimizer", wrapper)
    for state in inner.state.values():
        parts["moments"] += _tensors(state)
    for part in getattr(engine, "ds_quant_parts", ()):
        if isinstance(part, OscillationReset):
            parts["moments"] += part.watched()
    return parts


def gradient_buckets(engine: Any) -> list[Tensor]:
    """What stages 1 and 2 collect gradients in before they are reduced: there during the backward only."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    return [tensor for bucket in buckets for tensor in _tensors(bucket.buffer)]


def pending_gradients(engine: Any) -> list[Tensor]:
    """Gradients that are stepped in the backward, and are not whole yet."""
    released = getattr(engine.optimizer, "ds_quant_released", None)
    return [] if released is None else released.pending()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
