"""What `benchmark.py host` times: calls with next to no work, so that the time is the host's.

Ours take the way that they take on a GPU: everything of it but the driver's part of a launch, and the kernels. Triton
finds the kernel for each launch, compiled for sm_90 in the first call. Peers compute on the CPU what they are asked to,
of so few elements that this is microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import comm_host, gpus_way, recipes
from benchmarks.single_layers import as_in_a_model
from ds_quant import QuantAdamW, QuantLinear, weights_changed
from ds_quant.kernels.compiling import compiled_with
from ds_quant.kernels.int8 import ops, triton_quantize
from ds_quant.numerics import products
from ds_quant.numerics.integer import symmetric_levels

SIZE = 16
"""Rows and columns: the fewest that Triton reads in place."""
LEVELS = symmetric_levels(8)
NUM_PARAMETERS = 148
"""Of GPT-2 small."""
Call = Callable[[], object]


class Part(NamedTuple):
    """Calls that are compared."""

    title: str
    base: str
    """The peer that ratios are to."""
    calls: dict[str, Call]
    goals: dict[str, float] = {}  # noqa: RUF012  of a named tuple that nobody writes to
    """Seconds that are promised."""


@contextmanager
def calls(ranks: int) -> Iterator[Part]:
    """One call of an operation on a matrix, however it is made."""
    x, y = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    add = torch.compile(lambda a, b: a + b, dynamic=False)
    quantize = compiled_with(products.quantize_rows, LEVELS)
    codes, turned = (torch.empty(SIZE, SIZE, dtype=torch.int8) for _ in range(2))
    rounding = triton_quantize.Rounding(LEVELS, None)
    launch = triton_quantize.groups(x, rounding, "row", None, codes, turned, torch.empty(SIZE), 0)
    with _as_on_a_gpu():
        yield Part(
            "one operation on a matrix",
            "torch: x + y",
            {
                "torch: x + y": lambda: x + y,
                "torch: x + y, compiled": lambda: add(x, y),
                "C++ kernel, by the registry": lambda: ops.quantize_rows(x, LEVELS),
                "the same as an operator of a graph": lambda: torch.ops.ds_quant.quantize_rows(x, LEVELS),
                "its definition, compiled": lambda: quantize(x),
                "Triton's kernel, by the registry": lambda: ops.quantize_operand(x, LEVELS, "row"),
                "a launch of Triton's alone": lambda: gpus_way.bind(launch, x.device),
            },
        )


@contextmanager
def layers(ranks: int) -> Iterator[Part]:
    """Forward and backward of one layer, with the codes of its weight, as after a step of the optimizer."""
    base = "nn.Linear"
    modules: dict[str, nn.Module] = {base: nn.Linear(SIZE, SIZE)}
    for rounding in ("nearest", "stochastic"):
        section = recipes.w8a8g8("int8", rounding=rounding)
        modules[f"int8, {rounding}"] = as_in_a_model(QuantLinear(SIZE, SIZE, config=section))
    made = {name: _forward_backward(module, module) for name, module in modules.items()}
    with _as_on_a_gpu():
        for name, module in modules.items():
            made[f"{name}, compiled"] = _forward_backward(module, torch.compile(module, dynamic=False, fullgraph=True))
        yield Part("a layer, forward and backward", base, made)


def _forward_backward(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Call:
    values, g = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)

    def forward_backward() -> None:
        module.zero_grad()
        weights_changed()
        x = values.detach().requires_grad_()  # another tensor, whose codes no layer has
        call(x).backward(g)

    return forward_backward


@contextmanager
def optimizer(ranks: int) -> Iterator[Part]:
    """A step of as many small parameters as GPT-2 small has parameters."""
    base = "torch AdamW, fused"
    moment: dict[str, Any] = {"bits": 8}
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        base: lambda params: torch.optim.AdamW(params, fused=True),
        "torch AdamW, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        "QuantAdamW, 8 bits": lambda params: QuantAdamW(params, exp_avg=moment, exp_avg_sq=moment),
        "the same, one flat parameter": lambda params: QuantAdamW(params[:1], exp_avg=moment, exp_avg_sq=moment),
    }
    made: dict[str, Call] = {}
    for name, make in makers.items():
        params = [nn.Parameter(torch.zeros(256)) for _ in range(NUM_PARAMETERS)]
        for param in params:
            param.grad = torch.zeros(256)
        made[name] = make(params).step
    with _as_on_a_gpu():
        yield Part(f"a step of AdamW, {NUM_PARAMETERS} parameters", base, made)


@contextmanager
def all_reduce(ranks: int) -> Iterator[Part]:
    """All gradients of GPT-2 small, 124M elements, in one bucket; see `comm_host`. Compiled calls return at once."""
    buckets = [comm_host.bucket_of(numels) for numels in comm_host.cut(float("inf"))]
    ((tensor, _),) = buckets
    base = "dist.all_reduce"

    def in_bf16() -> None:
        narrow = tensor.to(torch.bfloat16).mul_(1 / ranks)
        dist.all_reduce(narrow)
        tensor.copy_(narrow)

    with comm_host.fake_group(ranks), comm_host.without_device_work():
        ours = {f"8 bits, {name}": comm_host.all_reduces(buckets, s) for name, s in comm_host.SETTINGS.items()}
        peers: dict[str, Call] = {base: lambda: dist.all_reduce(tensor), f"{base}, cast to bf16": in_bf16}
        goals = dict.fromkeys(ours, 1e-3)
        yield Part(f"an all-reduce of 124M elements, {ranks} ranks", base, {**peers, **ours}, goals)


PARTS = {"calls": calls, "layers": layers, "optimizer": optimizer, "all-reduce": all_reduce}


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    from ds_quant.kernels.adamw import cuda

    with ExitStack() as stack:
        stack.enter_context(gpus_way.on_cpu(cuda.adamw_))
        stack.enter_context(gpus_way.launching(gpus_way.bind))
        stack.enter_context(gpus_way.driver(90))
        yield
