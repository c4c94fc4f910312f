"""AdEMAMix (arXiv 2409.03137, algorithm 1), a rule for `elementwise`:

    grad          = clamp(grad, -2^63, 2^63) + 0 * grad
    exp_avg_fast  = beta1 * exp_avg_fast + (1 - beta1) * grad
    exp_avg_slow  = beta3 * exp_avg_slow + (1 - beta3) * grad
    exp_avg_sq    = beta2 * exp_avg_sq   + (1 - beta2) * (grad * grad)
    update        = (exp_avg_fast * fast + alpha * exp_avg_slow) / (sqrt(exp_avg_sq) * correction + eps)
    param         = param * decay - lr * update

    fast = 1 / (1 - beta1^step)     correction = 1 / sqrt(1 - beta2^step)     decay = 1 - lr * weight_decay

alpha and beta3 grow to their values over the first t_alpha and t_beta3 steps: alpha by equal amounts, beta3 so that its
half-life does. The first line is that of `adam`, and for the same reason.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ds_quant.numerics.adam import LARGEST_GRADIENT
from ds_quant.numerics.integer import nearest_sqrt


class AdEMAMixScalars(NamedTuple):
    """What a step needs beside tensors, as Python floats; rounded to fp32 where they meet a tensor."""

    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    decay: float
    lr: float
    fast: float
    correction: float


def ademamix_scalars(
    lr: float,
    betas: Sequence[float],
    alpha: float,
    t_alpha: int | None,
    t_beta3: int | None,
    eps: float,
    weight_decay: float,
    step: int,
) -> AdEMAMixScalars:
    """The scalars of step number `step`, from 1."""
    beta1, beta2, beta3 = betas
    if t_alpha:
        alpha *= min(step / t_alpha, 1.0)
    if t_beta3 and step < t_beta3:
        beta3 = _warming(beta1, beta3, step / t_beta3)
    correction = 1 / math.sqrt(1 - beta2**step)
    return AdEMAMixScalars(
        beta1, beta2, beta3, alpha, eps, 1 - lr * weight_decay, lr, 1 / (1 - beta1**step), correction
    )


def _warming(start: float, end: float, share: float) -> float:
    """beta3 at this share of its warm-up: between the half-lives of `start` and `end`."""
    if not 0 < start < end:
        return min(start, end)
    first, last = math.log(start), math.log(end)
    return min(math.exp(first * last / ((1 - share) * last + share * first)), end)


def ademamix_rule(
    param: Tensor, grad: Tensor, states: Sequence[Tensor], scalars: AdEMAMixScalars
) -> tuple[Tensor, list[Tensor]]:
    """(param, [exp_avg_fast, exp_avg_slow, exp_avg_sq]) after the step."""
    fast, slow, square = states
    # An Inf times 0 is a NaN.
    grad = grad.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT) + grad * 0.0
    fast = fast * scalars.beta1 + grad * (1 - scalars.beta1)
    slow = slow * scalars.beta3 + grad * (1 - scalars.beta3)
    square = square * scalars.beta2 + grad.square() * (1 - scalars.beta2)
    update = (fast * scalars.fast + slow * scalars.alpha) / (nearest_sqrt(square) * scalars.correction + scalars.eps)
    return param * scalars.decay - update * scalars.lr, [fast, slow, square]
