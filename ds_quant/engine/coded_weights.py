"""Which weights of a model nobody reads but quantized layers, and these by codes that can be sent in their place."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ds_quant.base.errors import fail
from ds_quant.base.log import say
from ds_quant.comm.weight_difference import describe_weights
from ds_quant.comm.weight_layout import Coding, Weight
from ds_quant.config import WeightCommunicationConfig
from ds_quant.linear.modules import QuantizedModule


def coded_weights(model: nn.Module) -> dict[int, Coding]:
    """How the layers quantize a Parameter, by its id, of those whose codes can be sent in its place.

    These are weights of two dimensions that all modules which have them quantize alike: by channel, symmetric, to
    nearest, and in the backward, too.
    """
    codings: dict[int, Coding | None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 keeps the whole's
            coding = _coding(module) if name == "weight" and len(shape) == 2 else None
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


def check_any_coded(config: WeightCommunicationConfig, weights: Iterable[Weight]) -> None:
    """Raise ConfigError where codes are asked for, and there are none to send."""
    if config.mode == "codes" and not any(weight.coding for weight in weights):
        raise fail(
            "ds_quant.communication.weight.mode",
            config.mode,
            "a model with trained weights that only quantized layers read",
            'see ds_quant.linear.include and exclude, or use mode "difference"',
        )


def tell_codes(config: WeightCommunicationConfig, weights: Sequence[Weight], what: str) -> None:
    """Say how much of `weights`, which are `what`, is sent as codes, and what is not."""

    def numel(of: Iterable[Weight]) -> int:
        return sum(torch.Size(weight.shape).numel() for weight in of)

    share = 100 * numel(weight for weight in weights if weight.coding) / numel(weights)
    bits = sorted({weight.coding.bits for weight in weights if weight.coding})
    whole = [weight.name for weight in weights if weight.coding is None and len(weight.shape) > 1]
    say(
        f"weights cross the wire as {describe_weights(config)}, in {' and '.join(map(str, bits))} bits: "
        f"{share:.1f}% of the {what}"
    )
    if whole:
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        say(f"in their dtype, since not only quantized layers read them: {', '.join(whole[:3])}{more}")
