"""What the collectives of a step put on the wire.

A collective's bytes are those of the bandwidth-optimal ring that NCCL and gloo use for large messages; with n bytes in
the tensor that is reduced or the result that is gathered, and W ranks, each rank sends

    all-reduce 2 n (W - 1) / W      all-gather, reduce-scatter n (W - 1) / W      others n

and an all-to-all sends each rank its part, which is no formula. Rings go through the nodes one after the other, so of a
node's ranks one sends to another node.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch import distributed as torch_dist
from torch.utils._pytree import tree_iter


class Collective(NamedTuple):
    """One call of one rank."""

    phase: str
    """forward, backward or step."""
    operation: str
    dtype: str
    sent: int
    """Bytes that this rank sends."""
    ranks: tuple[int, ...]
    """Of the group, by their numbers in the job."""
    splits: tuple[int, ...] = ()
    """Bytes for each rank of the group, of an all-to-all."""

    def leaves_node(self, rank: int, node_size: int) -> float:
        """Bytes that the node of `rank` sends to other nodes in this call and its like of the node's other ranks."""
        node = rank // node_size
        inside = [other for other in self.ranks if other // node_size == node]
        groups = node_size / len(inside)  # the node's other ranks are in groups of their own
        if self.splits:
            far = sum(size for other, size in zip(self.ranks, self.splits, strict=True) if other // node_size != node)
            return far * len(inside) * groups
        following = dict(zip(self.ranks, (*self.ranks[1:], self.ranks[0]), strict=True))
        return self.sent * sum(following[other] // node_size != node for other in inside) * groups


_NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "send": "send",
}
_SILENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_")
"""These send nothing."""


def collective(func: Any, args: Sequence[Any], phase: str) -> Collective | None:
    """What an operator of torch.distributed sends; None for those that carry no tensors, and in groups of one.

    Raises NotImplementedError for one that is not known.
    """
    name = func._schema.name.removeprefix("c10d::")
    if name in _SILENT:
        return None
    if name not in _NAMES:
        raise NotImplementedError(f"ds_quant.planning: the bytes of the collective {name} are not known")
    group = next(unboxed for value in args if (unboxed := _group(value)) is not None)
    ranks = tuple(torch_dist.get_process_group_ranks(group))
    world_size = len(ranks)
    if world_size == 1:
        return None
    lists = [[t for t in tree_iter(value) if isinstance(t, Tensor)] for value in args]
    tensors = [found for found in lists if found]
    operation = _NAMES[name]
    dtype = str(tensors[-1][0].dtype).removeprefix("torch.")
    splits: tuple[int, ...] = ()
    if operation == "all-to-all":
        source = tensors[1]
        if name == "alltoall_":
            sizes = [tensor.nbytes for tensor in source]
        else:
            rows = list(args[4]) or [source[0].shape[0] // world_size] * world_size
            row = source[0].nbytes // source[0].shape[0] if source[0].shape[0] else 0
            sizes = [count * row for count in rows]
        own = ranks.index(torch_dist.get_rank())
        splits = tuple(0 if number == own else size for number, size in enumerate(sizes))
        sent = sum(splits)
    elif operation == "all-gather":
        sent = sum(tensor.nbytes for tensor in tensors[1]) * (world_size - 1)
    elif operation == "reduce-scatter":
        sent = sum(tensor.nbytes for tensor in tensors[0]) * (world_size - 1)
    elif operation == "all-reduce":
        sent = 2 * sum(tensor.nbytes for tensor in tensors[0]) * (world_size - 1) // world_size
    else:
        sent = sum(tensor.nbytes for tensor in tensors[-1])
    return Collective(phase, operation, dtype, sent, ranks, splits)


def _group(value: Any) -> torch_dist.ProcessGroup | None:
    try:
        return torch_dist.ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):
        return None


def totals(collectives: Iterable[Collective], rank: int, node_size: int) -> list[dict[str, Any]]:
    """A row for each phase, operation, dtype and size of group: calls, sent bytes, and bytes that leave the node."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in collectives:
        key = (one.phase, one.operation, one.dtype, len(one.ranks))
        names = ("phase", "operation", "dtype", "ranks")
        row = rows.setdefault(key, {**dict(zip(names, key, strict=True)), "calls": 0, "sent_bytes": 0, "node_bytes": 0})
        row["calls"] += 1
        row["sent_bytes"] += one.sent
        row["node_bytes"] += one.leaves_node(rank, node_size)
    for row in rows.values():
        row["node_bytes"] = math.ceil(row["node_bytes"])
    return list(rows.values())
