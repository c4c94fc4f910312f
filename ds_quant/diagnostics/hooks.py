"""Lets recorders see what linear layers see, and changes nothing: not a value, not a random bit.

Each linear layer gets one forward hook, before those of others: at ZeRO-3 the weight is whole then, in the forward and,
because DeepSpeed gathers it in a node of the graph that lies behind ours, in the backward too. The gradient of the
output is read in an identity node behind the layer that saves the layer's input as autograd saves any tensor: under
activation checkpointing it is dropped and made again with the rest, so that a look costs no more memory there.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.recorder import Recorder
from ds_quant.linear.convert import linear_modules


@contextmanager
def attach(model: nn.Module, recorders: Iterable[Recorder]) -> Iterator[None]:
    """Have `recorders` watch the linear layers of `model` while this lasts; afterwards no hook is left.

    A forward that begins within must end its backward within: the recomputation of activation checkpointing expects
    the graph that it saw. Layers inside of a compiled model do not call hooks.

    Raises:
        ConfigError: the model has no linear layer.
    """
    recorders = list(recorders)
    layers = linear_modules(model)
    if not layers:
        raise fail(
            "diagnostics",
            f"a model ({type(model).__name__}) without linear layers",
            "modules of type nn.Linear, transformers' Conv1D or a class given to ds_quant.register_module",
            "register the model's own linear class",
        )
    handles = []
    try:
        for name, module in layers.items():
            for recorder in recorders:
                recorder.prepare(name, module)
            hook = _LayerHook(name, recorders)
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        watching = [recorder for recorder in recorders if recorder.watches_parameter_gradients]
        for name, parameter in model.named_parameters() if watching else ():
            if parameter.requires_grad:
                for recorder in watching:
                    recorder.prepare_parameter(name, parameter)
                handles.append(parameter.register_hook(partial(_show_parameter_grad, name, watching)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _LayerHook:
    """Forward hook of one layer."""

    def __init__(self, name: str, recorders: list[Recorder]):
        self._name = name
        self._of_inputs = [recorder for recorder in recorders if recorder.watches_inputs]
        self._of_gradients = [recorder for recorder in recorders if recorder.watches_output_gradients]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        # Within a backward this is a layer that is computed again.
        if self._of_inputs and torch._C._current_graph_task_id() == -1:
            with _plain(x):
                seen = x.detach().to(dtype)
                for recorder in self._of_inputs:
                    recorder.observe_input(self._name, module, seen)
        if not self._of_gradients or not output.requires_grad:
            return None
        return _ShowGradient.apply(output, x.detach(), partial(self._show_gradient, module, dtype))

    def _show_gradient(self, module: nn.Module, dtype: torch.dtype, x: Tensor, grad_output: Tensor) -> None:
        with _plain(x):
            x = x.to(dtype)
            for recorder in self._of_gradients:
                recorder.observe_grad_output(self._name, module, x, grad_output.detach())


class _ShowGradient(torch.autograd.Function):
    """The identity. Its backward hands x and the gradient to `show`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, show: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.show = show
        return output.detach()  # not a view in autograd's eyes, so that a model may change it in place

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.show(x, grad_output)
        return grad_output, None, None


def _show_parameter_grad(name: str, recorders: list[Recorder], grad: Tensor) -> None:
    with _plain(grad):
        for recorder in recorders:
            recorder.observe_parameter_grad(name, grad.detach())


@contextmanager
def _plain(tensor: Tensor) -> Iterator[None]:
    """No graph, and fp32 products that are fp32."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield
