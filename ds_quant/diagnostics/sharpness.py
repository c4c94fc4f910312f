"""m-sharpness: how far the loss rises one small step up the gradient (arXiv 2407.11722; SAM, arXiv 2010.01412).

sharpness = loss(w + rho g / |g|) - loss(w), with g the gradient on the same batch, |g| its norm over all parameters and
rho = 0.05; the mean over batches of m sequences. The gradient is the one of training: through the quantizers as the
layers pass it.
"""

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.perturbation import Loss, check_movable, evaluating, language_loss, move, restored

RHO = 0.05


def sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Loss = language_loss,
    *,
    rho: float = RHO,
    step: int | None = None,
) -> Measurement:
    """The m-sharpness of `model` over `batches` of m sequences each; parameters end with the bits that they had.

    The model is evaluated, without dropout. Gradients that parameters hold are kept.

    Raises:
        ConfigError: rho is not positive, no batches, a loss that is not finite, parameters that cannot be moved.
    """
    where = "diagnostics: sharpness"
    if not (math.isfinite(rho) and rho > 0):
        raise fail(f"{where}: rho", rho, "a positive number", f"use the paper's {RHO}")
    parameters = list(check_movable(model, where).values())
    rows: list[Row] = []
    with evaluating(model), restored(parameters) as origin:
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                loss = loss_of(model, batch)
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            before = float(loss.detach())
            direction = [
                torch.zeros_like(p) if grad is None else grad.detach()
                for p, grad in zip(parameters, grads, strict=True)
            ]
            norm = _norm(direction)
            if not math.isfinite(before) or not math.isfinite(norm):
                got = f"a loss of {before} with a gradient norm of {norm} on batch {number}"
                raise fail(where, got, "finite ones", "look at a checkpoint from before the run diverged")
            if norm:
                move(parameters, origin, [(rho / norm, direction)])
            with torch.no_grad():
                perturbed = float(loss_of(model, batch))
            move(parameters, origin, [])
            rows.append(
                {
                    "batch": number,
                    "loss": before,
                    "perturbed_loss": perturbed,
                    "sharpness": perturbed - before,
                    "gradient_norm": norm,
                }
            )
    if not rows:
        raise fail(where, "no batches", "at least one", "give more text")
    values = [float(row["sharpness"] or 0) for row in rows]
    scalars = {
        "sharpness": statistics.fmean(values),
        "loss": statistics.fmean(float(row["loss"] or 0) for row in rows),
    }
    if len(values) > 1:
        scalars["standard_error"] = statistics.stdev(values) / math.sqrt(len(values))
    settings: dict[str, Any] = {"rho": rho, "batches": len(rows)}
    return Measurement("sharpness", step, scalars, rows, settings)


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
