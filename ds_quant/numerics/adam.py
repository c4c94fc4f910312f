"""One AdamW step of one parameter whose moments are stored in 32, 8 or 4 bits: the definition that kernels repeat.

In fp32, each operation rounded to nearest and nothing fused, with scalars computed in double and rounded once:

    grad        = clamp(grad, -2^63, 2^63) + 0 * grad
    exp_avg     = beta1 * exp_avg    + (1 - beta1) * grad
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * (grad * grad)
    denominator = sqrt(exp_avg_sq) * correction + eps          correction = 1 / sqrt(1 - beta2^step)
    param       = param * decay - step_size * (exp_avg / denominator)
                                                               decay = 1 - lr * weight_decay
                                                               step_size = lr / (1 - beta1^step)

This is AdamW (arXiv 1711.05101, algorithm 2) as torch computes it. The first line changes no gradient below 9.2e18, and
keeps the moments of larger finite ones finite: the square of 1.9e19 would overflow, and a block with one Inf is lost as
a whole. As both moments get the same number, the update stays of the size of lr. An Inf or a NaN becomes a NaN in both
moments and in the parameter. The update uses the new moments before they are
quantized; what is stored is quantized after it (`blockwise`). A bf16 or fp16 parameter is rounded once, at the end.
"""

import math
from typing import NamedTuple

from torch import Tensor

from ds_quant.numerics.integer import nearest_sqrt
from ds_quant.numerics.stored_states import State, load, store

LARGEST_GRADIENT = 2.0**63
"""Larger finite gradients count as this, whose square is below the largest fp32 number whatever moments add up."""

Moment = State
"""A moment as it is stored: an fp32 tensor [numel], or codes and scales."""


class AdamWScalars(NamedTuple):
    """What a step needs beside tensors, as Python floats; rounded to fp32 where they meet a tensor."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    step_size: float
    correction: float


def adamw_scalars(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> AdamWScalars:
    """The scalars of step number `step`, from 1."""
    beta1, beta2 = betas
    step_size = lr / (1 - beta1**step)
    return AdamWScalars(beta1, beta2, eps, 1 - lr * weight_decay, step_size, 1 / math.sqrt(1 - beta2**step))


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Moment,
    exp_avg_sq: Moment,
    scalars: AdamWScalars,
    exp_avg_key: Tensor | None = None,
    exp_avg_sq_key: Tensor | None = None,
) -> tuple[Tensor, Moment, Moment]:
    """(param, exp_avg, exp_avg_sq) after the step, new tensors in the dtypes and layouts of the arguments.

    `param` and `grad` are fp32, bf16 or fp16 of shape [numel]. A key (see `fold_key`) has that moment stored with
    stochastic rounding; without one it is rounded to nearest.
    """
    grad = _limited(grad.float())
    first = load(exp_avg) * scalars.beta1 + grad * (1 - scalars.beta1)
    second = load(exp_avg_sq) * scalars.beta2 + grad.square() * (1 - scalars.beta2)
    denominator = nearest_sqrt(second) * scalars.correction + scalars.eps
    updated = param.float() * scalars.decay - (first / denominator) * scalars.step_size
    return (
        updated.to(param.dtype),
        store(first, exp_avg, exp_avg_key),
        store(second, exp_avg_sq, exp_avg_sq_key),
    )


def _limited(grad: Tensor) -> Tensor:
    # An Inf times 0 is a NaN; to finite numbers the product adds a zero of their own sign, which keeps -0 too.
    return grad.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT) + grad * 0.0
