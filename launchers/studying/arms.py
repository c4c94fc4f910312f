"""One trained model changed in one respect at a time: its outliers, or how flat its loss is, and not the other.

Outliers are changed where the loss as a function of the weights stays what it is:

    clipped       each weight at 3 RMS of its row, each activation at 3 RMS of its token. Rows of Gaussian numbers lose
                  0.3% of theirs, so that little but outliers is cut
    rotated       both operands of each product by the same orthogonal matrix, a randomized Hadamard in blocks of 128
                  (`numerics.rotation`): the function and its derivatives stay, to rounding; peaks spread over a block
    spread_a      one channel in 32 of each norm before a linear layer times 8, the columns of the weights that read it
                  by 8: the same function, with outliers in activations
    spread_w      the other way round: the same function, with outliers in weights

Sharpness is changed where scales relative to their groups stay what they are:

    rescaled      values and up projections times 8, output and down projections by 8: the same function, and since
                  quantizers have scales, the same codes of weights and activations bit for bit; only the length of the
                  gradient and of a step up it are others
    flattened     STEPS more steps of SAM (arXiv 2010.01412): the gradient is that of the weights moved RHO up the
                  gradient, which is what m-sharpness measures
    continued     the same steps without it, on the same text: what `flattened` is held against

8 is a power of two, so that rescaling rounds nothing. SAM and no noise in the weights: it lowers the sharpness that
the paper measures, by its own definition, and nothing has to be tuned but its radius.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.diagnostics.perturbation import move, restored
from ds_quant.numerics.rotation import rotate_rows

CLIP = 3.0
"""RMS of a row."""
BLOCK = 128
"""Of the rotation."""
FACTOR = 8.0
ONE_IN = 32
"""Channels."""
STEPS, RHO, RATE_DIVISOR = 32, 0.2, 10.0
"""Of SAM; its learning rate is a tenth of the training's peak."""

Batch = dict[str, Tensor]
Operands = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [..., in], weight [out, in]) of a product to those that are quantized and multiplied in their place."""


@dataclass(frozen=True)
class Arm:
    """One change."""

    name: str
    what: str
    of: str
    """What it is held against; empty: nothing."""
    change: Callable[[Any, Iterable[Batch], float], None] | None = None
    """(model, batches of training text, learning rate): changes weights in place."""
    operands: Operands | None = None


def clipped(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both at CLIP times the RMS of their rows."""
    return _clip(x), _clip(weight)


def rotated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both along what the product contracts."""
    return rotate_rows(x.flatten(0, -2), BLOCK).view_as(x), rotate_rows(weight, BLOCK)


def _clip(x: Tensor) -> Tensor:
    limit = CLIP * x.detach().square().mean(-1, keepdim=True).sqrt()
    return torch.minimum(torch.maximum(x, -limit), limit)


@torch.no_grad()
def spread(model: Any, factor: float) -> None:
    """Every ONE_IN-th channel of a Llama's norms times `factor`, and what reads it by `factor`."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[::ONE_IN] *= factor
            for reader in readers:
                reader.weight[:, ::ONE_IN] /= factor


@torch.no_grad()
def rescale(model: Any, factor: float) -> None:
    """A Llama's values and up projections times `factor`, which are linear, and what reads them by `factor`."""
    for layer in model.model.layers:
        for first, second in (
            (layer.self_attn.v_proj, layer.self_attn.o_proj),
            (layer.mlp.up_proj, layer.mlp.down_proj),
        ):
            first.weight *= factor
            second.weight /= factor


def train_on(model: nn.Module, batches: Iterable[Batch], rate: float, *, rho: float) -> None:
    """A step of AdamW for each batch, with the gradient of the weights moved `rho` up the gradient; 0: AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if rho:
            gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
            assert len(gradients) == len(parameters)
            norm = float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
            with restored(parameters) as origin:
                if norm:
                    move(parameters, origin, [(rho / norm, gradients)])
                optimizer.zero_grad()
                model(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


ARMS = {
    arm.name: arm
    for arm in (
        Arm("trained", "as it was trained", ""),
        Arm("clipped", f"operands clipped at {CLIP:g} RMS", "trained", operands=clipped),
        Arm("rotated", f"operands rotated in blocks of {BLOCK}", "trained", operands=rotated),
        Arm(
            "spread_a",
            f"one channel in {ONE_IN} of activations times {FACTOR:g}",
            "trained",
            lambda model, batches, rate: spread(model, FACTOR),
        ),
        Arm(
            "spread_w",
            f"one column in {ONE_IN} of weights times {FACTOR:g}",
            "trained",
            lambda model, batches, rate: spread(model, 1 / FACTOR),
        ),
        Arm(
            "rescaled",
            f"layers times {FACTOR:g}, the next by {FACTOR:g}",
            "trained",
            lambda model, batches, rate: rescale(model, FACTOR),
        ),
        Arm(
            "continued",
            f"{STEPS} more steps",
            "",
            lambda model, batches, rate: train_on(model, batches, rate / RATE_DIVISOR, rho=0.0),
        ),
        Arm(
            "flattened",
            f"{STEPS} more steps of SAM, radius {RHO:g}",
            "continued",
            lambda model, batches, rate: train_on(model, batches, rate / RATE_DIVISOR, rho=RHO),
        ),
    )
}
