"""What products of fp8 layers launch on a GPU with units for them: `torch._scaled_mm`, and copies of its operands."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_quant.kernels import fp8_units
from ds_quant.kernels.fp8 import aten, ops

_VIEWS = {"_unsafe_view", "alias", "as_strided", "detach", "expand", "select", "slice", "t", "transpose", "unsqueeze"}
_VIEWS |= {"view", "permute", "squeeze", "reshape"}


class Called(NamedTuple):
    """An operation of torch, which launches one kernel."""

    name: str
    copied_bytes: int
    """What it reads and writes if it is no product."""


def calls(node: torch.fx.Node) -> list[Called]:
    """Those of a node of a graph of fake tensors, if it is a product of an fp8 layer."""
    if node.target is not torch.ops.ds_quant.fp8_matmul.default:
        return []
    from torch.utils._python_dispatch import _disable_current_modes

    exact = (fp8_units._EXACT,) * len(fp8_units.PAIRS)
    units = fp8_units.Fp8Units("cuda", exact, exact)
    with (
        _disable_current_modes(),  # those of tracing
        mock.patch.object(aten, "fp8_units", return_value=units),
        mock.patch.object(aten, "wants_aligned", return_value=True),
        mock.patch.object(aten, "_one", lambda device: torch.empty((), device=device)),
        _Recording() as recorded,
    ):
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), _on_meta)
        aten.fp8_matmul(**inspect.signature(ops.fp8_matmul).bind(*args, **kwargs).arguments)
    return recorded.found


def _on_meta(node: torch.fx.Node) -> Tensor:
    fake = node.meta["val"]
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")


class _Recording(TorchDispatchMode):
    """Notes what is called, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Called] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _VIEWS and not name.startswith("empty"):
            tensors = [each for each in (*args, result) if isinstance(each, Tensor)]
            copied = 0 if name == "_scaled_mm" else sum(each.numel() * each.element_size() for each in tensors)
            self.found.append(Called(name, copied))
        return result
