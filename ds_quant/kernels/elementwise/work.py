"""What a step is asked to do: one entry for each parameter."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ds_quant.numerics.elementwise import Rule
from ds_quant.numerics.stored_states import State


class ElementwiseWork(NamedTuple):
    """One parameter of one step. `param` and `states` are written in place, `grad` is left alone.

    All tensors are contiguous and on one device; shapes are free, elements are taken in memory order. 32-bit states
    are fp32 tensors.
    """

    rule: Rule
    param: Tensor
    grad: Tensor
    states: Sequence[State]
    scalars: Any
    """What the rule takes."""
    keys: Sequence[tuple[int, int] | None]
    """One a state: of stochastic rounding, before its subkey is derived; None: nearest."""
    stream: int
    """Names the parameter: state number i of n draws with derive_key(key, n * stream + i)."""
