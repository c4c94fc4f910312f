"""Attaching quantized gradient communication to a live engine, and its part in steps and checkpoints."""

import os
from typing import Any

import torch
from deepspeed import comm as dist

from ds_quant.base.log import say, warn
from ds_quant.comm.agreement import raise_together
from ds_quant.comm.reducer import bytes_an_element, describe_wire
from ds_quant.config import GradientCommunicationConfig
from ds_quant.engine import reduction
from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.gradients import GradientCommunication
from ds_quant.engine.micro_steps import count_micro_steps
from ds_quant.engine.reduction import (
    QuantizedReductionEngine,
    QuantizedReductionStage1And2,
    QuantizedReductionStage3,
)
from ds_quant.engine.residual_files import read_residuals, save_residuals
from ds_quant.engine.seams import check_live


class _GradientCommunicationEngine:
    """Mixed into the class of a live engine: ends steps, and keeps residuals in checkpoints."""

    ds_quant_gradients: GradientCommunication

    def step(self, *args: Any, **kwargs: Any) -> Any:
        engine: Any = self
        is_whole = engine.is_gradient_accumulation_boundary()
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        if is_whole:
            engine.ds_quant_gradients.end_step(was_applied=engine.was_step_applied())
            engine.ds_quant_gradients.write_events()
        return result

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        engine: Any = self
        feedback = engine.ds_quant_gradients.feedback
        if feedback is not None and save_dir:
            tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            # Before DeepSpeed writes `latest`: what that names is whole.
            raise_together(lambda: save_residuals(engine, os.path.join(save_dir, tag)), engine.device)
        client_state = {} if client_state is None else client_state
        return super().save_checkpoint(  # type: ignore[misc]
            save_dir, tag, client_state, save_latest, exclude_frozen_parameters
        )

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        engine: Any = self
        feedback = engine.ds_quant_gradients.feedback
        residuals: dict[str, Any] = {}
        if feedback is not None and not load_module_only:
            # Read first: a file that is broken is found before anything is changed.
            residuals = read_residuals(engine, load_dir, tag)
        result = super().load_checkpoint(  # type: ignore[misc]
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        if feedback is not None and result[0] is not None:
            feedback.reset()
            if not load_module_only:
                feedback.load_state_dict(residuals, engine.device)
        return result


def attach_communication(engine: Any, config: GradientCommunicationConfig) -> None:
    """Have the live engine reduce its gradients by `config`. All ranks call it.

    Raises:
        ConfigError: the ranks differ in config or model, or `hierarchical` does not fit them.
        ImportError: the live engine or its wrapper lacks what is used here.
    """
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    _check_live(engine)
    count_micro_steps(engine)
    gradients = GradientCommunication(engine, config, may_skip_steps=_may_skip_steps(engine))
    gradients.check_agreement([stage, type(wrapper).__name__, _partitions(wrapper)])
    engine.ds_quant_gradients = gradients
    mix_in(engine, _GradientCommunicationEngine)
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
