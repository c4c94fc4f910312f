"""How steps of optimizers under torch.compile are given tensors: flat and without views, states by their layouts."""

from torch import Tensor

from ds_quant.numerics.blockwise import QuantizedBlocks
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.stored_states import State

Layout = tuple[CodeMap, int] | None
"""Code map and block size of a state; None for 32 bits."""


def layout(state: State) -> Layout:
    return None if isinstance(state, Tensor) else (state.code_map, state.block_size)


def storage(state: State) -> tuple[Tensor, Tensor | None]:
    """(codes, scales), or (the fp32 state, None)."""
    return (flat(state), None) if isinstance(state, Tensor) else (flat(state.codes), flat(state.scale))


def assembled(codes: Tensor, scale: Tensor | None, how: Layout, numel: int) -> State:
    """The state of what `storage` gives."""
    if how is None:
        return codes
    assert scale is not None
    return QuantizedBlocks(codes, scale, numel, how[1], how[0])


def flat(tensor: Tensor) -> Tensor:
    """Not a view, for torch.compile would guard the sizes of what a view is of. Versions are the caller's business."""
    return tensor.view(-1).data


def unbind(row: Tensor) -> tuple[Tensor, ...]:
    """Its elements. As vectors they would have lengths, which torch.compile takes to be those of other tensors."""
    return tuple(element.data for element in row.unbind())
