"""What formats would hold of a model: what its linear layers multiply, and the gradients that cross the wire.

Of layers their weights, and inputs and output gradients of a text; of parameters the gradients of that text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_quant.cli.diagnosing.common import Subject, run_through
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.recorder import Recorder, weight_matrix
from ds_quant.linear.heads import output_heads

TOKENS = 256
"""Of each batch, from its first on: as they lie, since they share scales."""


class _TensorRecorder(Recorder):
    kind = "formats"
    watches_inputs = True
    watches_output_gradients = True

    def __init__(self, left_out: set[str]) -> None:
        super().__init__()
        self._left_out = left_out
        self.found: dict[tuple[str, str], list[Tensor]] = {}
        """By (layer, what it is), fp32 on the CPU."""

    def prepare(self, name: str, module: nn.Module) -> None:
        if name not in self._left_out:
            self._keep(name, "weights", weight_matrix(module))

    def observe_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        self._keep(name, "activations", x.reshape(-1, x.shape[-1])[:TOKENS])

    def observe_grad_output(self, name: str, module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        self._keep(name, "gradients", grad_output.reshape(-1, grad_output.shape[-1])[:TOKENS])

    def _keep(self, name: str, what: str, x: Tensor) -> None:
        if name not in self._left_out:
            self.found.setdefault((name, what), []).append(x.detach().float().cpu().clone())


def record(subject: Subject, *, by_layer: bool) -> dict[str, list[Tensor]]:
    """Matrices [rows, features] by what they are, weights first; of each layer apart if `by_layer`. No output heads.

    Activations and gradients are those of the first TOKENS tokens of each batch.
    """
    model = subject.loaded.model
    recorder = _TensorRecorder(set(output_heads(model)))
    with attach(model, [recorder]):
        run_through(model, subject.batches, backward=True)
    found: dict[str, list[Tensor]] = {}
    for kind in ("weights", "activations", "gradients"):
        for (layer, what), matrices in recorder.found.items():
            if what == kind:
                name = f"{layer} {what}" if by_layer else what
                found.setdefault(f"{subject.loaded.name}: {name}", []).extend(matrices)
    return found


def record_gradients(subject: Subject, *, by_layer: bool) -> dict[str, list[Tensor]]:
    """Gradients of all parameters that a batch gives one, fp32 on the CPU, batch by batch; each apart if `by_layer`."""
    model = subject.loaded.model
    found: dict[str, list[Tensor]] = {}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for batch in subject.batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                what = f"{subject.loaded.name}: {f'{name} ' if by_layer else ''}parameter gradients"
                found.setdefault(what, []).append(gradient.detach().float().cpu())
    return found
