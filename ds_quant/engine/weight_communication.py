"""Quantized gathers of updated weights in a live engine at stages 1 and 2, and whole weights for whoever reads them.

After a step each rank holds its own partition as it is, and of the others what layers compute the same with (see
`comm.weight_codes`); or all ranks hold a replica that is near to the owners' weights (`comm.weight_difference`). Nobody
else may read that: before weights leave the job, the partitions are gathered as they are,
by all ranks in calls that all ranks make. Calls that one rank may make by itself would wait for the others for ever:
they are refused until the weights are whole.
"""

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.log import say
from ds_quant.comm.agreement import check_agreement, raise_together
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.hierarchy import check_nodes, make_nodes, ranks_per_node
from ds_quant.comm.message_gather import GroupOfNodes
from ds_quant.comm.weight_difference import WHOLE_EVERY, DifferenceGather, describe_weights, rounding_of, wire_format
from ds_quant.comm.weight_gather import WeightGather
from ds_quant.comm.weight_layout import Weight, build
from ds_quant.config import WeightCommunicationConfig
from ds_quant.engine.coded_weights import check_any_coded, coded_weights, tell_codes
from ds_quant.engine.engine_class import MixedIn, mix_in
from ds_quant.engine.multiplied_weights import MultipliedWeights, UpdatedCodes
from ds_quant.engine.parts import Loading
from ds_quant.engine.rank_files import REPLICAS, read_tensors, save_tensors
from ds_quant.engine.reduction import replaced
from ds_quant.engine.replicas import Replicas
from ds_quant.engine.seams import check_live
from ds_quant.engine.steps import seed_of_first_rank
from ds_quant.engine.weight_guards import CodedWeights, Guard
from ds_quant.engine.weight_part import WeightPart
from ds_quant.linear.weight_codes import weights_changed
from ds_quant.numerics.random import fold_words

STREAM = 0x77656967
"""Sets the random bits of weights on the wire apart from others."""


class GatheredStage1And2(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer."""

    ds_quant_weights: "WeightCommunication"

    def step(self, closure: Any = None) -> Any:
        self.ds_quant_weights.before_update()
        with replaced(stage_1_and_2, "all_gather_dp_groups", self.ds_quant_weights.gather_updated):
            return super().step(closure)


def gather_whole_of(parameters: Iterable[Any]) -> None:
    """Make the weights whole of the engines that train these Parameters. All ranks call it, with the same ones.

    Engines are found by the Parameters: which others still live may differ between ranks.
    """
    for parameter in parameters:
        part = getattr(parameter, "ds_quant_weights", None)
        if part is not None and part() is not None:
            part().gather_whole()


class WeightCommunication(WeightPart):
    """Has a live engine gather its updated weights by `config`. All ranks make it.

    Raises:
        ConfigError: there is nothing to gather in few bits, DeepSpeed chose an optimizer that gathers otherwise,
            `hierarchical` does not fit the ranks, or these differ in config or model.
        ImportError: the live engine or its wrapper lacks what is used here.
    """

    def __init__(self, engine: Any, config: WeightCommunicationConfig) -> None:
        super().__init__(engine, config)
        wrapper = engine.optimizer
        if not hasattr(wrapper, "ipg_buckets"):
            raise fail(
                "ds_quant.communication.weight",
                type(wrapper).__name__,
                "ZeRO stage 1 or 2 with DeepSpeedZeroOptimizer",
                "remove data_types.grad_accum_dtype, or communication.weight",
            )
        _check_live(engine)
        self._weights = CodedWeights()
        self._wrapper: Any = weakref.proxy(wrapper)
        groups = _groups(engine, config)
        sizes = [flat.numel() for flat in wrapper.bit16_groups_flat]
        device = torch.device(engine.device)
        node_size = 0
        if config.hierarchical:  # a launcher that tells some ranks alone of their nodes is found by all
            found: list[int] = []
            raise_together(lambda: found.append(_node_size(config, wrapper.real_dp_process_group)), device)
            (node_size,) = found
        description = [config.model_dump(), node_size, sizes, groups]  # what all layouts are made of
        check_agreement("ds_quant.communication.weight", description, dist.get_world_group(), device)
        self._seed = seed_of_first_rank(engine, torch.initial_seed())
        self._replicas: Replicas | None = None
        self._loaded: dict[str, Tensor] = {}
        self._gathers: list[Any] = self._make_gathers(groups, node_size)
        multiplied = MultipliedWeights(engine.module)
        parameters_of = [[p for p in parameters if p.numel()] for parameters in wrapper.round_robin_bit16_groups]
        self._updated = [
            UpdatedCodes(multiplied, zip(group, parameters, strict=True))
            for group, parameters in zip(groups, parameters_of, strict=True)
        ]
        self._is_updated = False
        """The codes of a step have come, and layers do not have them yet."""
        if config.mode == "difference":
            self._replicas = Replicas(wrapper)
        sent = {
            id(parameter)
            for parameters, group in zip(parameters_of, groups, strict=True)
            for parameter, weight in zip(parameters, group, strict=True)
            if weight.coding or self._replicas
        }
        for module in engine.module.modules():
            if any(id(parameter) in sent for parameter in module.parameters(recurse=False)):
                module.register_state_dict_pre_hook(Guard(self._weights))
        for parameters in wrapper.bit16_groups:
            for parameter in parameters:
                parameter.ds_quant_weights = weakref.ref(self)
        wrapper.ds_quant_weights = self
        mix_in(wrapper, GatheredStage1And2)
        engine.ds_quant_weight_communication = self
        _tell(config, [weight for group in groups for weight in group])

    def _make_gathers(self, groups: Sequence[Sequence[Weight]], node_size: int) -> list[Any]:
        buffers, wrapper = Buffers(), self._wrapper
        ranks: dict[Any, GroupOfNodes] = {}
        made: list[Any] = []
        for group, flat, process_group in zip(
            groups, wrapper.bit16_groups_flat, wrapper.real_dp_process_group, strict=True
        ):
            if process_group not in ranks:
                alone = not node_size or dist.get_world_size(process_group) == 1
                nodes = None if alone else make_nodes(process_group, node_size)
                ranks[process_group] = GroupOfNodes(process_group, nodes)
            members = ranks[process_group]
            if self.config.mode == "difference":
                fmt = wire_format(self.config)
                made.append(DifferenceGather(group, flat.numel(), fmt, members, buffers, self.statistics))
            else:
                layout = build(group, flat.numel(), members.world_size, flat.element_size())
                made.append(WeightGather(layout, members, buffers, self.statistics))
        return made

    # ---- a step

    def before_update(self) -> None:
        """DeepSpeed's optimizer is about to take a step, and to write the own partitions."""
        if self._replicas:
            self._restore()
            self._replicas.keep_own()

    def gather_updated(self, groups_flat: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """What DeepSpeed's `all_gather_dp_groups` does, in few bits."""
        if self._replicas and self.engine.global_steps % (self.config.whole_every or WHOLE_EVERY) == 0:
            self._gather_partitions()
            for gather, flat in zip(self._gathers, groups_flat, strict=True):
                numel = flat.numel() // gather.world_size * (gather.world_size - 1)
                self.statistics.count(numel * flat.element_size(), numel, flat.element_size())
            self._weights.whole = True
            return
        for number, (gather, flat) in enumerate(zip(self._gathers, groups_flat, strict=True)):
            self._weights.whole &= gather.world_size == 1  # before, should it fail half-way
            if self._replicas:
                master = self._wrapper.single_partition_of_fp32_groups[number]
                gather.gather(flat, master, self._replicas.own(number), self._key(gather.rank, number))
            else:
                received = self._updated[number].make_room(flat) if gather.world_size > 1 else []
                gather.gather(flat, received)
        self._is_updated = self._replicas is None

    def after_writing(self) -> None:
        if self._is_updated:
            self._is_updated = False
            for updated in self._updated:
                updated.hand_over()

    def _key(self, rank: int, group: int) -> Any:
        if rounding_of(self.config) == "nearest":
            return None
        return fold_words(self._seed, self.engine.global_steps, 0, rank + 1, STREAM << 32 | group)

    # ---- whole weights

    def before_reading(self) -> None:
        self.gather_whole()

    def gather_whole(self) -> None:
        """Gather the partitions as their owners have them, unless that is done already. All ranks call it."""
        if self._weights.whole:
            return
        if self._replicas:
            self._replicas.put_by()
        self._gather_partitions()
        self._weights.whole = True
        weights_changed()

    def before_forward(self, *, trains: bool) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._replicas and self._replicas.restore():
            self._weights.whole = False
            weights_changed()

    def _gather_partitions(self) -> None:
        wrapper = self._wrapper
        all_gather_dp_groups(
            groups_flat=wrapper.bit16_groups_flat,
            partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )

    # ---- checkpoints

    def before_save(self, folder: Path) -> None:
        if self._replicas:
            save_tensors(self.engine, folder, REPLICAS, self._replicas.state_dict())

    def before_load(self, loading: Loading) -> None:
        self.gather_whole()  # what a checkpoint leaves as it is stays whole, and what it writes is
        self._loaded = {}
        if self._replicas and not loading.load_module_only:
            # A file that is broken is found before anything is changed.
            self._loaded = read_tensors(self.engine, loading.load_dir, loading.tag, REPLICAS)

    def after_load(self, loading: Loading, path: str | None) -> None:
        loaded, self._loaded = self._loaded, {}
        if self._replicas and path is not None:
            self._replicas.load(loaded)


def _node_size(config: WeightCommunicationConfig, groups: Iterable[Any]) -> int:
    """Ranks in a node that messages travel between, of a hierarchical config; 0: no group has two ranks."""
    sizes = {dist.get_world_size(group) for group in groups} - {1}
    if not sizes:
        return 0
    where = "ds_quant.communication.weight.hierarchical"
    found = ranks_per_node(config.hierarchical, where)
    for size in sorted(sizes):
        check_nodes(size, found, where)
    return found


def _groups(engine: Any, config: WeightCommunicationConfig) -> list[list[Weight]]:
    """The weights of each flat group, in the order in which they lie there."""
    wrapper = engine.optimizer
    codings = coded_weights(engine.module) if config.mode == "codes" else {}
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = [
        [
            Weight(names[id(parameter)], offset, tuple(parameter.shape), codings.get(id(parameter)))
            for parameter, offset in zip(parameters, offsets, strict=True)
            if parameter.numel()
        ]
        for parameters, offsets in zip(wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True)
    ]
    check_any_coded(config, [weight for group in groups for weight in group])
    return groups


def _check_live(engine: Any) -> None:
    """Raise ImportError for what is read off a live wrapper, and has moved."""
    names = ["bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups", "real_dp_process_group"]
    names += ["round_robin_bit16_groups", "round_robin_bit16_offsets", "nccl_start_alignment_factor"]
    names += ["single_partition_of_fp32_groups", "allgather_bucket_size"]
    check_live([(engine.optimizer, name) for name in names])


def _tell(config: WeightCommunicationConfig, weights: Sequence[Weight]) -> None:
    if config.mode == "codes":
        tell_codes(config, weights, "trainable elements")
    else:
        every = config.whole_every or WHOLE_EVERY
        say(f"weights cross the wire as {describe_weights(config)}; whole at the first step and every {every} steps")
    if dist.get_world_size() == 1:
        say("there is one rank: no weights cross a wire")
