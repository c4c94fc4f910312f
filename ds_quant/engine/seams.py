"""Which DeepSpeed is supported, and which of its private attributes this package overrides or reads."""

import importlib
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from ds_quant.base.errors import ConfigError

SUPPORTED = ("0.19.8", "0.20")
"""First supported version, first version that is not."""

SEAMS: tuple[tuple[str, str, str], ...] = (
    ("deepspeed", "initialize", "wrapped by enable()"),
    ("deepspeed.runtime.zero.partition_parameters", "Init.__init__", "parses the JSON under HF's ZeRO-3"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.forward", "names the step that stochastic rounding draws for"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._backward_epilogue", "the end of a micro step"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._configure_basic_optimizer", "makes the optimizer of the JSON"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._is_supported_optimizer", "lets AdEMAMix pass"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.load_checkpoint", "its files are checked, its moments requantized"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._get_zero_ckpt_name", "the file of a rank's moments"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._get_ckpt_name", "the file of the moments at stage 0"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._get_optimizer_ckpt_name", "the same with a mixture of experts"),
    ("deepspeed.utils.groups", "_get_expert_parallel_rank", "which of these files"),
    ("deepspeed.utils.groups", "_get_max_expert_size_name", "which of these files"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.step", "links the moments after the first one; writes the weights"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.zero_optimization_partition_weights", "its hooks alias inputs"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.load_module_state_dict", "writes the weights"),
    (
        "deepspeed.runtime.zero.partition_parameters",
        "GatheredParameters.__exit__",
        "the end of a user's edit of the weights",
    ),
    *(
        (
            "deepspeed.runtime.zero.partition_parameters",
            f"GatheredParameters.{name}",
            "gathers whole weights",
        )
        for name in ("__init__", "__enter__")
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.save_16bit_model", "gathers whole weights"),
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer.step", "weights are gathered in it"),
    ("deepspeed.runtime.zero.stage_1_and_2", "all_gather_dp_groups", "what stages 1 and 2 gather with"),
    ("deepspeed.runtime.utils", "all_gather_dp_groups", "gathers whole weights"),
    (
        "deepspeed.runtime.zero.partition_parameters",
        "Init._convert_to_deepspeed_param",
        "gives parameters the methods that fetch them as codes",
    ),
    ("deepspeed.runtime.zero.partition_parameters", "ZeroParamStatus", "whether a parameter is there"),
    ("deepspeed.runtime.zero.partition_parameters", "get_allgather_dtype", "the dtype in which one is gathered"),
    (
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "PartitionedParameterCoordinator.fetch_sub_module",
        "asks for parameters before the forward and the backward of their layers",
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.offload_states", "refused at stage 3"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.reload_states", "links the moments again"),
    (
        "deepspeed.runtime.fp16.unfused_optimizer",
        "FP16_UnfusedOptimizer.initialize_optimizer_states",
        "takes a step, which a quantized optimizer does not need",
    ),
    ("deepspeed.runtime.zero.utils", "ZERO_SUPPORTED_OPTIMIZERS", "optimizers with quantized states join it"),
    (
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        "links safe_get_full_optimizer_state to the moments",
    ),
    (
        "deepspeed.runtime.bf16_optimizer",
        "BF16_Optimizer._lazy_init_hp_params_optimizer_state",
        "links safe_get_full_optimizer_state to the moments",
    ),
    (
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer._load_global_state",
        "receives the groups of a universal checkpoint",
    ),
    (
        "deepspeed.runtime.bf16_optimizer",
        "BF16_Optimizer._load_global_state",
        "receives the groups of a universal checkpoint",
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.save_checkpoint", "residuals are saved beside it"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.was_step_applied", "residuals count from then on"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.is_gradient_accumulation_boundary", "the end of a whole step"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.buffered_allreduce_fallback", "reduces at stage 0"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._get_gradients_for_reduction", "what it reduces"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.allreduce_bucket", "its all-reduce is replaced"),
    ("deepspeed.runtime.engine", "dist.all_reduce", "what the engine reduces with"),
    *(
        ("deepspeed.runtime.zero.stage_1_and_2", f"DeepSpeedZeroOptimizer.{name}", "gradients are reduced in it")
        for name in (
            "reduce_ipg_grads",
            "average_tensor",
            "gradient_reduction_w_predivide",
            "allreduce_bucket",
            "allreduce_and_scatter",
            "_add_to_grad_partition_buffer",
        )
    ),
    *(
        ("deepspeed.runtime.zero.stage_1_and_2", f"DeepSpeedZeroOptimizer.{name}", "gradients of bf16 masters lie once")
        for name in ("_use_compact_grad_partition_buffer", "copy_grads_in_partition", "_is_muon_group")
    ),
    *(
        ("deepspeed.runtime.zero.stage_1_and_2", f"DeepSpeedZeroOptimizer.{name}", "gradients are stepped as they come")
        for name in (
            "process_gradients",
            "_get_compact_grad_partition_slice",
            "_build_compact_grad_partition_buffer",
            "_optimizer_step",
            "_link_all_hp_params",
        )
    ),
    ("deepspeed.runtime.zero.utils", "get_norm_dtype", "norms of gradients that are stepped as they come"),
    ("deepspeed.runtime.zero.stage_1_and_2", "dist.all_reduce", "what stages 1 and 2 reduce with"),
    ("deepspeed.runtime.zero.stage_1_and_2", "dist.reduce", "what stages 1 and 2 reduce with"),
    *(
        ("deepspeed.runtime.zero.stage3", f"DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__{name}", why)
        for name, why in (
            ("avg_scatter_grads", "its reduce-scatter is replaced"),
            ("avg_scatter_contiguous_grads", "its all-reduce is replaced"),
        )
    ),
    ("deepspeed.runtime.zero.stage3", "reduce_scatter_coalesced", "what stage 3 reduces with"),
    ("deepspeed.runtime.zero.stage3", "dist.all_reduce", "what stage 3 reduces with"),
    *(
        ("deepspeed.runtime.zero.stage_1_and_2", f"DeepSpeedZeroOptimizer.{name}", "momentums in few bits")
        for name in (
            "_muon_momentum_buffer",
            "_muon_staging_momentum",
            "_commit_muon_momentum",
            "_apply_muon_updates_cpu_offload",
        )
    ),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer._prepare_muon_updates", "momentums in few bits"),
    *(
        ("deepspeed.runtime.zero.stage3", f"DeepSpeedZeroOptimizer_Stage3.{name}", "momentums in few bits")
        for name in ("_apply_muon_to_accumulated_grads", "_muon_update_sub_group")
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.get_global_grad_norm", "a diagnostic: norms before clipping"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.is_compiled", "diagnostics are refused in compiled models"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.compile", "refused with diagnostics"),
    ("deepspeed.utils", "safe_get_local_optimizer_state", "a diagnostic: the second moments of stage 3"),
    ("deepspeed.utils.tensor_fragment", "tensor_fragment.get_hp_fragment_address", "the same of stages 1 and 2"),
    ("deepspeed.utils.tensor_fragment", "tensor_fragment.get_hp_fragment", "the masters of a weight on a rank"),
    ("deepspeed.comm.torch", "build_shm_op", "a dry run starts without it"),
    ("deepspeed.runtime.pipe.module", "PipelineModule", "refused"),
    ("deepspeed.ops", "__compatible_ops__", "the ops whose build may have left a lock"),
)
"""(module, attribute path, what for)."""

USED_WITH = {
    # Before 0.19.8 stages 1 and 2 have no buffer of their own partition, and pass nothing to add to.
    f"DeepSpeedZeroOptimizer.{name}": "DeepSpeedZeroOptimizer._get_compact_grad_partition_slice"
    for name in (
        "_add_to_grad_partition_buffer",
        "_use_compact_grad_partition_buffer",
        "_get_compact_grad_partition_slice",
        "_build_compact_grad_partition_buffer",
        "_is_muon_group",
    )
}
"""Seams that only some releases have, with what those have that use them (in the same module)."""


def check_version(installed: str | None = None) -> str:
    """The installed DeepSpeed version.

    Raises:
        ConfigError: it is outside the supported range.
    """
    installed = installed or version("deepspeed")
    release = Version(Version(installed).base_version)
    if not Version(SUPPORTED[0]) <= release < Version(SUPPORTED[1]):
        raise ConfigError(
            f"deepspeed: got version {installed}; allowed: >={SUPPORTED[0]},<{SUPPORTED[1]}; fix: pip install "
            f"'deepspeed>={SUPPORTED[0]},<{SUPPORTED[1]}'"
        )
    return installed


def check_live(expected: Iterable[tuple[Any, str]]) -> None:
    """Raise ImportError for what is read off live objects, given as (object, attribute), and has moved."""
    for holder, name in expected:
        if not hasattr(holder, name):
            raise ImportError(f"ds_quant: deepspeed {version('deepspeed')} has moved {type(holder).__name__}.{name}")


def find_seams() -> dict[str, bool]:
    """Each seam as ``module.attribute``, and whether this DeepSpeed has it. Left out: those that it does not use."""
    return {
        f"{module}.{path}": _has(module, path)
        for module, path, _ in SEAMS
        if path not in USED_WITH or _has(module, USED_WITH[path])
    }


def _has(module_name: str, path: str) -> bool:
    try:
        target: Any = importlib.import_module(module_name)
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError):
        return False
    return True


def check_seams() -> None:
    """Raise ImportError naming every seam that the installed DeepSpeed does not have."""
    missing = [name for name, there in find_seams().items() if not there]
    if missing:
        raise ImportError(
            f"ds_quant: deepspeed {version('deepspeed')} has moved {', '.join(missing)}; allowed: a release that has "
            f"them; fix: pip install 'deepspeed=={SUPPORTED[0]}'"
        )
