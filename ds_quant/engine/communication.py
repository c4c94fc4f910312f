"""Quantized gradient communication in a live engine: what reduces, the ends of steps, residuals in checkpoints."""

from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ds_quant.base.log import say, warn
from ds_quant.comm.reducer import bytes_an_element, describe_wire
from ds_quant.config import GradientCommunicationConfig
from ds_quant.engine import reduction
from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.gradients import GradientCommunication
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.rank_files import RESIDUALS, read_tensors, save_tensors
from ds_quant.engine.reduction import (
    QuantizedReductionEngine,
    QuantizedReductionStage1And2,
    QuantizedReductionStage3,
)
from ds_quant.engine.seams import check_live


class Communication(Part):
    """Has a live engine reduce its gradients by `config`, and keeps residuals in its checkpoints. All ranks make it.

    Raises:
        ConfigError: the ranks differ in config or model, or `hierarchical` does not fit them.
        ImportError: the live engine or its wrapper lacks what is used here.
    """

    def __init__(self, engine: Any, config: GradientCommunicationConfig) -> None:
        super().__init__(engine)
        stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
        _check_live(engine)
        gradients = GradientCommunication(engine, config, may_skip_steps=_may_skip_steps(engine))
        gradients.check_agreement([stage, type(wrapper).__name__, _partitions(wrapper)])
        self._gradients = engine.ds_quant_gradients = gradients
        self._loaded_residuals: dict[str, Any] = {}
        if stage == 3:
            wrapper.ds_quant_gradients = gradients
            mix_in(wrapper, QuantizedReductionStage3)
        elif hasattr(wrapper, "ipg_buckets"):
            wrapper.ds_quant_gradients = gradients
            mix_in(wrapper, QuantizedReductionStage1And2)
        else:
            mix_in(engine, QuantizedReductionEngine)
        for group in _groups(engine):
            gradients.reducer(group)  # ranks that do not fill whole nodes are told now, not in the first backward
        _tell(engine, gradients)

    def after_step(self, *, is_whole: bool) -> None:
        if is_whole:
            self._gradients.end_step(was_applied=self.engine.was_step_applied())
            self._gradients.write_events()

    def before_save(self, folder: Path) -> None:
        if self._gradients.feedback is not None:
            save_tensors(self.engine, folder, RESIDUALS, self._gradients.feedback.state_dict())

    def before_load(self, loading: Loading) -> None:
        self._loaded_residuals = {}
        if self._gradients.feedback is not None and not loading.load_module_only:
            # A file that is broken is found before anything is changed.
            self._loaded_residuals = read_tensors(self.engine, loading.load_dir, loading.tag, RESIDUALS)

    def after_load(self, loading: Loading, path: str | None) -> None:
        feedback, residuals = self._gradients.feedback, self._loaded_residuals
        self._loaded_residuals = {}
        if feedback is not None and path is not None:
            feedback.reset()
            if not loading.load_module_only:
                feedback.load_state_dict(residuals, self.engine.device)


def _may_skip_steps(engine: Any) -> bool:
    """Whether DeepSpeed may throw gradients away after they were reduced."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return True  # for a norm that is not finite, whatever the dtype
    if hasattr(wrapper, "ipg_buckets"):
        return bool(wrapper.check_grad_overflow) or wrapper.dtype != torch.bfloat16  # which has its norm looked at
    return hasattr(wrapper, "overflow_checker")


def _groups(engine: Any) -> list[Any]:
    """The process groups that gradients are reduced over."""
    wrapper = engine.optimizer
    found = [getattr(wrapper, "dp_process_group", None) or engine.seq_data_parallel_group]
    if engine.has_moe_layers:
        found += engine.expert_data_parallel_group.values()
    return found


def _partitions(wrapper: Any) -> list[int]:
    """How stages 1 and 2 cut the parameters."""
    return [int(size) for size in getattr(wrapper, "partition_size", [])]


def _check_live(engine: Any) -> None:
    """Raise ImportError for what is read off a live engine or its wrapper, and has moved."""
    wrapper = engine.optimizer
    engine_names = ("global_steps", "global_samples", "monitor", "has_moe_layers", "device")
    expected = [(engine, name) for name in (*engine_names, "seq_data_parallel_group", "expert_data_parallel_group")]
    if hasattr(wrapper, "get_grads_for_reduction"):
        expected += [(wrapper, name) for name in ("fp32_groups_gradients", "bf16_groups")]
    elif engine.zero_optimization():
        names = ["ipg_buckets", "dp_process_group", "reduce_scatter"]
        if engine.zero_optimization_stage() < 3:
            names += ["bit16_groups", "partition_size", "contiguous_gradients", "overlap_comm"]
            names += ["check_grad_overflow", "dtype", "sequence_parallel_size"]
            names += ["gradient_average"] if reduction.CAN_SUM else []
        expected += [(wrapper, name) for name in names]
    check_live(expected)


def _tell(engine: Any, gradients: GradientCommunication) -> None:
    config, stage = gradients.config, engine.zero_optimization_stage()
    size = bytes_an_element(config)
    say(f"gradients cross the wire in {describe_wire(config)}: {size:.3f} bytes an element instead of 4 or 2")
    if dist.get_world_size() == 1:
        say("there is one rank: nothing crosses a wire")
    accumulation = engine.gradient_accumulation_steps()
    if stage >= 2 and accumulation > 1:
        warn(
            f"ZeRO stage {stage} reduces gradients in each of the {accumulation} micro steps of a step: {accumulation} "
            "times the bytes and the quantization errors of stage 1, which reduces once a step; use "
            '"zero_optimization": {"stage": 1} if the model fits'
        )
    if gradients.feedback is not None:
        share = 4 if gradients.feedback.transactional else 2
        size = share * _num_quantized(engine, gradients)
        say(f"error feedback takes {size / 2**20:.1f} MiB on every rank, {share} bytes an element that it quantizes")


def _num_quantized(engine: Any, gradients: GradientCommunication) -> float:
    """Elements that a rank quantizes of each gradient, give or take the padding of partitions."""
    wrapper, shared, total = engine.optimizer, _groups(engine)[0], 0.0
    scatters = hasattr(wrapper, "ipg_buckets") and wrapper.reduce_scatter
    if engine.zero_optimization_stage() < 3 and scatters:
        scatters = wrapper.contiguous_gradients
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        is_expert = not getattr(parameter, "allreduce", True)
        group = engine.expert_data_parallel_group[parameter.group_name] if is_expert else shared
        reducer = gradients.reducer(group)
        inside = reducer.nodes.size if reducer.nodes else 1
        senders = reducer.world_size // inside
        share = (senders - 1) / senders if scatters or senders == 1 else 1.0
        total += getattr(parameter, "ds_numel", parameter.numel()) * share / inside
    return total
