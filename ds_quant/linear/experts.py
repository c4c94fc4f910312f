"""Fused experts: the weights of all experts of a layer in one Parameter, as transformers 5 has them.

They are multiplied, and no linear layer does it, so that nothing would be quantized there. A Parameter counts as such
by what its module is, not by its dimensions alone: class tokens, position embeddings, convolutions, time mixes and
attention projections have three, too.
"""

import re
from collections.abc import Iterable

from torch import nn

from ds_quant.linear.linear_classes import is_linear
from ds_quant.linear.shapes import shape_of

_EXPERT = re.compile(r"experts?(?![a-z])|Experts?(?![a-z])")
_NO_EXPERTS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm)


def starred(name: str) -> str:
    """A name as the pattern that it shares with its like in the other layers: `layers.0.mlp` to `layers.*.mlp`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def shared_patterns(names: Iterable[str]) -> list[str]:
    """A pattern for those of `names` that differ in numbers only, the name itself where it has no like."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(starred(name), []).append(name)
    return [pattern if len(group) > 1 else group[0] for pattern, group in groups.items()]


def fused_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Parameters that hold the weights of several experts in one.

    Such a Parameter is held by a module that says experts, in the name of its class or its own, or in a count
    (`num_experts`) of its own, its owner's or its model's that is the Parameter's first dimension. It has three
    dimensions; or two, where the experts' matrices are stacked: as many rows as experts or more, times a number.
    """
    found = {}
    of_modules: dict[str, set[int]] = {}
    of_configs: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        owner = name.rpartition(".")[0] if name else None
        of_modules[name] = _counts(module)
        # A config counts for all below its module, a count of a module for its children only.
        of_configs[name] = _counts(getattr(module, "config", None)) | of_configs.get(owner or "", set())
        if isinstance(module, _NO_EXPERTS) or is_linear(module):
            continue
        counts = of_modules[name] | of_configs[name] | (of_modules[owner] if owner is not None else set())
        says_experts = bool(_EXPERT.search(type(module).__name__) or _EXPERT.search(name.rpartition(".")[2]))
        for key, parameter in module.named_parameters(recurse=False):
            shape = shape_of(parameter)
            if _is_fused(shape, says_experts or bool(_EXPERT.search(key)), counts) and "bias" not in key:
                found[f"{name}.{key}" if name else key] = shape
    return found


def _is_fused(shape: tuple[int, ...], says_experts: bool, counts: set[int]) -> bool:
    if len(shape) == 3:
        return says_experts or (min(shape) > 1 and shape[0] in counts)
    stacked = len(shape) == 2 and says_experts
    return stacked and any(shape[0] > count > 1 and shape[0] % count == 0 for count in counts)


def _counts(holder: object) -> set[int]:
    """Numbers of experts among the attributes of a module or a config."""
    values = getattr(holder, "__dict__", {})
    return {
        value
        for key, value in values.items()
        if type(value) is int and value > 1 and re.search(r"experts?$", key) and not re.search("shared|top|per_", key)
    }
