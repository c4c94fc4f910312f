"""Lion (arXiv 2302.06675, algorithm 2), a rule for `elementwise`:

    direction  = beta1 * exp_avg + (1 - beta1) * grad
    param      = param * decay - lr * sign(direction)                      decay = 1 - lr * weight_decay
    exp_avg    = beta2 * exp_avg + (1 - beta2) * grad

An Inf or a NaN in the gradient becomes a NaN in the moment and in the parameter.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LionScalars(NamedTuple):
    """What a step needs beside tensors, as Python floats; rounded to fp32 where they meet a tensor."""

    beta1: float
    beta2: float
    decay: float
    lr: float


def lion_scalars(lr: float, betas: Sequence[float], weight_decay: float) -> LionScalars:
    """The scalars of any step."""
    beta1, beta2 = betas
    return LionScalars(beta1, beta2, 1 - lr * weight_decay, lr)


def lion_rule(
    param: Tensor, grad: Tensor, states: Sequence[Tensor], scalars: LionScalars
) -> tuple[Tensor, list[Tensor]]:
    """(param, [exp_avg]) after the step."""
    (exp_avg,) = states
    grad = grad + grad * 0.0  # an Inf is a NaN from here on
    direction = exp_avg * scalars.beta1 + grad * (1 - scalars.beta1)
    # torch has 0 for the sign of a NaN, which would leave no trace in the parameter.
    sign = direction.sign() + direction * 0.0
    return param * scalars.decay - sign * scalars.lr, [exp_avg * scalars.beta2 + grad * (1 - scalars.beta2)]
