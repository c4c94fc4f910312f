"""Which weights of a model nobody reads but quantized layers, and these by codes that can be sent in their place."""

from torch import nn

from ds_quant.comm.weight_layout import Coding
from ds_quant.linear.modules import QuantizedModule


def coded_weights(model: nn.Module) -> dict[int, Coding]:
    """How the layers quantize a Parameter, by its id, of those whose codes can be sent in its place.

    These are weights of two dimensions that all modules which have them quantize alike: by channel, symmetric, to
    nearest, and in the backward, too.
    """
    codings: dict[int, Coding | None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            coding = _coding(module) if name == "weight" and parameter.dim() == 2 else None
            if codings.setdefault(id(parameter), coding) != coding:
                codings[id(parameter)] = None
    return {key: coding for key, coding in codings.items() if coding is not None}


def _coding(module: nn.Module) -> Coding | None:
    if not isinstance(module, QuantizedModule):
        return None
    plan = module._quant_plan
    quantizer = plan.weight
    if quantizer is None or quantizer.format_name or plan.original_operands or plan.rotated:
        return None
    if not quantizer.symmetric or quantizer.full_range:
        return None
    if quantizer.granularity != "row" or quantizer.rounding != "nearest":
        return None
    return Coding(quantizer.bits, "column" if plan.transposed else "row")
