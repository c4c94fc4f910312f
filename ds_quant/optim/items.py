"""What optimizers are given to do in one step: parameters, and parts of masters of few bits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ds_quant.numerics.random import derive_words
from ds_quant.numerics.stored_states import State
from ds_quant.numerics.stored_states import part as part_of
from ds_quant.optim.master import MasterTensor

PART_STREAM, MASTER_STREAM = 1 << 62, 1 << 61
"""Of the keys of parts of masters, and of the rounding of masters: apart from the streams of states, which count up."""


class Item(NamedTuple):
    """One parameter of one step. All tensors are contiguous; `param` and `states` are written in place."""

    param: Tensor
    grad: Tensor
    states: list[State]
    """In the order of STATES: fp32 of the parameter's shape, or codes and scales."""
    keys: list[tuple[int, int] | None]
    """One a state: of stochastic rounding, before its subkey is derived; None rounds to nearest."""
    stream: int
    """Names the parameter. State number i draws with derive_key(key, i + stream * the number of states)."""
    step: int
    """Number of this step, from 1."""
    options: Any
    """What `group_options` made of the parameter's group."""


class MasterItem(NamedTuple):
    """A part of masters of few bits in one step. `item.param` and `low_bits` are written in place."""

    item: Item
    """Its `param` are the weights, bf16."""
    low_bits: Tensor | None
    """int8, what 24-bit masters have beside their weights; None for masters of 16 bits."""
    key: tuple[int, int] | None
    """Of the rounding of the new masters, with no subkey to derive; None rounds to nearest."""


def master_items(masters: MasterTensor, item: Item, key: tuple[int, int]) -> Iterator[MasterItem]:
    """The parts of masters, each as an item of a step that `item` describes as a whole; `key` is the step's."""
    for number, (begin, end, _, _) in enumerate(masters.parts()):
        yield master_item(masters, number, item, item.grad.view(-1)[begin:end], key)


def master_item(masters: MasterTensor, number: int, item: Item, grad: Tensor, key: tuple[int, int]) -> MasterItem:
    """Part `number` of masters, whose gradient is `grad`, of the step that `item` describes as a whole.

    A part draws random bits as a parameter of its own would: part number i has the subkey PART_STREAM + i.
    """
    begin, end, weight, low_bits = masters.part(number)
    own = [None if drawn is None else derive_words(drawn, PART_STREAM + number) for drawn in item.keys]
    states = [part_of(state, begin, end) for state in item.states]
    rounding = None
    if masters.is_stochastic:
        rounding = derive_words(derive_words(key, PART_STREAM + number), MASTER_STREAM + item.stream)
    return MasterItem(item._replace(param=weight, grad=grad, states=states, keys=own), low_bits, rounding)
