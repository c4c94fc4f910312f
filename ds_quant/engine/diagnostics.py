"""A live engine tells a collector of diagnostics when its steps begin and end, and keeps its state in checkpoints.

The collector itself (`ds_quant.diagnostics.collector`) lies above this package and is passed in.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_local_optimizer_state
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.whole_folder import whole_file
from ds_quant.comm.agreement import raise_together
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.seams import check_live

_FILE = "ds_quant_diagnostics.pt"


class Collector(Protocol):
    """What the engine tells whoever collects diagnostics."""

    def before_forward(self) -> None:
        """A forward is about to begin; the engine's counters name its step."""

    def after_backward(self) -> None:
        """The backward of a micro-batch is over."""

    def after_step(self, *, is_whole: bool) -> None:
        """Where it `is_whole` an optimizer step was taken or skipped, and the engine's counters name the next one."""

    def loaded(self, state: dict[str, Any] | None) -> None:
        """The run goes on from a checkpoint; its state, None where it has none."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; asked on rank 0."""


class Diagnostics(Part):
    """Tells `collector` of an engine's steps.

    Raises:
        ConfigError: its model is compiled.
        ImportError: the live engine lacks what is read off it.
    """

    def __init__(self, engine: Any, collector: Collector) -> None:
        super().__init__(engine)
        check_live((engine, name) for name in ("global_steps", "global_samples", "monitor", "is_compiled"))
        compiled = [name for name, module in engine.module.named_modules() if hasattr(module, "_orig_mod")]
        if engine.is_compiled or compiled:
            name = compiled[0] or type(engine.module).__name__ if compiled else ""
            _refuse_compiled(f"a compiled model ({name})" if compiled else "compile")
        self._collector = engine.ds_quant_diagnostics = collector

    def before_forward(self, *, trains: bool) -> None:
        self._collector.before_forward()

    def after_backward(self) -> None:
        self._collector.after_backward()

    def after_step(self, *, is_whole: bool) -> None:
        self._collector.after_step(is_whole=is_whole)

    def before_compile(self) -> None:
        _refuse_compiled("engine.compile()")

    def before_save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            _save(self._collector.state_dict(), folder)

    def after_load(self, loading: Loading, path: str | None) -> None:
        if path is not None:
            self._collector.loaded(_load(Path(path).parent, self.engine.device))


def _refuse_compiled(got: str) -> None:
    """Raise ConfigError: compiled layers call no hooks."""
    raise fail(
        "ds_quant.diagnostics",
        got,
        "a model in eager mode: the hooks that diagnostics watch with are not called in compiled code",
        "train without torch.compile, or remove the section and run ds_quant diagnose on checkpoints",
    )


def second_moments(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, exp_avg_sq) of what this rank holds of each trainable parameter; nothing before a first step.

    Whole parameters at stage 0, flat parts of them above. A moment that is stored in few bits comes as it is stored
    (a `QuantizedState`, or a window of one). Where DeepSpeed flattens whole groups at stage 0 in 16 bits, the name is
    that of the group.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        for name, parameter in engine.module.named_parameters():
            of_muon = getattr(parameter, "use_muon", False) and "Muon" in type(optimizer).__name__
            has_one = parameter.requires_grad and not of_muon
            moment = safe_get_local_optimizer_state(parameter, "exp_avg_sq") if has_one else None
            if moment is not None:
                yield name, moment
    elif engine.zero_optimization() or hasattr(wrapper, "bf16_groups"):
        # By address: DeepSpeed links only what the first parameter group's step has made.
        lower = wrapper.bit16_groups if hasattr(wrapper, "bit16_groups") else wrapper.bf16_groups
        for group, parameters in zip(optimizer.param_groups, lower, strict=True):
            moment = optimizer.state.get(group["params"][0], {}).get("exp_avg_sq")
            for parameter in parameters if moment is not None else ():
                if parameter._hp_mapping is not None:  # else all of it is another rank's
                    address = parameter._hp_mapping.get_hp_fragment_address()
                    yield names[id(parameter)], moment.narrow(0, address.start, address.numel)
    else:
        # In 16 bits the optimizer steps fp32 copies, in the order of the groups.
        lower = getattr(wrapper, "fp16_groups", None)
        for index, group in enumerate(optimizer.param_groups):
            whole = lower is None or len(lower[index]) == len(group["params"])
            for number, stepped in enumerate(group["params"]):
                moment = optimizer.state.get(stepped, {}).get("exp_avg_sq")
                if moment is not None:
                    named = stepped if lower is None else lower[index][number]
                    yield names[id(named)] if whole else f"group {index}", moment


def _save(state: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / _FILE) as beside:
        torch.save(state, beside)


def _load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The state in the folder of a checkpoint, as rank 0 finds it, on all ranks. ConfigError where it is broken."""
    found: list[Any] = [None]

    def read() -> None:
        path = folder / _FILE
        if dist.get_rank() == 0 and path.exists():
            try:
                found[0] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many kinds for a file cut short
                fix = "copy the checkpoint again, or delete this file to restart the diagnostics"
                raise fail(str(path), f"a file that cannot be read ({error})", "a whole one", fix) from error

    raise_together(read, device)
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
