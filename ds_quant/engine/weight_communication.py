"""Quantized gathers of updated weights in a live engine at stages 1 and 2, and whole weights for whoever reads them.

After a step each rank holds its own partition as it is, and of the others what layers compute the same with (see
`comm.weight_codes`). Nothing else may read that: before weights leave the job, the partitions are gathered as they are,
by all ranks in calls that all ranks make. Calls that one rank may make by itself would wait for the others for ever:
they are refused until the weights are whole.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.base.log import say
from ds_quant.comm.agreement import check_agreement
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.statistics import Statistics, Traffic
from ds_quant.comm.weight_gather import WeightGather
from ds_quant.comm.weight_layout import Weight, build
from ds_quant.config import WeightCommunicationConfig
from ds_quant.engine.coded_weights import coded_weights
from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.reduction import replaced
from ds_quant.engine.seams import check_live

_REMEDY = "call engine.gather_weights() on all ranks before this"


class CodedWeights:
    """Whether the weights of an engine are whole on this rank."""

    def __init__(self) -> None:
        self.whole = True

    def check(self, what: str) -> None:
        """Raise RuntimeError unless they are."""
        if not self.whole:
            raise RuntimeError(
                f"{what}: got weights of which this rank holds parts in few bits (ds_quant.communication.weight); "
                f"allowed: whole weights; fix: {_REMEDY}"
            )


class _Guard:
    """A hook of a layer that is called before its `state_dict`, and is copied with it."""

    def __init__(self, weights: CodedWeights | None) -> None:
        self._weights = weights

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.check("state_dict()")

    def __deepcopy__(self, memo: dict) -> "_Guard":
        self.check("copy.deepcopy()")
        return _Guard(None)  # a copy has weights of its own

    def check(self, what: str) -> None:
        if self._weights is not None:
            self._weights.check(what)


def check_whole(model: nn.Module) -> None:
    """Raise RuntimeError where a model still holds weights that an engine before has sent in few bits."""
    for module in model.modules():
        for hook in module._state_dict_pre_hooks.values():
            if isinstance(hook, _Guard):
                hook.check("initialize(model)")


class GatheredStage1And2:
    """Mixed into the class of a live DeepSpeedZeroOptimizer."""

    ds_quant_weights: "WeightCommunication"

    def step(self, closure: Any = None) -> Any:
        with replaced(stage_1_and_2, "all_gather_dp_groups", self.ds_quant_weights.gather_updated):
            return super().step(closure)  # type: ignore[misc]


_live: "weakref.WeakSet[WeightCommunication]" = weakref.WeakSet()


def gather_all() -> None:
    """Make the weights of all engines of this process whole. All ranks call it."""
    for part in list(_live):
        part.gather_whole()


class WeightCommunication(Part):
    """Has a live engine gather its updated weights by `config`. All ranks make it.

    Raises:
        ConfigError: there is nothing to gather in few bits, DeepSpeed chose an optimizer that gathers otherwise, or the
            ranks differ in config or model.
        ImportError: the live engine or its wrapper lacks what is used here.
    """

    def __init__(self, engine: Any, config: WeightCommunicationConfig) -> None:
        super().__init__(engine)
        wrapper = engine.optimizer
        if not hasattr(wrapper, "ipg_buckets"):
            raise fail(
                "ds_quant.communication.weight",
                type(wrapper).__name__,
                "ZeRO stage 1 or 2 with DeepSpeedZeroOptimizer",
                "remove data_types.grad_accum_dtype, or communication.weight",
            )
        _check_live(engine)
        self.config = config
        self.statistics = Statistics(with_errors=False)
        self.last_step = self.total = Traffic(0, 0, 0.0, 0.0)
        self.num_steps = 0
        self._weights = CodedWeights()
        self._wrapper: Any = weakref.proxy(wrapper)
        self._buffers = Buffers()
        codings = coded_weights(engine.module)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        groups = [
            [
                Weight(names[id(parameter)], offset, tuple(parameter.shape), codings.get(id(parameter)))
                for parameter, offset in zip(parameters, offsets, strict=True)
                if parameter.numel()
            ]
            for parameters, offsets in zip(
                wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True
            )
        ]
        if not any(weight.coding for group in groups for weight in group):
            raise fail(
                "ds_quant.communication.weight.mode",
                config.mode,
                "a model with trained weights that only quantized layers read",
                "see ds_quant.linear.include and exclude, or remove it: all weights would be sent whole",
            )
        sizes = [flat.numel() for flat in wrapper.bit16_groups_flat]
        description = [config.model_dump(), sizes, groups]  # what all layouts are made of
        device = torch.device(engine.device)
        check_agreement("ds_quant.communication.weight", description, dist.get_world_group(), device)
        self._gathers = [
            WeightGather(
                build(group, flat.numel(), dist.get_world_size(process_group), flat.element_size()),
                process_group,
                self._buffers,
                self.statistics,
            )
            for group, flat, process_group in zip(
                groups, wrapper.bit16_groups_flat, wrapper.real_dp_process_group, strict=True
            )
        ]
        coded = {id(p) for group in wrapper.bit16_groups for p in group if id(p) in codings}
        for module in engine.module.modules():
            if any(id(parameter) in coded for parameter in module.parameters(recurse=False)):
                module.register_state_dict_pre_hook(_Guard(self._weights))
        wrapper.ds_quant_weights = self
        mix_in(wrapper, GatheredStage1And2)
        engine.ds_quant_weight_communication = self
        _live.add(self)
        _tell([weight for group in groups for weight in group])

    def gather_updated(self, groups_flat: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """What DeepSpeed's `all_gather_dp_groups` does, in few bits."""
        for gather, flat in zip(self._gathers, groups_flat, strict=True):
            gather.gather(flat)
            self._weights.whole &= gather.world_size == 1

    def before_reading(self) -> None:
        self.gather_whole()

    def before_load(self, loading: Loading) -> None:
        self.gather_whole()  # what a checkpoint leaves as it is stays whole, and what it writes is

    def gather_whole(self) -> None:
        """Gather the partitions as they are, unless that is done already. All ranks call it."""
        if self._weights.whole:
            return
        wrapper = self._wrapper
        stage_1_and_2.all_gather_dp_groups(
            groups_flat=wrapper.bit16_groups_flat,
            partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )
        self._weights.whole = True

    def after_step(self, *, is_whole: bool) -> None:
        if is_whole:
            self.last_step = self.statistics.take()
            self.total = self.total.plus(self.last_step)
            self.num_steps += 1
            if self.engine.monitor.enabled and self.last_step.sent_bytes:
                event = ("Train/ds_quant/weight_wire_bytes", self.last_step.sent_bytes, self.engine.global_samples)
                self.engine.monitor.write_events([event])


def _check_live(engine: Any) -> None:
    """Raise ImportError for what is read off a live wrapper, and has moved."""
    names = ["bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups", "real_dp_process_group"]
    names += ["round_robin_bit16_groups", "round_robin_bit16_offsets", "nccl_start_alignment_factor"]
    check_live([(engine.optimizer, name) for name in (*names, "allgather_bucket_size")])


def _tell(weights: Sequence[Weight]) -> None:
    def numel(of: Iterable[Weight]) -> int:
        return sum(torch.Size(weight.shape).numel() for weight in of)

    share = 100 * numel(weight for weight in weights if weight.coding) / numel(weights)
    bits = sorted({weight.coding.bits for weight in weights if weight.coding})
    whole = [weight.name for weight in weights if weight.coding is None and len(weight.shape) > 1]
    say(
        f"weights cross the wire as the codes that layers compute with, in {' and '.join(map(str, bits))} bits: "
        f"{share:.1f}% of the trainable elements"
    )
    if whole:
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        say(f"in their dtype, since not only quantized layers read them: {', '.join(whole[:3])}{more}")
    if dist.get_world_size() == 1:
        say("there is one rank: no weights cross a wire")
