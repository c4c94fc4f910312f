"""The collectives underneath: deepspeed.comm's where DeepSpeed runs, for its comms logger to count, else torch's.

DeepSpeed is not imported for it: where it runs, somebody has.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as torch_dist

Group = Any
"""A torch.distributed.ProcessGroup."""


def _module() -> Any:
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        return deepspeed_comm
    return torch_dist


def resolve(group: Group | None) -> Group:
    """The group itself, the world's for None. Raises RuntimeError where torch.distributed is not initialised."""
    if not torch_dist.is_initialized():
        raise RuntimeError(
            "ds_quant.comm: got no process group; allowed: torch.distributed initialised; call "
            "torch.distributed.init_process_group() or deepspeed.init_distributed() first"
        )
    return torch_dist.group.WORLD if group is None else group


def is_destroyed(group: Group) -> bool:
    try:
        torch_dist.get_process_group_ranks(group)
    except KeyError:
        return True
    return False


def all_to_all(output: Tensor, message: Tensor, output_splits: list[int], splits: list[int], group: Group) -> Any:
    """Start it; returns a work to wait for, None where that is over already."""
    if _sends_by_itself(group):
        return _exchange(message.split(splits), output.split(output_splits), group)
    return _module().all_to_all_single(output, message, output_splits, splits, group=group, async_op=True)


def all_gather(output: Tensor, message: Tensor, group: Group) -> Any:
    """Start it; `message` may be the own part of `output`. Returns a work, None where that is over already."""
    if _sends_by_itself(group):
        world_size = torch_dist.get_world_size(group)
        slots = output.view(world_size, -1).unbind()
        own = slots[torch_dist.get_rank(group)]
        if own.data_ptr() != message.data_ptr():
            own.copy_(message)
        return _exchange([message] * world_size, slots, group)
    return _module().all_gather_into_tensor(output, message, group=group, async_op=True)


def all_gather_uneven(slots: list[Tensor], message: Tensor, group: Group) -> Any:
    """Start it: `message` of each rank, of any size, into its slot; that of this rank is `message` itself.

    Returns a work, None where that is over already.
    """
    if _sends_by_itself(group):
        return _exchange([message] * len(slots), slots, group)
    if torch_dist.get_backend(group) == "gloo":  # which knows equal slots only
        size = max(slot.numel() for slot in slots)
        own = message.new_zeros(size)
        own[: message.numel()] = message
        found = message.new_empty(len(slots) * size)
        _module().all_gather_into_tensor(found, own, group=group)
        for slot, part in zip(slots, found.split(size), strict=True):
            slot.copy_(part[: slot.numel()])
        return None
    return _module().all_gather(slots, message, group=group, async_op=True)


def all_reduce_max(values: Tensor, group: Group) -> None:
    """The largest of each element over the ranks, in place; no NaN."""
    _module().all_reduce(values, op=torch_dist.ReduceOp.MAX, group=group)


IN_FLIGHT = 2**22
"""Bytes of a message that are sent at once."""


def _sends_by_itself(group: Group) -> bool:
    """Whether messages go by sends and receives of parts instead of gloo's collectives, which take turns in sending and
    receiving and use half of a link. Not where DeepSpeed's comms logger is to see collectives."""
    if torch_dist.get_backend(group) != "gloo":
        return False
    module = _module()
    return module is torch_dist or not module.comms_logger.enabled


class _Works:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Group) -> _Works:
    """Send each rank its entry of `sent` and receive the others' into theirs of `received`; the own ones stay."""
    rank, world_size = torch_dist.get_rank(group), torch_dist.get_world_size(group)
    works = []
    # Rank r begins with rank r + 1: nobody is sent to by all at once.
    for distance in range(1, world_size):
        sender = (rank - distance) % world_size
        works += [torch_dist.irecv(part, group=group, group_src=sender) for part in _parts(received[sender])]
    for distance in range(1, world_size):
        to = (rank + distance) % world_size
        works += [torch_dist.isend(part, group=group, group_dst=to) for part in _parts(sent[to])]
    return _Works(works)


def _parts(message: Tensor) -> Sequence[Tensor]:
    """What is sent at once; nothing of an empty message."""
    return message.split(IN_FLIGHT) if message.numel() else ()


def reduce_scatter(output: Tensor, values: Tensor, group: Group) -> None:
    """Sums, in the tensors' dtype."""
    _module().reduce_scatter_tensor(output, values, op=torch_dist.ReduceOp.SUM, group=group)


def gather_bytes(content: bytes, group: Group, device: torch.device) -> list[bytes]:
    """`content` of every rank; the same length everywhere."""
    own = torch.tensor(list(content), dtype=torch.uint8, device=device)
    world_size = torch_dist.get_world_size(group)
    found = own.new_empty(world_size * own.numel())
    torch_dist.all_gather_into_tensor(found, own, group=group)
    return [bytes(row) for row in found.reshape(world_size, -1).tolist()]


def gather_objects(content: Any, group: Group) -> list[Any]:
    found: list[Any] = [None] * torch_dist.get_world_size(group)
    torch_dist.all_gather_object(found, content, group=group)
    return found
