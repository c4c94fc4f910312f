"""What a diagnostic that watches linear layers is: sums a layer, filled by hooks, and a measurement made of them."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement


class Recorder:
    """Base of the diagnostics that `hooks.attach` fills. Each covers the micro-batches between two calls of `reset`.

    What it holds is sums and maxima over what was seen, in fp64, so that ranks can be joined before `result`: add up
    the tensors of `sums()` over all ranks, in place, and take the maximum of those of `maxima()`. Their number, order
    and shapes depend on the model alone, also where a rank never calls a layer.
    """

    kind: ClassVar[str]
    watches_inputs: ClassVar[bool] = False
    """Whether `observe_input` is to be called."""
    watches_output_gradients: ClassVar[bool] = False
    """Whether `observe_grad_output` is to be called, which holds x for the backward."""
    watches_parameter_gradients: ClassVar[bool] = False
    """Whether `observe_parameter_grad` is to be called."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def prepare(self, name: str, module: nn.Module) -> None:
        """Called once for each linear layer, in the model's order, before anything is observed."""

    def prepare_parameter(self, name: str, parameter: Tensor) -> None:
        """Called once for each parameter that takes a gradient, after `prepare`, if `watches_parameter_gradients`."""

    def observe_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        """x [..., in] of one call of a layer, in the dtype of its product. At ZeRO-3 `module.weight` is whole here."""

    def observe_grad_output(self, name: str, module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """x [..., in] and the gradient [..., out] of the output of the same call. `module.weight` is whole here."""

    def observe_parameter_grad(self, name: str, grad: Tensor) -> None:
        """The gradient of one parameter from one micro-batch on this rank, before any reduction or clipping."""

    def reset(self) -> None:
        """Reset: start a new measurement."""
        for tensor in (*self._sums.values(), *self._maxima.values()):
            tensor.zero_()

    def sums(self) -> list[Tensor]:
        """What adds up over ranks, fp64, to be changed in place."""
        return list(self._sums.values())

    def maxima(self) -> list[Tensor]:
        """Of what the maximum over ranks counts, fp64 and not negative, to be changed in place."""
        return list(self._maxima.values())

    def result(self, step: int | None) -> Measurement:
        """What was seen since `reset`.

        Raises:
            ConfigError: nothing was seen.
        """
        raise NotImplementedError

    def _check_seen(self, count: float) -> None:
        if not count:
            raise fail(
                f"diagnostics: {self.kind}",
                "no call of any linear layer it watches",
                "a forward (and for gradients a backward) of the model while the hooks are attached",
                "look at a model that runs its linear layers as modules; hooks do not fire in a compiled model",
            )


def features_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer, also where ZeRO-3 holds its weight in parts."""
    weight: Any = module.weight
    rows, columns = getattr(weight, "ds_shape", weight.shape)
    return (rows, columns) if is_transposed(module) else (columns, rows)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [in, out], as in transformers' Conv1D, and not [out, in]."""
    return bool(getattr(module, "transposed", not isinstance(module, nn.Linear) and hasattr(module, "nf")))


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight as [out, in], detached."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.t() if is_transposed(module) else weight


def zeros(count: int, like: Tensor) -> Tensor:
    """fp64 zeros on the device of `like`."""
    return torch.zeros(count, dtype=torch.float64, device=like.device)
