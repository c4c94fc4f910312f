"""The seam to DeepSpeed: the only file that names its private attributes.

DeepSpeed's internals move between releases. What this project overrides or reads is listed in SEAMS and looked up when
this module is imported, so that a release that moved something is an error that names it, not a setting that quietly
does nothing.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from packaging.version import Version
from torch import nn

from ds_quant.config import ConfigError, read_deepspeed_config, strip_tripwire
from ds_quant.conversion import remove_forward_counter
from ds_quant.stepkey import StepKey

SUPPORTED = ("0.19.8", "0.20")
"""First supported version, first version that is not."""

SEAMS: tuple[tuple[str, str, str], ...] = (
    ("deepspeed", "initialize", "wrapped by enable()"),
    ("deepspeed.runtime.zero.partition_parameters", "Init.__init__", "parses the JSON under HF's ZeRO-3"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.forward", "names the step that stochastic rounding draws for"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.gradient_accumulation_steps", "the micro step within a step"),
    ("deepspeed.runtime.pipe.module", "PipelineModule", "refused"),
    ("deepspeed.ops", "__compatible_ops__", "the ops whose build may have left a lock"),
)
"""(module, attribute path, what for)."""

_ENGINE_COUNTERS = ("global_steps", "micro_steps")
"""Set in DeepSpeedEngine.__init__, so they can be looked up on a live engine only."""


def check_version(installed: str | None = None) -> str:
    """The installed DeepSpeed version.

    Raises:
        ConfigError: it is outside the supported range.
    """
    installed = installed or version("deepspeed")
    release = Version(Version(installed).base_version)
    if not Version(SUPPORTED[0]) <= release < Version(SUPPORTED[1]):
        raise ConfigError(
            f"deepspeed: got version {installed}; allowed: >={SUPPORTED[0]},<{SUPPORTED[1]}; remedy: pip install "
            f"'deepspeed>={SUPPORTED[0]},<{SUPPORTED[1]}'"
        )
    return installed


def find_seams() -> dict[str, bool]:
    """Each seam as ``module.attribute``, and whether this DeepSpeed has it."""
    found = {}
    for module_name, path, _ in SEAMS:
        try:
            target: Any = importlib.import_module(module_name)
            for part in path.split("."):
                target = getattr(target, part)
            found[f"{module_name}.{path}"] = True
        except (ImportError, AttributeError):
            found[f"{module_name}.{path}"] = False
    return found


def check_seams() -> None:
    """Raise ImportError naming every seam that the installed DeepSpeed does not have."""
    missing = [name for name, there in find_seams().items() if not there]
    if missing:
        raise ImportError(
            f"ds_quant: deepspeed {version('deepspeed')} has moved {', '.join(missing)}; allowed: a release that has "
            f"them; remedy: pip install 'deepspeed=={SUPPORTED[0]}'"
        )


check_version()
check_seams()


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
    """Refuse models whose layers are laid out by something that a class swap would not reach.

    Raises:
        ConfigError: a pipeline module, Domino layers, or a model that tensor parallelism already went through.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    def refuse(got: str, remedy: str) -> None:
        raise ConfigError(
            f"ds_quant: got {got}; allowed: models whose linear layers are whole on every rank or partitioned by ZeRO; "
            f"remedy: {remedy}"
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
    """Let `deepspeed.zero.Init` take configs with the tripwire; returns what undoes it.

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
                bound.arguments[name] = strip_tripwire(read_deepspeed_config(bound.arguments[name]))
        original(*bound.args, **bound.kwargs)

    def undo() -> None:
        init.__init__ = original

    init.__init__ = without_tripwire
    return undo


class _StepNamingEngine:
    """Mixed into the class of a live engine: tells the quantized layers which step a forward belongs to."""

    ds_quant_step_key: StepKey

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        # Both counters stand still until engine.step(), hence also during the backward of this forward. A checkpoint
        # holds the first; the second restarts at 0, which is where a step begins.
        accumulation = self.gradient_accumulation_steps()  # type: ignore[attr-defined]
        self.ds_quant_step_key.set(self.global_steps, self.micro_steps % accumulation)  # type: ignore[attr-defined]
        return super().forward(*inputs, **kwargs)  # type: ignore[misc]


def attach(engine: Any, step_key: StepKey) -> None:
    """Drive `step_key` from the live engine, with the seed of rank 0 on all ranks."""
    for name in _ENGINE_COUNTERS:
        if not hasattr(engine, name):
            raise ImportError(f"ds_quant: deepspeed {version('deepspeed')} has moved DeepSpeedEngine.{name}")
    seed = torch.tensor([step_key.seed], dtype=torch.int64, device=engine.device)
    dist.broadcast(seed, src=0)
    step_key.reseed(int(seed.item()), dist.get_rank())
    remove_forward_counter(engine.module)
    engine.ds_quant_step_key = step_key
    base = type(engine)
    engine.__class__ = type(base.__name__, (_StepNamingEngine, base), {"__module__": base.__module__})


def accelerator() -> tuple[str, int]:
    """Name and number of devices of the accelerator that DeepSpeed found."""
    found = deepspeed.get_accelerator()
    return found.device_name(), found.device_count()
