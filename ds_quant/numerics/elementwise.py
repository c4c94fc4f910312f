"""A step of an optimizer that treats each element by itself, its states stored in 32, 8 or 4 bits.

What an optimizer computes is a rule (`lion`, `sgd`, `ademamix`): a function of fp32 tensors. Here its states are
decoded before it and coded after it (`blockwise`). The update uses the new states before they are quantized. In fp32,
each operation rounded to nearest and nothing fused; a bf16 or fp16 parameter is rounded once, at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ds_quant.numerics.stored_states import State, load, store

Rule = Callable[[Tensor, Tensor, Sequence[Tensor], Any], tuple[Tensor, list[Tensor]]]
"""(param, grad, states, scalars) to (param, states) after the step; all tensors fp32 [numel], none written to."""


def elementwise_step(
    rule: Rule,
    param: Tensor,
    grad: Tensor,
    states: Sequence[State],
    scalars: Any,
    keys: Sequence[Tensor | None],
    offset: int | Tensor = 0,
) -> tuple[Tensor, list[State]]:
    """(param, states) after the step, new tensors in the dtypes and layouts of the arguments.

    `param` and `grad` are fp32, bf16 or fp16 of shape [numel]. A key (see `fold_key`) has that state stored with
    stochastic rounding; without one it is rounded to nearest. `offset` is the number of the first element where these
    are a part of a parameter, whole blocks: the result is then that part of the whole one's.
    """
    updated, fresh = rule(param.float(), grad.float(), [load(state) for state in states], scalars)
    stored = [store(value, like, key, offset) for value, like, key in zip(fresh, states, keys, strict=True)]
    return updated.to(param.dtype), stored
