"""A recorder whose failures never end the run, and the sums of what the ranks recorded."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.diagnostics.recorder import Recorder


class Guarded(Recorder):
    """A recorder whose failure ends its part of a look, and not the run; knows how long it took."""

    def __init__(self, recorder: Recorder):
        self.kind = recorder.kind  # type: ignore[misc]
        self.recorder = recorder
        self.watches_inputs = recorder.watches_inputs  # type: ignore[misc]
        self.watches_output_gradients = recorder.watches_output_gradients  # type: ignore[misc]
        self.watches_parameter_gradients = recorder.watches_parameter_gradients  # type: ignore[misc]
        self.begin_anew()

    def begin_anew(self) -> None:
        """What follows is another look."""
        self.error: Exception | None = None
        self.seconds = 0.0
        self.recorder.reset()

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """What `call` returns; None after an error, its own or an earlier one."""
        if self.error is not None:
            return None
        begin = time.perf_counter()
        try:
            return call(*args)
        except Exception as error:  # whatever it is, the training is worth more
            self.error = error
            return None
        finally:
            self.seconds += time.perf_counter() - begin

    def prepare(self, name: str, module: nn.Module) -> None:
        self.run(self.recorder.prepare, name, module)

    def prepare_parameter(self, name: str, parameter: Tensor) -> None:
        self.run(self.recorder.prepare_parameter, name, parameter)

    def observe_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        self.run(self.recorder.observe_input, name, module, x)

    def observe_grad_output(self, name: str, module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        self.run(self.recorder.observe_grad_output, name, module, x, grad_output)

    def observe_parameter_grad(self, name: str, grad: Tensor) -> None:
        self.run(self.recorder.observe_parameter_grad, name, grad)


def add_up(recorders: Sequence[Recorder], device: torch.device) -> None:
    """Have the recorders of each rank hold the sums and maxima of all. All ranks call it, with the same recorders.

    device: where the process group takes tensors.
    """
    if torch.distributed.get_world_size() == 1:
        return
    sums = [tensor for recorder in recorders for tensor in recorder.sums()]
    maxima = [tensor for recorder in recorders for tensor in recorder.maxima()]
    for tensors, op in ((sums, torch.distributed.ReduceOp.SUM), (maxima, torch.distributed.ReduceOp.MAX)):
        if tensors:
            flat = torch.cat([tensor.reshape(-1).to(device) for tensor in tensors])
            torch.distributed.all_reduce(flat, op=op)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
