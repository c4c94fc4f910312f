"""What all ranks hold of the weights in mode `difference`, while whole weights stand in its place."""

import weakref
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor


class Replicas:
    """The replicas of a wrapper's flat groups. They lie in the groups themselves, except from `put_by` to `restore`."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper: Any = weakref.proxy(wrapper)
        self._own: list[Tensor] = []
        self._put_by: list[Tensor] | None = None

    def own(self, number: int) -> Tensor:
        """The replica of the own partition of a group, as it was before the step."""
        return self._own[number]

    def keep_own(self) -> None:
        """Remember the own partitions, which the step is about to write over."""
        own = self._partitions(self._wrapper.bit16_groups_flat)
        if [kept.shape for kept in self._own] != [partition.shape for partition in own]:
            self._own = [torch.empty_like(partition) for partition in own]
        for kept, partition in zip(self._own, own, strict=True):
            kept.copy_(partition)

    @torch.no_grad()
    def put_by(self) -> None:
        """Remember all of them, and write the owners' weights into the own partitions."""
        wrapper = self._wrapper
        self._put_by = [flat.clone() for flat in wrapper.bit16_groups_flat]
        own = self._partitions(wrapper.bit16_groups_flat)
        for partition, master in zip(own, wrapper.single_partition_of_fp32_groups, strict=True):
            partition.copy_(master)

    @torch.no_grad()
    def restore(self) -> bool:
        """Put them back where whole weights stand in their place; whether that was so."""
        if self._put_by is None:
            return False
        for flat, replica in zip(self._wrapper.bit16_groups_flat, self._put_by, strict=True):
            flat.copy_(replica)
        self._put_by = None
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The own partitions, for a checkpoint; nothing where whole weights are the replica."""
        if self._put_by is None:
            return {}
        return {str(number): part.contiguous() for number, part in enumerate(self._partitions(self._put_by))}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint, whose whole weights are loaded. All ranks call it, all or none with a state."""
        self._put_by = None
        if not state:
            return
        wrapper = self._wrapper
        flats = [torch.zeros_like(flat) for flat in wrapper.bit16_groups_flat]
        for number, part in enumerate(self._partitions(flats)):
            part.copy_(state[str(number)])
        ranks = [dist.get_world_size(group) for group in wrapper.real_dp_process_group]
        all_gather_dp_groups(
            groups_flat=flats,
            partitioned_param_groups=[list(flat.chunk(count)) for flat, count in zip(flats, ranks, strict=True)],
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )
        self._put_by = flats

    def _partitions(self, flats: list[Tensor]) -> list[Tensor]:
        """The own partition of each group."""
        found = []
        for flat, group in zip(flats, self._wrapper.real_dp_process_group, strict=True):
            found.append(flat.chunk(dist.get_world_size(group))[dist.get_rank(group)])
        return found
