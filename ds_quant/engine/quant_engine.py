"""The engine class that applies the section: DeepSpeed's own, which calls the parts around its methods."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

from ds_quant.comm.agreement import raise_together
from ds_quant.engine.communication import Communication
from ds_quant.engine.diagnostics import Diagnostics
from ds_quant.engine.engine_class import MixedIn, mix_in
from ds_quant.engine.masters import Masters
from ds_quant.engine.micro_steps import MicroSteps
from ds_quant.engine.moments import Moments
from ds_quant.engine.oscillation_reset import OscillationReset
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.release import Release
from ds_quant.engine.seams import check_live
from ds_quant.engine.steps import Steps
from ds_quant.engine.weight_communication import WeightCommunication
from ds_quant.engine.weight_fetches import WeightFetches
from ds_quant.engine.weights import Weights

ORDER: tuple[type[Part], ...] = (
    MicroSteps,
    Masters,
    Release,
    Moments,
    Steps,
    Weights,
    Communication,
    WeightCommunication,
    WeightFetches,
    OscillationReset,
    Diagnostics,
)
"""The order in which every hook calls the parts.

The count of micro steps comes first, since others read it; diagnostics look at what the others have done.
"""

_Engine = deepspeed.runtime.engine.DeepSpeedEngine


def extend(engine: Any, parts: Iterable[Part]) -> None:
    """Have the live engine call `parts` from now on."""
    check_live([(engine, "global_steps")])
    engine.ds_quant_parts = tuple(sorted(parts, key=lambda part: ORDER.index(type(part))))
    mix_in(engine, QuantEngine)


class QuantEngine(MixedIn):
    """Mixed into the class of a live engine, whatever DeepSpeed made it. Arguments and results are DeepSpeed's."""

    ds_quant_parts: tuple[Part, ...]

    @functools.wraps(_Engine.forward)
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        trains, failed = self.module.training and torch.is_grad_enabled(), True
        try:
            for part in self.ds_quant_parts:
                part.before_forward(trains=trains)
            result = super().forward(*inputs, **kwargs)
            failed = False
        finally:
            for part in self.ds_quant_parts:
                part.after_forward(trains=trains, failed=failed)
        return result

    def _backward_epilogue(self) -> None:
        super()._backward_epilogue()
        for part in self.ds_quant_parts:
            part.after_backward()

    @functools.wraps(_Engine.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        is_whole, steps = self.is_gradient_accumulation_boundary(), self.global_steps
        may_have_written = True
        try:
            result = super().step(*args, **kwargs)
            may_have_written = self.global_steps != steps  # otherwise in the middle of an accumulation
        finally:
            if may_have_written:
                self._ds_quant_weights_written()
        for part in self.ds_quant_parts:
            part.after_step(is_whole=is_whole)
        return result

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        def before_save() -> None:
            for part in self.ds_quant_parts:
                part.before_save(Path(save_dir) / tag)

        if save_dir:
            self.gather_weights()
            tag = f"global_step{self.global_steps}" if tag is None else str(tag)
            # Before DeepSpeed writes `latest`: what that names is whole.
            raise_together(before_save, self.device)
        client_state = {} if client_state is None else client_state
        return super().save_checkpoint(save_dir, tag, client_state, save_latest, exclude_frozen_parameters)

    @functools.wraps(_Engine.save_16bit_model)
    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_weights()
        return super().save_16bit_model(*args, **kwargs)

    def gather_weights(self) -> None:
        """Have every rank hold the whole weights in the model's dtype, as their owners do. All ranks call it.

        Needed under `ds_quant.communication.weight`, before one rank reads them by itself (`state_dict`,
        `save_pretrained`); until the next step. Training goes on as it would have. Elsewhere it does nothing.
        """
        for part in self.ds_quant_parts:
            part.before_reading()

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
        loading = Loading(load_dir, tag, load_optimizer_states, load_module_only)
        with loading.during:
            for part in self.ds_quant_parts:
                part.before_load(loading)
            try:
                result = super().load_checkpoint(
                    load_dir,
                    tag,
                    load_module_strict,
                    load_optimizer_states,
                    load_lr_scheduler_states,
                    load_module_only,
                    custom_load_fn,
                )
            finally:
                self._ds_quant_weights_written()
        for part in self.ds_quant_parts:
            part.after_load(loading, result[0])
        return result

    @functools.wraps(_Engine.load_module_state_dict)
    def load_module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_module_state_dict(*args, **kwargs)
        finally:
            self._ds_quant_weights_written()

    @functools.wraps(_Engine.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:
        for part in self.ds_quant_parts:
            part.before_compile()
        super().compile(*args, **kwargs)

    def offload_states(
        self,
        include: Any = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        states = list(OffloadStateTypeEnum if include is None else include)
        for part in self.ds_quant_parts:
            part.before_offload(states)
        unpinned = {state for part in self.ds_quant_parts for state in part.unpinned if state in states and pin_memory}
        if unpinned:
            super().offload_states(list(unpinned), device, False, non_blocking)
            include = [state for state in states if state not in unpinned]
            if not include:
                return
        super().offload_states(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        super().reload_states(non_blocking)
        for part in self.ds_quant_parts:
            part.after_reload()

    def _ds_quant_weights_written(self) -> None:
        for part in self.ds_quant_parts:
            part.after_writing()
