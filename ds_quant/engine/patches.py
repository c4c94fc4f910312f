"""Around deepspeed.initialize: finding it, wrapping it, what it parses, which models and optimizers it is given."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from ds_quant.config import ConfigError, read_deepspeed_config, strip_tripwire
from ds_quant.config.batch_sizes import check_filled
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.kinds import KINDS

# ZeRO compares exact types.
_supported = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
_supported.extend(kind.optimizer for kind in KINDS if kind.optimizer not in _supported)

_wrapped: list[Callable] = []


def own_initialize() -> Callable:
    """DeepSpeed's own `initialize`, also while the name `deepspeed.initialize` is wrapped."""
    return _wrapped[-1] if _wrapped else deepspeed.initialize


def wrap_initialize(replacement: Callable) -> Callable[[], None]:
    """Have `deepspeed.initialize` call `replacement`; returns what undoes it."""
    original = deepspeed.initialize

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    def undo() -> None:
        deepspeed.initialize = _wrapped.pop()

    _wrapped.append(original)
    deepspeed.initialize = initialize
    return undo


def op_names() -> set[str]:
    """Names of the ops that DeepSpeed may compile on first use."""
    return set(deepspeed.ops.__compatible_ops__)


def check_model(model: nn.Module) -> None:
    """Refuse models whose layers are laid out by something that swapping the class would not affect.

    Raises:
        ConfigError: a pipeline module, Domino layers, or a model that tensor parallelism already went through.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    def refuse(got: str, fix: str) -> None:
        raise ConfigError(
            f"ds_quant: got {got}; allowed: models whose linear layers are whole on every rank or partitioned by ZeRO; "
            f"fix: {fix}"
        )

    if isinstance(model, PipelineModule):
        refuse("a PipelineModule", "build the model as a plain module and use ZeRO, or remove the ds_quant section")
    for name, module in model.named_modules():
        origin = type(module).__module__
        if origin.startswith("deepspeed.runtime.domino"):
            refuse(f"the Domino layer {name!r}", "use the model without Domino, or remove the ds_quant section")
        if origin.startswith(("deepspeed.module_inject", "deepspeed.runtime.tensor_parallel")):
            refuse(
                f"the layer {name!r} of tensor parallelism ({type(module).__name__})",
                "set tensor_parallel.autotp_size to 0 and do not call tp_model_init, or remove the ds_quant section",
            )


def strip_tripwire_in_zero_init() -> Callable[[], None]:
    """Let `deepspeed.zero.Init` take configs with the tripwire, and know the ranks; returns what undoes it.

    Hugging Face enters zero.Init with the whole JSON when it builds a ZeRO-3 model, long before initialize.
    """
    init = deepspeed.zero.Init
    original = init.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def without_tripwire(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        for name in ("config_dict_or_path", "config"):
            if bound.arguments.get(name) is not None:
                config = strip_tripwire(read_deepspeed_config(bound.arguments[name]))
                check_filled(config)
                bound.arguments[name] = config
                if not deepspeed.comm.is_initialized():
                    # As zero.Init does by itself, but only after it has multiplied batch sizes by one rank: accelerate
                    # starts torch's process group for CPUs, and leaves DeepSpeed's to it.
                    deepspeed.init_distributed()
        original(*bound.args, **bound.kwargs)

    def undo() -> None:
        init.__init__ = original

    init.__init__ = without_tripwire
    return undo


@contextmanager
def optimizer_built_by(build: Callable[[Any], torch.optim.Optimizer] | None) -> Iterator[None]:
    """Context in which engines make the optimizer of their JSON with `build`, called with parameters or groups.

    None: by DeepSpeed itself. This is the one place where offloading to the CPU makes no difference.
    """
    if build is None:
        yield
        return
    engine_class = deepspeed.runtime.engine.DeepSpeedEngine
    original, is_supported = engine_class._configure_basic_optimizer, engine_class._is_supported_optimizer
    engine_class._configure_basic_optimizer = lambda engine, model_parameters: build(model_parameters)
    # It knows no AdEMAMix; the type has been checked.
    engine_class._is_supported_optimizer = lambda engine, name: True
    try:
        yield
    finally:
        engine_class._configure_basic_optimizer = original
        engine_class._is_supported_optimizer = is_supported


@contextmanager
def no_step_at_start() -> Iterator[None]:
    """Context in which engines leave the step of a quantized optimizer at 0.

    DeepSpeed's wrapper for stage 0 in bf16 takes a step without gradients to have the state made: weights would decay
    once, and the moments' bias correction would count one step too many.
    """
    wrapper = deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer
    original = wrapper.initialize_optimizer_states

    def initialize_optimizer_states(self: Any) -> None:
        if not isinstance(self.optimizer, QuantizedOptimizer):
            original(self)

    wrapper.initialize_optimizer_states = initialize_optimizer_states
    try:
        yield
    finally:
        wrapper.initialize_optimizer_states = original


def accelerator() -> tuple[str, int]:
    """Name and number of devices of the accelerator that DeepSpeed found."""
    found = deepspeed.get_accelerator()
    return found.device_name(), found.device_count()
