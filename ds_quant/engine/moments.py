"""Quantized moments in a live engine: loading, offloading, and the links of safe_get_full_optimizer_state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

from ds_quant.base.errors import ConfigError, fail
from ds_quant.comm.agreement import raise_together
from ds_quant.engine.checkpoints import check_checkpoint, moment_files, stepped_tensors
from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.seams import check_live
from ds_quant.optim import MOMENTS, QuantAdamW


class _QuantizedMomentsEngine:
    """Mixed into the class of a live engine: moments survive loading and offloading with their bits."""

    ds_quant_moments_linked: bool

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        if not self.ds_quant_moments_linked:
            # DeepSpeed links them after the step of the first parameter group, when the others have none.
            self.ds_quant_moments_linked = _link_moments(self)
        return result

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
        with_moments = load_optimizer_states and not load_module_only
        files = moment_files(engine, load_dir, tag) if with_moments else []
        check_checkpoint(engine, files)
        own = [dict(group) for group in engine.basic_optimizer.param_groups]
        with _every_group_loaded(engine, own):
            result = super().load_checkpoint(  # type: ignore[misc]
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        # Universal checkpoints bring the options of the groups that they were saved with, in their order (at stage 3
        # those of the first group, for all), and this run may have split its groups. How moments are stored and what
        # decays is this run's business.
        kept = (*MOMENTS, "weight_decay") if engine.load_universal_checkpoint() else MOMENTS
        for group, options in zip(engine.basic_optimizer.param_groups, own, strict=True):
            group.update({name: options[name] for name in kept})
        if with_moments and result[0] is not None:
            raise_together(lambda: _mend(engine, files), engine.device)
            self.ds_quant_moments_linked = _link_moments(engine)
        return result

    def offload_states(
        self,
        include: Any = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        engine: Any = self
        wanted = {OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params}
        if engine.zero_optimization_stage() == 3 and (include is None or wanted & set(include)):
            raise fail(
                "offload_states(include)",
                "optim_states or hp_params at ZeRO stage 3 with ds_quant.optimizer",
                "stages 1 and 2, since DeepSpeed takes its own FusedAdam only at stage 3",
                "leave them out of include, or use zero_optimization.stage 2",
            )
        moments = OffloadStateTypeEnum.optim_states
        if pin_memory and (include is None or moments in include):
            # DeepSpeed's pinned buffers are fp32: four times the codes, and the codes would be lost.
            super().offload_states([moments], device, False, non_blocking)  # type: ignore[misc]
            include = [state for state in (OffloadStateTypeEnum if include is None else include) if state != moments]
            if not include:
                return
        super().offload_states(include, device, pin_memory, non_blocking)  # type: ignore[misc]

    def reload_states(self, non_blocking: bool = False) -> None:
        super().reload_states(non_blocking)  # type: ignore[misc]
        _link_moments(self)  # DeepSpeed cuts the links when it offloads, and replaces the moments


def attach_moments(engine: Any) -> None:
    """Make the live engine keep its promise on the moments.

    Raises:
        ConfigError: the engine's optimizer is no QuantAdamW.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, QuantAdamW):
        raise fail(
            "ds_quant.optimizer",
            f"an engine with {type(optimizer).__qualname__}",
            "QuantAdamW",
            "another library has replaced the optimizer: remove it, or remove ds_quant.optimizer",
        )
    _check_live(engine)
    group = getattr(engine.optimizer, "dp_process_group", None)
    if group is not None:
        # ZeRO's partitions differ from rank to rank; without it the state is replicated and draws the same bits.
        optimizer.rank = 1 + dist.get_rank(group=group)
    engine.ds_quant_moments_linked = False
    mix_in(engine, _QuantizedMomentsEngine)


def _check_live(engine: Any) -> None:
    """Raise ImportError for what is read off a live engine or its wrapper, and has moved."""
    expected = [(engine, "has_moe_layers"), (engine, "param_names")]
    if engine.zero_optimization():
        stage_3 = engine.zero_optimization_stage() == 3
        own = ("fp32_partitioned_groups_flat", "sub_group_to_group_id") if stage_3 else ("_hp_optimizer_states_linked",)
        expected += [(engine.optimizer, name) for name in (*own, "dp_process_group", "partition_count")]
    check_live(expected)


@contextmanager
def _every_group_loaded(engine: Any, own: list[dict[str, Any]]) -> Iterator[None]:
    """While it lasts, universal checkpoints load into all groups of stages 1 and 2, however many were saved.

    DeepSpeed goes through the saved groups and this run's in pairs, and leaves the weights and moments of groups that
    have no partner as they were: those of `exclude`, where a run without it was saved.
    """
    wrapper = engine.optimizer
    if not engine.load_universal_checkpoint() or not hasattr(wrapper, "_hp_optimizer_states_linked"):
        yield
        return
    original = wrapper._load_global_state

    def load_global_state(saved: dict[str, Any]) -> None:
        original(saved)
        if len(saved["param_groups"]) != len(own):
            saved["param_groups"] = [_partner(options, saved["param_groups"]) for options in own]

    wrapper._load_global_state = load_global_state
    try:
        yield
    finally:
        del wrapper._load_global_state


def _partner(options: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved group that a group of this run was probably part of, with this run's own options but the lr."""
    found = next((group for group in saved if group.get("weight_decay") == options["weight_decay"]), saved[0])
    return {**found, **options, "lr": found["lr"]}


def _mend(engine: Any, files: list[str]) -> None:
    """Quantize what was loaded, and free what it was loaded as.

    Raises:
        ConfigError: moments that are not this model's; names the file.
    """
    optimizer, tensors = engine.basic_optimizer, stepped_tensors(engine)
    for _, param in tensors:
        state = optimizer.state.get(param)
        if state and isinstance(state.get("step"), torch.Tensor):
            # Stage 3 loads one tensor for all sub-groups from universal checkpoints, and each would count on it.
            state["step"] = state["step"].clone()
    try:
        optimizer.mend(tensors)
    except ConfigError as error:
        raise ConfigError(f"{files[0] if files else 'checkpoint'}: {error}") from None


def _link_moments(engine: Any) -> bool:
    """Point safe_get_full_optimizer_state at the moments as they are now; whether there is no more to link.

    Only the wrappers of stages 1 and 2 and BF16_Optimizer keep links.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if not hasattr(wrapper, "_hp_optimizer_states_linked"):
        return True
    if not all(optimizer.state.get(param) for group in optimizer.param_groups for param in group["params"]):
        return False
    wrapper._hp_optimizer_states_linked = False
    wrapper._lazy_init_hp_params_optimizer_state()
    return True
