"""torchao's float8 training, for GPUs that multiply float8 (compute capability 8.9 and newer)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

RECIPES = ("tensorwise", "rowwise")
_MULTIPLE = 16
"""torch._scaled_mm takes no other sizes."""


def convert_linears_(
    model: nn.Module, recipe: str, chosen: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Have the nn.Linears of `model` (those for which `chosen` of module and name is true) multiply in float8.

    Those with a size that is no multiple of 16 stay as they are. A model that is an nn.Linear itself is replaced.
    """
    float8 = importlib.import_module("torchao.float8")

    def filter_fn(module: nn.Module, name: str) -> bool:
        fits = isinstance(module, nn.Linear) and not any(size % _MULTIPLE for size in module.weight.shape)
        return fits and (chosen is None or chosen(module, name))

    converted: nn.Module = float8.convert_to_float8_training(
        model, module_filter_fn=filter_fn, config=float8.Float8LinearConfig.from_recipe_name(recipe)
    )
    return converted
