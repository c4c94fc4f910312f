"""Which layers of a model belong to the first and to the last of its blocks.

A stack is an nn.ModuleList or nn.Sequential with two children or more that hold linear layers, and lies inside of no
other stack: an encoder and a decoder are two. Its blocks are these children, in their order.
"""

import math
from collections.abc import Iterable, Iterator

from torch import nn

from ds_quant.base.errors import fail
from ds_quant.config.linear import ExcludeBlocksConfig


def in_end_blocks(model: nn.Module, linears: Iterable[str], ends: ExcludeBlocksConfig) -> set[str]:
    """Those of `linears`, by name, that lie in the first and last share of the blocks of a stack, rounded up.

    Raises:
        ConfigError: no stack, or one of which nothing is left.
    """
    names = list(linears)
    found: set[str] = set()
    stacks = list(_stacks(model, names))
    if not stacks:
        raise fail(
            ends.where,
            ends.model_dump(),
            "with a model that has repeated blocks (an nn.ModuleList or nn.Sequential)",
            "name the layers by patterns, in exclude",
        )
    for stack, blocks in stacks:
        first, last = (count_of(share, len(blocks)) for share in (ends.first, ends.last))
        if first + last >= len(blocks):
            allowed = f"shares that leave one of the {len(blocks)} blocks of {stack!r}"
            raise fail(ends.where, ends.model_dump(), allowed, "lower them")
        for block in (*blocks[:first], *blocks[len(blocks) - last :]):
            found.update(name for name in names if _is_in(name, block))
    return found


def count_of(share: float, blocks: int) -> int:
    """So many of them are at least that share: the smallest number, where shares are decimals."""
    return math.ceil(round(share * blocks, 9))


def _stacks(model: nn.Module, linears: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(its name, the names of its blocks)."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(_is_in(name, other) for other in outer):
            continue
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        blocks = [child for child in children if any(_is_in(linear, child) for linear in linears)]
        if len(blocks) > 1:
            outer.append(name)
            yield name, blocks


def _is_in(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(owner + ".")
