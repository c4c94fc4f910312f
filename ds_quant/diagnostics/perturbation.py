"""Moves the parameters of a model along directions and brings every bit back."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.recorder import is_transposed
from ds_quant.linear.weight_codes import weights_changed

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) to the mean loss of the batch, a scalar."""


def language_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a Hugging Face model on a batch with labels."""
    loss: Tensor = model(**batch).loss
    return loss


def check_movable(model: nn.Module, where: str) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name, a tied one once.

    Raises:
        ConfigError: there are none, they are partitioned by ZeRO-3, or too coarse to be moved by a small step.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise fail(where, "a model without trainable parameters", "at least one", "unfreeze some")
    for name, parameter in found.items():
        if hasattr(parameter, "ds_shape"):
            fix = "run ds_quant diagnose on a checkpoint of it"
            raise fail(where, f"{name}, partitioned by ZeRO-3", "whole parameters", fix)
        if parameter.dtype not in (torch.float32, torch.float64):
            # A step of norm 0.05 over millions of weights is far below half a unit of bf16's eight bits.
            raise fail(where, f"{name} in {parameter.dtype}", "float32 or float64", "load the model in float32")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout, so that losses differ only by the perturbation."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def restored(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the parameters, whose bits are theirs again afterwards."""
    parameters = list(parameters)
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        yield copies
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
        weights_changed()


@torch.no_grad()
def move(parameters: Iterable[Tensor], origin: Iterable[Tensor], steps: Iterable[tuple[float, list[Tensor]]]) -> None:
    """Set each parameter to origin + sum of factor * direction."""
    steps = list(steps)
    for number, (parameter, begin) in enumerate(zip(parameters, origin, strict=True)):
        moved = begin.clone()
        for factor, direction in steps:
            moved.add_(direction[number], alpha=factor)
        parameter.copy_(moved)
    weights_changed()


def filter_normalized_direction(model: nn.Module, seed: int) -> list[Tensor]:
    """A random direction for each trainable parameter, filter-normalized (Li et al. 2018, arXiv 1712.09913).

    Gaussian, with each filter scaled to the norm of the model's own; a filter is what makes one output feature: a row
    of a weight [out, in], a column of Conv1D's [in, out], a row of an embedding. Biases and the weights of norms stay.
    The numbers depend on the seed and the parameter's name alone.
    """
    transposed = {id(m.weight) for m in model.modules() if hasattr(m, "weight") and is_transposed(m)}
    directions = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.detach()
        if weight.dim() < 2:
            directions.append(torch.zeros_like(weight))
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)
        axes = (0,) if id(parameter) in transposed else tuple(range(1, weight.dim()))
        norm = noise.norm(dim=axes, keepdim=True)
        directions.append(noise * (weight.norm(dim=axes, keepdim=True) / torch.where(norm > 0, norm, 1.0)))
    return directions
