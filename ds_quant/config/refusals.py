"""What of DeepSpeed's JSON cannot be combined with the section, and why.

Each row names a setting by its path; its value is looked up in the raw JSON, before DeepSpeed reads it. Model classes
that are refused (PipelineModule) are not in the JSON: the engine checks those.
"""

from typing import Any

from ds_quant.base.errors import ConfigError, problem
from ds_quant.config import QuantConfig
from ds_quant.config.optimizer_refusals import OPTIMIZER_REFUSALS
from ds_quant.config.refusal import (
    Refusal,
    is_above_one,
    is_enabled,
    is_given,
    is_no_partition,
    is_no_stage,
    is_nvme,
    is_on,
    is_three,
)

ALL = ("linear", "optimizer", "communication", "diagnostics")


REFUSALS = (
    Refusal(
        "zero_optimization.stage",
        is_no_stage,
        ALL,
        "0, 1, 2 or 3, written out",
        "DeepSpeed has no other stage, and takes anything unresolved for stage 0",
        "write the stage; 1 is recommended",
    ),
    Refusal(
        "zero_optimization.stage",
        is_no_partition,
        ("communication.weight",),
        "1, 2 or 3",
        "at stage 0 nothing is gathered",
        'use stage 1, or remove "weight" from communication',
    ),
    Refusal(
        "zero_optimization.stage",
        is_three,
        ("communication.weight.bits",),  # what only mode "difference" has
        "1 or 2",
        "at stage 3 a rank releases weights after their use, so that it has nothing that a difference could be added "
        "to; a replica on each rank would take the memory that stage 3 saves",
        'use mode "codes" where layers quantize their weights, stage 1 if the model fits, or remove "weight" from '
        "communication",
    ),
    Refusal(
        "zero_optimization.stage",
        is_three,
        ("communication.weight.hierarchical",),
        "1 or 2",
        "stage 3 fetches weights in one level: a second one would have to run between the start of a fetch and its use",
        'use stage 1, or remove "hierarchical"',
    ),
    Refusal(
        "zero_optimization.zero_hpz_partition_size",
        is_above_one,
        ("communication.weight",),
        "1",
        "ZeRO++'s hpZ keeps second partitions, made of what a forward has fetched",
    ),
    Refusal(
        "tensor_parallel.autotp_size",
        is_above_one,
        ALL,
        "0 or 1",
        "AutoTP replaces the quantized linears by full-precision ones of its own",
    ),
    Refusal(
        "expert_parallel",
        is_enabled,
        ALL,
        '"enabled": false',
        "AutoEP replaces the expert layers after the conversion",
    ),
    Refusal(
        "hybrid_engine",
        is_enabled,
        ALL,
        '"enabled": false',
        "its inference kernels bypass the quantized modules",
    ),
    Refusal(
        "compile.deepcompile",
        is_on,
        ALL,
        "false",
        "DeepCompile bypasses the engine's hooks and its gradient reduction",
    ),
    Refusal(
        "weight_quantization",
        is_given,
        ALL,
        "absent",
        "DeepSpeed's own weight quantization is for inference; it stores the parameters as integers",
    ),
    Refusal(
        "zero_optimization.zenflow",
        is_given,
        ALL,
        "absent",
        "ZenFlow's optimizer bypasses the hooks",
    ),
    Refusal(
        "zero_optimization.offload_optimizer.super_offload",
        is_on,
        ALL,
        "false",
        "SuperOffload's optimizer bypasses the hooks",
    ),
    Refusal(
        "zero_optimization.offload_optimizer.device",
        is_nvme,
        ALL,
        '"none" or "cpu"',
        "swapping to NVMe is not tested, and reads the raw storage of the optimizer's state",
        'offload to "cpu"',
    ),
    Refusal(
        "zero_optimization.offload_param.device",
        is_nvme,
        ALL,
        '"none" or "cpu"',
        "swapping parameters to NVMe is not tested with quantized modules",
        'offload to "cpu"',
    ),
    Refusal(
        "zero_optimization.zero_quantized_weights",
        is_on,
        ("linear.weight",),
        "false",
        "ZeRO++'s qwZ quantizes the gathered weights: they would be quantized twice",
    ),
    Refusal(
        "zero_optimization.zero_quantized_nontrainable_weights",
        is_on,
        ("linear.weight",),
        "false",
        "ZeRO++ stores frozen weights quantized: they would be quantized twice",
    ),
    Refusal(
        "zero_optimization.zero_quantized_gradients",
        is_on,
        ALL,
        "false",
        "ZeRO++'s qgZ needs CUDA and is silently ignored below stage 3",
        "remove it; ds_quant.communication.gradient is what replaces it",
    ),
    Refusal(
        "fp16",
        is_enabled,
        ("linear.weight.dampening",),
        '"enabled": false',
        "what dampening adds to a gradient is not scaled as the loss is",
        "train in bf16 or fp32, or remove dampening",
    ),
    Refusal(
        "zero_optimization.stage",
        is_three,
        ("linear.weight.oscillation_reset",),
        "0, 1 or 2",
        "at stage 3 a rank has no whole weights between steps, whose scales it needs",
        "use stage 1 or 2 if the model fits, or remove oscillation_reset",
    ),
    Refusal(
        "sparse_gradients",
        is_on,
        ("communication",),
        "false",
        "DeepSpeed gathers sparse gradients as they are: they would cross the wire in full precision",
    ),
    Refusal(
        "zero_optimization.elastic_checkpoint",
        is_on,
        ("optimizer",),
        "false",
        "elastic checkpoints cut up the raw tensors of the optimizer's state",
        "remove it; universal checkpoints (ds_to_universal) change the number of ranks",
    ),
    Refusal(
        "bf16.bf16_optimizer_states",
        is_on,
        ("optimizer",),
        "false",
        "DeepSpeed would keep the moments in bf16, in silence",
    ),
    Refusal(
        "bfloat16.bf16_optimizer_states",  # the old name of the section, which DeepSpeed reads where bf16 is absent
        is_on,
        ("optimizer",),
        "false",
        "DeepSpeed would keep the moments in bf16, in silence",
    ),
    *OPTIMIZER_REFUSALS,
)


def _look_up(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _parts_in_use(quant: QuantConfig, parts: tuple[str, ...]) -> list[str]:
    def is_used(part: str) -> bool:
        node: Any = quant
        for key in part.split("."):
            node = getattr(node, key, None)
        return node is not None and node is not False

    return [part for part in parts if is_used(part)]


def check_refusals(raw: dict[str, Any], quant: QuantConfig) -> None:
    """Raise `ConfigError` for each setting in `raw`, the whole DeepSpeed config, that `quant` cannot work with."""
    if not quant.enabled:
        return
    lines = []
    for row in REFUSALS:
        value = _look_up(raw, row.path)
        if value is None and row.alias:
            value = _look_up(raw, row.alias)
        parts = _parts_in_use(quant, row.parts)
        if parts and row.refused(value):
            allowed = f"{row.allowed} with {', '.join(f'ds_quant.{part}' for part in parts)} ({row.reason})"
            lines.append(problem(row.path, value, allowed, row.fix))
    if lines:
        raise ConfigError("\n".join(lines))
