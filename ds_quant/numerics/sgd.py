"""SGD with momentum, as torch.optim.SGD has it, a rule for `elementwise`:

grad             = grad + weight_decay * param
momentum_buffer  = momentum * momentum_buffer + kept * grad            kept = 1 - dampening, in the first step 1
param            = param - lr * momentum_buffer
                   param - lr * (grad + momentum * momentum_buffer)    with nesterov
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class SGDScalars(NamedTuple):
    """What a step needs beside tensors, as Python floats; rounded to fp32 where they meet a tensor."""

    momentum: float
    kept: float
    weight_decay: float
    lr: float
    from_grad: float
    """Shares of the gradient and of the buffer in the update: 0 and 1, or 1 and momentum with nesterov."""
    from_buffer: float


def sgd_scalars(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, step: int
) -> SGDScalars:
    """The scalars of step number `step`, from 1."""
    shares = (1.0, momentum) if nesterov else (0.0, 1.0)
    return SGDScalars(momentum, 1.0 if step == 1 else 1 - dampening, weight_decay, lr, *shares)


def sgd_rule(param: Tensor, grad: Tensor, states: Sequence[Tensor], scalars: SGDScalars) -> tuple[Tensor, list[Tensor]]:
    """(param, [momentum_buffer]) after the step."""
    (old,) = states
    grad = grad + param * scalars.weight_decay
    buffer = old * scalars.momentum + grad * scalars.kept
    update = grad * scalars.from_grad + buffer * scalars.from_buffer
    return param - update * scalars.lr, [buffer]
