"""Muon's momentum in few bits under ZeRO: plain where DeepSpeed orthogonalizes, codes and scales between steps.

DeepSpeed computes updates in four places, each of which reads and writes `state[partition]["momentum_buffer"]`:

    stages 1 and 2              at the end of the backward, into a copy that the step commits
    the same with offloading    in the step, of a whole partition
    bf16 with fp32 gradients    the same (BF16_Optimizer)
    stage 3                     in the step, one sub-group after the other

The methods here give it plain tensors there, and quantize what it made of them, once a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from ds_quant.engine.checkpoints import stepped_tensors
from ds_quant.engine.engine_class import MixedIn, mix_in
from ds_quant.engine.seams import check_live
from ds_quant.optim.muon import MOMENTUM, QuantMuon


class _PlainMuon(MuonWithAuxAdam):
    """DeepSpeed's class without what its constructor adds: groups are made already, and AdamW is done by ds_quant."""

    aux_optimizer = None

    def __init__(self, param_groups: Any, defaults: dict[str, Any]):
        torch.optim.Optimizer.__init__(self, param_groups, defaults)


class ZeroMuon(QuantMuon, _PlainMuon):
    """QuantMuon as one of DeepSpeed's Muons: ZeRO looks at the class to give it whole matrices."""


ZERO_SUPPORTED_OPTIMIZERS.append(ZeroMuon)  # which compares exact types


def keep_momentum(engine: Any) -> None:
    """Have the ZeRO optimizer of a live engine keep Muon's momentum in few bits. Masters must be in their place."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if engine.zero_optimization_stage() == 3:
        check_live((wrapper, name) for name in ("sub_group_to_group_id", "communication_data_type"))
        mix_in(wrapper, _Stage3)
    elif hasattr(wrapper, "bf16_groups"):
        mix_in(wrapper, _BF16)
    else:
        names = ("params_in_partition", "all_grad_tensors", "_muon_pending_momentum", "cpu_offload")
        check_live((wrapper, name) for name in names)
        mix_in(wrapper, _Stage1And2)
        if not wrapper.cpu_offload:
            for number, group in enumerate(optimizer.param_groups):
                numel = sum(param.numel() for param in wrapper.params_in_partition[number])
                optimizer.momentum_numel[group["params"][0]] = numel
    for group, partition in stepped_tensors(engine):
        if _is_quantized(group):
            optimizer.begin_momentum(group, partition)


def _is_quantized(group: dict[str, Any]) -> bool:
    """Whether it is a group of Muon's whose momentum is stored in few bits."""
    return group["use_muon"] and group[MOMENTUM] is not None


class _Plain:
    """Momentums of partitions that are plain tensors in the optimizer's state for now."""

    def __init__(self, optimizer: QuantMuon):
        self._optimizer = optimizer
        self._stored: list[tuple[dict[str, Any], Tensor, Tensor]] = []

    def open(self, group: dict[str, Any], partition: Tensor, dtype: torch.dtype) -> None:
        """Have the momentum of `partition` be a plain tensor of `dtype`, if it is stored in few bits."""
        if _is_quantized(group):
            values = self._optimizer.momentum(group, partition, dtype)
            state = self._optimizer.state[partition]
            self._stored.append((group, partition, state[MOMENTUM]))
            state[MOMENTUM] = values

    def close(self, *, failed: bool = False) -> None:
        """Quantize what is plain now; where the step has `failed`, leave momentums as they were."""
        for group, partition, stored in self._stored:
            state = self._optimizer.state[partition]
            values, state[MOMENTUM] = state[MOMENTUM], stored
            if not failed:
                self._optimizer.put_momentum(group, partition, values)
        self._stored.clear()


@contextmanager
def _plain(optimizer: QuantMuon) -> Iterator[_Plain]:
    """Context in which momentums are opened, and at the end of which they are closed."""
    momentums, failed = _Plain(optimizer), True
    try:
        yield momentums
        failed = False
    finally:
        momentums.close(failed=failed)


@contextmanager
def _all_plain(optimizer: QuantMuon) -> Iterator[None]:
    """`_plain`, with the momentum of each group's one partition opened, in the partition's dtype."""
    with _plain(optimizer) as momentums:
        for group in optimizer.param_groups:
            (partition,) = group["params"]
            momentums.open(group, partition, partition.dtype)
        yield


class _Stage1And2(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer."""

    def _muon_momentum_buffer(
        self, tensor_list: Sequence[Tensor], param_group_idx: int, dtype: Any, device: Any
    ) -> Any:
        group = self.optimizer.param_groups[param_group_idx]
        if _is_quantized(group):
            return None  # its callers do not look at it
        return super()._muon_momentum_buffer(tensor_list, param_group_idx, dtype, device)

    def _muon_staging_momentum(self, flatten_copy: Tensor, param_group_idx: int) -> Tensor:
        optimizer = self.optimizer
        group = optimizer.param_groups[param_group_idx]
        if not _is_quantized(group):
            staged: Tensor = super()._muon_staging_momentum(flatten_copy, param_group_idx)
            return staged
        gradients = self.all_grad_tensors[param_group_idx]
        staged = optimizer.momentum(group, flatten_copy, gradients[0].dtype)
        self._muon_pending_momentum[param_group_idx] = (staged, flatten_copy)
        return staged

    def _commit_muon_momentum(self) -> None:
        pending, optimizer = self._muon_pending_momentum, self.optimizer
        for number, group in enumerate(optimizer.param_groups):
            if _is_quantized(group) and number in pending:
                staged, partition = pending.pop(number)  # so that nothing of full size stays
                optimizer.put_momentum(group, partition, staged)
        super()._commit_muon_momentum()

    def _apply_muon_updates_cpu_offload(self) -> None:
        with _all_plain(self.optimizer):
            super()._apply_muon_updates_cpu_offload()


class _BF16(MixedIn):
    """Mixed into the class of a live BF16_Optimizer."""

    def _prepare_muon_updates(self) -> None:
        with _all_plain(self.optimizer):
            super()._prepare_muon_updates()


class _Stage3(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer_Stage3."""

    def _apply_muon_to_accumulated_grads(self) -> None:
        with _plain(self.optimizer) as momentums:
            self._ds_quant_momentums, self._ds_quant_opened = momentums, -1
            if self.offload_optimizer:
                for number in range(len(self.fp16_groups)):
                    self._ds_quant_open(number)
            super()._apply_muon_to_accumulated_grads()

    def _muon_update_sub_group(self, i: int, group_items: Any, communication_data_type: torch.dtype) -> None:
        if i != self._ds_quant_opened:  # a sub-group may come in several parts, one after the other
            self._ds_quant_momentums.close()
            self._ds_quant_open(i)
            self._ds_quant_opened = i
        super()._muon_update_sub_group(i, group_items, communication_data_type)

    def _ds_quant_open(self, sub_group: int) -> None:
        number = self.sub_group_to_group_id[sub_group]
        group = self.optimizer.param_groups[number]
        partition = self.fp32_partitioned_groups_flat[sub_group]
        self._ds_quant_momentums.open(group, partition, self.communication_data_type)
