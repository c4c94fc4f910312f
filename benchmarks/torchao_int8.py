"""torchao's int8 mixed-precision training, so that it runs as it is meant to."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

_TRAINING = "torchao.prototype.quantized_training"


def quantize_linears_(model: nn.Module, chosen: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Have the nn.Linears of `model` (those for which `chosen` of module and name is true) multiply in int8.

    By tensor subclass, as is torchao's default: with `module_swap` torch.compile breaks the graph at every layer.
    """
    _register_linear()
    importlib.import_module("torchao.quantization").quantize_(
        model,
        importlib.import_module(_TRAINING).Int8MixedPrecisionTrainingConfig(),
        filter_fn=lambda module, name: type(module) is nn.Linear and (chosen is None or chosen(module, name)),
    )
    return model


@functools.cache
def _register_linear() -> None:
    """torchao 0.18 registers its linear as an aten operator, which F.linear is not: it would multiply in bf16."""
    warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching")
    module = importlib.import_module(f"{_TRAINING}.int8_mixed_precision")
    weight = module.Int8MixedPrecisionTrainingLinearWeight
    if F.linear in weight._TORCH_FN_TABLE.get(weight, {}):
        return

    @weight.implements_torch_function(F.linear)
    def linear(func: object, types: object, args: tuple, kwargs: dict) -> object:
        return module._Int8MixedPrecisionTrainingLinearFunction.apply(*args, **kwargs)
