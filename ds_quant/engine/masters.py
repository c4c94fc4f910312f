"""Masters of 24 or 16 bits in a live engine, in place of ZeRO's fp32 ones.

DeepSpeed is told that masters and gradients are bf16, by its own switches (`in_json`), and makes a copy of the weights
for the optimizer. `Masters` puts a `MasterTensor` in its place, whose weights are the model's own memory. A parameter
then takes 2 bytes of weight, 2 of gradient, and 1 or 0 of what the weight lacks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.config import MasterConfig
from ds_quant.engine.engine_class import MixedIn, mix_in
from ds_quant.engine.parts import Part
from ds_quant.engine.seams import check_live
from ds_quant.optim.master import MasterTensor

_WHERE = "ds_quant.optimizer.master"


def in_json(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with DeepSpeed's switches for masters and gradients of bf16."""
    name = "bf16" if "bf16" in raw else "bfloat16"
    # The second switch is what lets DeepSpeed have the first one without offloading; the moments are not its business.
    return {**raw, name: {**raw[name], "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


class GradientsInPlace(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer: reduced gradients lie where the step reads them.

    DeepSpeed adds them to one buffer of the partition where they are accumulated in fp32. Those of bf16 it keeps apart,
    and copies them into such a buffer for the step, when there are two of each.
    """

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        partition = self.params_in_partition[group_idx]
        return not (partition and self._is_muon_group(partition))

    def copy_grads_in_partition(self, param: Any, group_idx: int) -> None:
        super().copy_grads_in_partition(param, group_idx)
        if self._use_compact_grad_partition_buffer(group_idx):
            param.grad = None  # it has been added to the buffer


class Masters(Part):
    """Puts masters of few bits into an engine. Made before the other parts, which see the tensors of the optimizer."""

    def __init__(self, engine: Any, config: MasterConfig) -> None:
        super().__init__(engine)
        self._config = config
        wrapper = engine.optimizer
        if engine.zero_optimization_stage() == 3:
            check_live([(wrapper, "fp16_partitioned_groups_flat"), (wrapper, "fp32_partitioned_groups_flat")])
            pairs = zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True)
            wrapper.fp32_partitioned_groups_flat[:] = [self._master(weight, old) for weight, old in pairs]
            wrapper.master_weights_and_grads_dtype = torch.float32  # of what safe_get_full_fp32_param gathers
        else:
            own = ("parallel_partitioned_bit16_groups", "single_partition_of_fp32_groups", "real_dp_process_group")
            check_live([(wrapper, name) for name in (*own, "_link_all_hp_params")])
            partitions = wrapper.single_partition_of_fp32_groups
            for number, group in enumerate(engine.basic_optimizer.param_groups):
                rank = dist.get_rank(group=wrapper.real_dp_process_group[number])
                weight = wrapper.parallel_partitioned_bit16_groups[number][rank]
                partitions[number] = self._master(weight, partitions[number])
                group["params"] = [partitions[number]]
            wrapper._link_all_hp_params()  # safe_get_full_fp32_param reads them
            if hasattr(wrapper, "_use_compact_grad_partition_buffer"):  # since 0.19.8
                check_live([(wrapper, "params_in_partition")])
                mix_in(wrapper, GradientsInPlace)
        engine.basic_optimizer.state.clear()  # nothing has been stepped; what is there has the old tensors as keys

    def _master(self, weight: Tensor, old: Tensor) -> MasterTensor:
        config = self._config
        low_bits = torch.zeros(weight.numel(), dtype=torch.int8, device=weight.device) if config.bits == 24 else None
        made = MasterTensor(weight.detach(), low_bits, is_stochastic=config.rounding == "stochastic")
        if hasattr(old, "ds_id"):
            made.ds_id = old.ds_id  # type: ignore[attr-defined]
        made.requires_grad = True
        return made

    def before_offload(self, states: Sequence[OffloadStateTypeEnum]) -> None:
        moved = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.lp_params} & set(states)
        if moved:
            raise fail(
                "offload_states(include)",
                f"{', '.join(sorted(state.name for state in moved))} with {_WHERE}",
                "optim_states, lp_grads, contiguous_grad_buffer: masters and weights share their memory",
                "leave them out of include",
            )
