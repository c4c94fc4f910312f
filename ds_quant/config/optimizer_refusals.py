"""What of DeepSpeed's JSON cannot be combined with masters of few bits, and with gradients that are released."""

from ds_quant.config.refusal import (
    Refusal,
    is_above_one,
    is_elsewhere,
    is_false,
    is_muon,
    is_no_partition,
    is_not_bf16,
    is_not_false,
    is_not_two,
    is_not_zero,
    is_off,
)

MASTER = ("optimizer.master",)
RELEASE = ("optimizer.release_gradients",)

OPTIMIZER_REFUSALS = (
    Refusal(
        "zero_optimization.stage",
        is_no_partition,
        MASTER,
        "1, 2 or 3",
        "at stage 0 DeepSpeed has no switch for masters of bf16",
        "set 1, or remove optimizer.master",
    ),
    Refusal(
        "bf16.enabled",
        is_off,
        MASTER,
        "true",
        "a master of few bits is a bf16 weight and what it lacks",
        "set it, or remove optimizer.master",
        alias="bfloat16.enabled",
    ),
    Refusal(
        "zero_optimization.stage",
        is_not_two,
        RELEASE,
        "2",
        "stage 1 reduces gradients when all are there, stage 3 steps them when all are reduced, and stage 0 has no "
        "masters of few bits",
        "set 2, which works with one process too, or remove release_gradients",
    ),
    Refusal(
        "gradient_clipping",
        is_not_zero,
        RELEASE,
        "0, written out",
        "the norm of all gradients is not known yet when the first ones are stepped, and DeepSpeed clips to 1 where "
        "nothing is written",
        "set 0, or remove release_gradients",
    ),
    Refusal(
        "gradient_accumulation_steps",
        is_above_one,
        RELEASE,
        "1",
        "gradients of several micro steps are added up before the step",
        "set 1, or remove release_gradients",
    ),
    Refusal(
        "managed_gradient_accumulation",
        is_false,
        RELEASE,
        "true",
        "gradients of several backwards may be added up before a step",
        "remove it, or release_gradients",
    ),
    Refusal(
        "bf16.check_grad_overflow",
        is_not_false,
        RELEASE,
        "false",
        "its check comes when gradients have been stepped, so that no step can be skipped for Inf or NaN",
        "set false (Inf and NaN then go into the weights), or remove release_gradients",
        alias="bfloat16.check_grad_overflow",
    ),
    Refusal(
        "zero_optimization.contiguous_gradients",
        is_false,
        RELEASE,
        "true",
        "without it DeepSpeed keeps the gradients until the backward ends",
        "remove it, or release_gradients",
    ),
    Refusal(
        "optimizer.type",
        is_muon,
        RELEASE,
        "others",
        "Muon's updates are made of whole matrices, and of all of them at the end of the backward",
        "take AdamW, Lion, SGD or AdEMAMix, or remove release_gradients",
    ),
    Refusal(
        "data_types.grad_accum_dtype",
        is_not_bf16,
        MASTER,
        '"bf16"',
        "with others DeepSpeed keeps fp32 masters",
        "remove it, or optimizer.master",
    ),
    Refusal(
        "zero_optimization.offload_optimizer.device",
        is_elsewhere,
        MASTER,
        '"none"',
        "DeepSpeed offloads masters of bf16 with its own CPU optimizer only",
        "remove it, or optimizer.master",
    ),
    Refusal(
        "zero_optimization.offload_param.device",
        is_elsewhere,
        MASTER,
        '"none"',
        "the masters share the memory of the weights, which would not be where the step is done",
        "remove it, or optimizer.master",
    ),
)
