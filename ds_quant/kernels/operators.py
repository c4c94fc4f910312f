"""Operators of torch.ops.ds_quant: Python functions that a graph holds as one node, and never looks into.

What `torch.library.custom_op` makes costs twice as much a call: it has Python look for autograd's formula, which no
operator of ours has, and for results that share memory with arguments, which the tests look for (`opcheck`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo

_LIBRARY = torch.library.Library("ds_quant", "FRAGMENT")


def define(function: Callable[..., Any], fake: Callable[..., Any], *, schema: str | None = None) -> Any:
    """torch.ops.ds_quant.<the function's name>, of any device. It never alters its arguments.

    Results need no gradients, whatever the arguments do: what is differentiated is an autograd.Function that calls it.

    Args:
        function: what it computes, into new tensors. Nothing in it is compiled.
        fake: gives empty tensors like the function's results.
        schema: "(Tensor x) -> Tensor"; by default that of the function's annotations.
    """
    name = function.__name__
    _LIBRARY.define(
        name + (schema or torch.library.infer_schema(function, mutates_args=())), tags=torch.Tag.pt2_compliant_tag
    )

    # A backward may run while the code around it is compiled. torch.compiler.disable would import all of the compiler.
    _LIBRARY.impl(name, _disable_dynamo(function), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"ds_quant::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ds_quant, name).default
