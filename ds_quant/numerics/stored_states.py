"""States of optimizers as they are stored: fp32 tensors, or codes and scales (`blockwise`)."""

from torch import Tensor

from ds_quant.numerics.blockwise import QuantizedBlocks, dequantize_blockwise, quantize_blockwise

State = Tensor | QuantizedBlocks
"""An fp32 tensor, or codes and scales."""


def load(state: State) -> Tensor:
    """The fp32 values of a state."""
    return state if isinstance(state, Tensor) else dequantize_blockwise(state)


def store(value: Tensor, like: State, key: Tensor | None, offset: int | Tensor = 0) -> State:
    """`value`, fp32 [numel], in the format of `like`.

    A key (see `fold_key`) rounds it stochastically; without one it is rounded to nearest. `offset` is the number of its
    first element where it is a part of a parameter.
    """
    if isinstance(like, Tensor):
        return value
    rounding = "nearest" if key is None else "stochastic"
    return quantize_blockwise(
        value, like.code_map, block_size=like.block_size, rounding=rounding, key=key, offset=offset
    )


def part(state: State, begin: int, end: int) -> State:
    """Elements `begin` to `end` - 1, whole blocks but for the last one of the state, sharing storage."""
    if isinstance(state, Tensor):
        return state.view(-1)[begin:end]
    return state.block_range(begin // state.block_size, -(-end // state.block_size))


def overwrite(old: State, new: State) -> None:
    """Put the values of `new` into the storage of `old`, of the same format and number of elements."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        old.copy_(new.view(old.shape))
    elif isinstance(old, QuantizedBlocks) and isinstance(new, QuantizedBlocks):
        overwrite(old.codes, new.codes)
        overwrite(old.scale, new.scale)
