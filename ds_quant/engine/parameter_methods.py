"""The methods by which a parameter of stage 3 is gathered and cut, replaced while an engine fetches it as codes.

DeepSpeed gives them to each parameter, bound to it. Its coordinator calls the first, everybody else the second.
"""

import functools
import weakref
from typing import Any, Protocol

from torch import nn

METHODS = ("all_gather_coalesced", "all_gather", "partition")
_Parameter = Any
"""A torch.nn.Parameter with the attributes of DeepSpeed's stage 3."""


class Fetches(Protocol):
    """What takes their place: `weight_fetches.WeightFetches`. `original` is the method that is replaced."""

    def fetch(self, parameters: Any, original: Any, *args: Any, **kwargs: Any) -> Any: ...

    def gather(self, parameters: Any, original: Any, *args: Any, **kwargs: Any) -> Any: ...

    def is_read_elsewhere(self, parameter: _Parameter) -> None: ...

    def were_released(self, parameters: Any) -> None: ...

    def were_written(self) -> None: ...

    def forget(self, parameter: _Parameter) -> None: ...


def restore_methods(model: nn.Module) -> None:
    """Have the parameters of a model that an engine before has fetched as codes be gathered by DeepSpeed again."""
    parameter: _Parameter
    for parameter in model.parameters():
        if hasattr(parameter, "ds_quant_methods"):
            for name, method in parameter.ds_quant_methods.items():
                setattr(parameter, name, method)
            part = parameter.ds_quant_fetches()
            if part is not None:
                part.forget(parameter)
            del parameter.ds_quant_methods, parameter.ds_quant_fetches


def replace_methods(parameter: _Parameter, part: Fetches) -> None:
    """Have the methods by which a parameter is gathered and partitioned go by way of `part`, while it lives."""
    if hasattr(parameter, "ds_quant_methods"):  # of a layer before, which has it as well
        return
    parameter.ds_quant_methods = {name: getattr(parameter, name) for name in METHODS}
    fetch, gather, cut = parameter.ds_quant_methods.values()
    owner, itself = weakref.ref(part), weakref.ref(parameter)
    parameter.ds_quant_fetches = owner

    @functools.wraps(fetch)
    def all_gather_coalesced(params: Any, *args: Any, **kwargs: Any) -> Any:
        live = owner()
        params = list(params)
        return fetch(params, *args, **kwargs) if live is None else live.fetch(params, fetch, *args, **kwargs)

    @functools.wraps(gather)
    def all_gather(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        live = owner()
        if live is None:
            return gather(param_list, *args, **kwargs)
        if param_list is None:
            live.is_read_elsewhere(itself())
            param_list = [itself()]
        return live.gather(param_list, gather, *args, **kwargs)

    @functools.wraps(cut)
    def partition(
        param_list: Any = None, hierarchy: int = 0, has_been_updated: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        live = owner()
        if live is not None:
            param_list = [itself()] if param_list is None else list(param_list)
            live.were_released(param_list)
            if has_been_updated:
                live.were_written()
        return cut(param_list, hierarchy, has_been_updated, *args, **kwargs)

    parameter.all_gather_coalesced = all_gather_coalesced
    parameter.all_gather = all_gather
    parameter.partition = partition
