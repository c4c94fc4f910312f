"""Whole weights for those who ask all ranks for them by other ways than the engine's methods."""

import functools
import sys
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch

from ds_quant.engine.weight_communication import gather_whole_of

_Gathered = deepspeed.zero.GatheredParameters


def gather_elsewhere() -> None:
    """Have GatheredParameters and accelerate gather whole weights first."""
    _gather_for_gathered_parameters()
    _gather_in_accelerate()


@functools.cache
def _gather_for_gathered_parameters() -> None:
    """Have every GatheredParameters that is enabled gather: below stage 3 DeepSpeed's own holds that nothing is to do,
    and forgets that it was asked."""
    begin, enter = _Gathered.__init__, _Gathered.__enter__

    @functools.wraps(begin)
    def __init__(
        self: Any, params: Any, modifier_rank: Any = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        if isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
            params = list(params)
        self._ds_quant_wanted = (params if isinstance(params, list) else [params]) if enabled else []
        begin(self, params, modifier_rank, fwd_module, enabled)

    @functools.wraps(enter)
    def __enter__(self: Any) -> Any:
        gather_whole_of(self._ds_quant_wanted)
        self._ds_quant_wanted = []
        return enter(self)

    _Gathered.__init__, _Gathered.__enter__ = __init__, __enter__


def _gather_in_accelerate() -> None:
    """Have accelerate's `get_state_dict`, by which it and the Trainer save models on all ranks, gather first.

    It reads the model behind the engine's back. Where accelerate runs, somebody has imported it.
    """
    accelerate = sys.modules.get("accelerate")
    if accelerate is None or hasattr(accelerate.Accelerator.get_state_dict, "ds_quant_gathers"):
        return
    original = accelerate.Accelerator.get_state_dict

    @functools.wraps(original)
    def get_state_dict(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(model, "ds_quant_weight_communication"):
            model.gather_weights()
        return original(self, model, *args, **kwargs)

    get_state_dict.ds_quant_gathers = True  # type: ignore[attr-defined]
    accelerate.Accelerator.get_state_dict = get_state_dict
