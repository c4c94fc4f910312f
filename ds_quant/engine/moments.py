"""Quantized moments in a live engine: loading, offloading, and the links of safe_get_full_optimizer_state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

from ds_quant.base.errors import ConfigError, fail
from ds_quant.comm.agreement import raise_together
from ds_quant.engine.checkpoints import check_checkpoint, moment_files, stepped_tensors
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.seams import check_live
from ds_quant.optim.base import QuantizedOptimizer

_OFFLOADED = ("exp_avg", "exp_avg_sq")
"""States that DeepSpeed's offload_states knows."""


class Moments(Part):
    """Keep the moments of a live engine bit-exact through loading and offloading.

    Raises:
        ConfigError: the engine's optimizer is no QuantizedOptimizer.
    """

    # DeepSpeed's pinned buffers are fp32: four times the codes, and the codes would be lost.
    unpinned = (OffloadStateTypeEnum.optim_states,)

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        optimizer = engine.basic_optimizer
        if not isinstance(optimizer, QuantizedOptimizer):
            raise fail(
                "ds_quant.optimizer",
                f"an engine with {type(optimizer).__qualname__}",
                "an optimizer of ds_quant",
                "another library has replaced the optimizer: remove it, or remove ds_quant.optimizer",
            )
        _check_live(engine)
        group = getattr(engine.optimizer, "dp_process_group", None)
        if group is not None:
            # ZeRO's partitions differ from rank to rank; without it the state is replicated and draws the same bits.
            optimizer.rank = 1 + dist.get_rank(group=group)
        self._are_linked = False
        self._files: list[str] = []
        self._own_options: list[dict[str, Any]] = []

    def after_step(self, *, is_whole: bool) -> None:
        if not self._are_linked:
            # DeepSpeed links them after the step of the first parameter group, when the others have none.
            self._are_linked = _link_moments(self.engine)

    def before_load(self, loading: Loading) -> None:
        engine = self.engine
        self._files = moment_files(engine, loading.load_dir, loading.tag) if loading.with_moments else []
        check_checkpoint(engine, self._files)
        self._own_options = [dict(group) for group in engine.basic_optimizer.param_groups]
        loading.during.enter_context(_every_group_loaded(engine, self._own_options))

    def after_load(self, loading: Loading, path: str | None) -> None:
        engine = self.engine
        # Universal checkpoints bring the options of the groups that they were saved with, in their order (at stage 3
        # those of the first group, for all), and this run may have split its groups. How moments are stored and what
        # decays is decided by this run.
        states = tuple(engine.basic_optimizer.STATES)
        kept = (*states, "weight_decay") if engine.load_universal_checkpoint() else states
        for group, options in zip(engine.basic_optimizer.param_groups, self._own_options, strict=True):
            group.update({name: options[name] for name in kept})
        if loading.with_moments and path is not None:
            raise_together(lambda: _convert_states(engine, self._files), engine.device)
            self._are_linked = _link_moments(engine)

    def before_offload(self, states: Sequence[OffloadStateTypeEnum]) -> None:
        wanted = {OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params}
        if self.engine.zero_optimization_stage() == 3 and wanted & set(states):
            raise fail(
                "offload_states(include)",
                "optim_states or hp_params at ZeRO stage 3 with ds_quant.optimizer",
                "stages 1 and 2, since DeepSpeed takes its own FusedAdam only at stage 3",
                "leave them out of include, or use zero_optimization.stage 2",
            )
        unknown = [name for name in self.engine.basic_optimizer.STATES if name not in _OFFLOADED]
        if OffloadStateTypeEnum.optim_states in states and unknown:
            raise fail(
                "offload_states(include)",
                f"optim_states with {unknown[0]} of {type(self.engine.basic_optimizer).__name__}",
                f"{' and '.join(_OFFLOADED)}, which are all that DeepSpeed moves",
                "leave optim_states out of include",
            )

    def after_reload(self) -> None:
        _link_moments(self.engine)  # DeepSpeed cuts the links when it offloads, and replaces the moments


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
    """Context in which universal checkpoints load into all groups of stages 1 and 2, however many were saved.

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


def _convert_states(engine: Any, files: list[str]) -> None:
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
        optimizer.convert_states(tensors)
    except ConfigError as error:
        raise ConfigError(f"{files[0] if files else 'checkpoint'}: {error}") from None


def _link_moments(engine: Any) -> bool:
    """Point safe_get_full_optimizer_state at the moments as they are now. Returns whether all are linked.

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
