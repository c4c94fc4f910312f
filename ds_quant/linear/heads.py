"""Output heads: the linear layers whose outputs are a model's logits, scores or values."""

import re
from collections.abc import Iterator

from torch import nn

from ds_quant.linear.linear_classes import is_linear
from ds_quant.linear.shapes import shape_of

HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs", "ctc_head", "v_head", "value_head", "reward_head")
"""Names of heads, at the end of a module's name. Other than lm_head, outside of repeated layers only."""


def output_heads(model: nn.Module) -> list[str]:
    """Names of the linear layers whose outputs are the logits, in the model's order.

    These are: what `get_output_embeddings` of any module names; what has a name of `HEAD_NAMES`; what is tied to an
    embedding; of a transformers model with a task, what lies outside of its base model and has an output for each label
    or token, or a single one; and in a model without any of these what lies outside of repeated layers and has an
    output for each row of an embedding. Of a head of several layers it is the last one; copies of a head that PEFT
    keeps are heads, too.
    """
    by_role = [layer for head in _by_role(model) for layer in _last_layers(head)]
    by_name = _by_name(model, any_part=not by_role)
    found = {id(layer) for layer in [*by_role, *by_name, *_of_tasks(model), *_tied(model)]}
    if not found:
        found = {id(layer) for layer in _of_vocabulary(model)}
    return [name for name, module in model.named_modules() if id(module) in found]


def _by_role(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        try:
            head = getter()
        except (AttributeError, NotImplementedError):  # of a base model that has none
            continue
        if isinstance(head, nn.Module):
            yield head


def _by_name(model: nn.Module, *, any_part: bool) -> Iterator[nn.Module]:
    """Linear layers named as heads are; and the last one of a module of such a name, if it is not lm_head where the
    model says itself which layer of that is the head."""
    repeated = _repeated(model)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        takes = any_part or is_linear(module) if last == "lm_head" else id(module) not in repeated
        if last in HEAD_NAMES and takes:
            yield from _last_layers(module)


def _repeated(model: nn.Module) -> set[int]:
    """Modules inside the layers of a stack: an nn.ModuleList, or an nn.Sequential with several of one class."""
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        kinds = [type(child) for child in module]
        for child in module:
            if isinstance(module, nn.ModuleList) or kinds.count(type(child)) > 1:
                inside.update(id(part) for part in child.modules() if part is not child)
    return inside


def _last_layers(module: nn.Module) -> list[nn.Module]:
    """The linear layer that makes the output of `module`; all of its copies and adapters, where PEFT has wrapped it."""
    if is_linear(module):
        return [module]
    wrapped = getattr(module, "original_module", None)
    if isinstance(wrapped, nn.Module):  # modules_to_save: one of them is called, whichever adapter is active
        copies = getattr(module, "modules_to_save", None)
        every = [wrapped, *(copies.values() if isinstance(copies, nn.ModuleDict) else ())]
        return [layer for copy in every for layer in _last_layers(copy)]
    if isinstance(getattr(module, "base_layer", None), nn.Module):  # LoRA: base layer and adapters are added up
        return [layer for layer in module.modules() if is_linear(layer)]
    for child in reversed(list(module.children())):
        if layers := _last_layers(child):
            return layers
    return []


def _outputs(layer: nn.Module) -> int | None:
    weight = layer._parameters.get("weight")
    if weight is None or len(shape_of(weight)) != 2:
        return None
    # transformers' Conv1D, (in, out), has its number of outputs in nf
    return int(getattr(layer, "nf", shape_of(weight)[0]))


def _tied(model: nn.Module) -> Iterator[nn.Module]:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if is_linear(module) and id(module._parameters.get("weight")) in tables:
            yield module


def _of_vocabulary(model: nn.Module) -> Iterator[nn.Module]:
    repeated = _repeated(model)
    outside = [module for module in model.modules() if id(module) not in repeated]
    rows = {shape_of(module.weight)[0] for module in outside if isinstance(module, nn.Embedding)}
    for module in outside:
        if is_linear(module) and _outputs(module) in rows:
            yield module


def _of_tasks(model: nn.Module) -> Iterator[nn.Module]:
    for task in model.modules():
        prefix, config = getattr(task, "base_model_prefix", None), getattr(task, "config", None)
        base = task._modules.get(prefix) if isinstance(prefix, str) else None
        labels = getattr(config, "num_labels", None)
        if base is not None:
            sizes = {1, labels, getattr(config, "vocab_size", None)} - {None}
        elif isinstance(prefix, str) and re.search("For[A-Z]", type(task).__name__):
            sizes = {labels}  # its base has another name than its class says
        else:
            continue
        inside = _repeated(task) | {id(module) for module in (base.modules() if base is not None else ())}
        for module in task.modules():
            if id(module) not in inside and is_linear(module) and _outputs(module) in sizes:
                yield module
