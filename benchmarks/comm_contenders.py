"""Ways to sum gradients over ranks: torch's collectives and DDP hooks, and ours. Numbers first, then how they run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BLOCK_SIZE = 256
SCALE_BYTES = 4
ALL_REDUCE, REDUCE_SCATTER, DDP = "all-reduce", "reduce-scatter", "DDP backward"


class Run(NamedTuple):
    """A contender that is ready: `before` is not timed, `call` is; `result` is what this rank has in the end."""

    before: Callable[[], object]
    call: Callable[[], object]
    result: Callable[[], Tensor]


class Contender(NamedTuple):
    """One way to sum `numel` fp32 gradients."""

    name: str
    group: str
    make: Callable[[Tensor], Run]
    """Of this rank's gradients, fp32, one after the other."""
    sent: Callable[[int, int], float]
    """Bytes that a rank sends, by formula, for (numel, ranks)."""
    sent_over_nccl: Callable[[int, int], float] | None = None
    """The same over NCCL, where that is less than over gloo."""


def all_reduced(num_bytes: float, ranks: int) -> float:
    """What a rank sends for an all-reduce of `num_bytes`."""
    return 2 * scattered(num_bytes, ranks)


def scattered(num_bytes: float, ranks: int) -> float:
    """What a rank sends for a reduce-scatter of `num_bytes`."""
    return (ranks - 1) / ranks * num_bytes


def quantized(numel: int, bits: int) -> float:
    """Bytes of codes and scales."""
    return numel * bits / 8 + math.ceil(numel / BLOCK_SIZE) * SCALE_BYTES


def _all_reduce(dtype: torch.dtype) -> Callable[[Tensor], Run]:
    def make(gradients: Tensor) -> Run:
        buffer = gradients.to(dtype, copy=True)
        return Run(lambda: buffer.copy_(gradients), lambda: dist.all_reduce(buffer), lambda: buffer)

    return make


def _reduce_scatter(dtype: torch.dtype) -> Callable[[Tensor], Run]:
    # What the second is called since torch 2.13.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def make(gradients: Tensor) -> Run:
        buffer = gradients.to(dtype, copy=True)
        output = buffer.new_empty(buffer.numel() // dist.get_world_size())
        return Run(lambda: buffer.copy_(gradients), lambda: reduce_scatter(output, buffer), lambda: output)

    return make


def _scatter_and_sum(dtype: torch.dtype) -> Callable[[Tensor], Run]:
    """A reduce-scatter that sends each element once, as ours does and gloo's own does not."""

    def make(gradients: Tensor) -> Run:
        buffer = gradients.to(dtype, copy=True)
        received = torch.empty_like(buffer)
        output = buffer.new_empty(buffer.numel() // dist.get_world_size())

        def call() -> None:
            dist.all_to_all_single(received, buffer)
            torch.sum(received.view(-1, output.numel()), 0, out=output)

        return Run(lambda: buffer.copy_(gradients), call, lambda: output)

    return make


def _ours(bits: int, rotation: str = "none", *, scatters: bool = False) -> Callable[[Tensor], Run]:
    """Our all-reduce, or reduce-scatter."""

    def make(gradients: Tensor) -> Run:
        from ds_quant import comm

        buffer = gradients.clone()
        options: dict[str, Any] = {"bits": bits, "block_size": BLOCK_SIZE, "rotation": rotation}
        if not scatters:
            return Run(lambda: buffer.copy_(gradients), lambda: comm.all_reduce(buffer, **options), lambda: buffer)
        output = buffer.new_empty(buffer.numel() // dist.get_world_size())
        return Run(
            lambda: buffer.copy_(gradients), lambda: comm.reduce_scatter(output, buffer, **options), lambda: output
        )

    return make


class _Gradients(nn.Module):
    """A module whose gradients are given: its backward costs next to nothing but writing them."""

    def __init__(self, gradients: Tensor) -> None:
        super().__init__()
        shapes = matrices(gradients.numel())
        parts = gradients.split([math.prod(shape) for shape in shapes])
        self.weights = nn.ParameterList(gradients.new_zeros(shape) for shape in shapes)
        self._gradients = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(self) -> Tensor:
        pairs = zip(self.weights, self._gradients, strict=True)
        return torch.stack([(weight * gradient).sum() for weight, gradient in pairs]).sum()


def matrices(numel: int, width: int = 1024) -> list[tuple[int, ...]]:
    """Shapes of parameters with `numel` elements: square matrices, one that is lower, a vector of what is left."""
    width = min(width, math.isqrt(numel))
    count, rest = divmod(numel, width * width)
    rows, left = divmod(rest, width)
    shapes: list[tuple[int, ...]] = [(width, width)] * count
    return shapes + ([(rows, width)] if rows else []) + ([(left,)] if left else [])


@dataclass(frozen=True)
class _DDP:
    """Makes the backward of DistributedDataParallel with a hook."""

    register: Callable[[DistributedDataParallel], object] = lambda ddp: None
    one_bucket: bool = False

    def __call__(self, gradients: Tensor) -> Run:
        everything = gradients.nbytes // 2**20 + 1
        ddp = DistributedDataParallel(_Gradients(gradients), bucket_cap_mb=everything if self.one_bucket else None)
        self.register(ddp)
        loss: list[Tensor] = []

        def before() -> None:
            ddp.zero_grad()
            loss[:] = [ddp()]

        def result() -> Tensor:
            # DDP takes the mean over the ranks.
            return torch.cat([p.grad.flatten() for p in ddp.parameters() if p.grad is not None]) * dist.get_world_size()

        # DDP rebuilds its buckets after the first backward, and PowerSGD sends the first two as they are.
        for _ in range(3):
            before()
            loss[0].backward()
        return Run(before, lambda: loss[0].backward(), result)


def _fp16(ddp: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    ddp.register_comm_hook(dist.group.WORLD, default_hooks.fp16_compress_hook)


def _power_sgd(ddp: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        process_group=dist.group.WORLD, matrix_approximation_rank=1, start_powerSGD_iter=2
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _our_hook(bits: int) -> Callable[[DistributedDataParallel], None]:
    def register(ddp: DistributedDataParallel) -> None:
        from ds_quant import comm

        ddp.register_comm_hook(comm.DDPState(ddp, bits=bits, block_size=BLOCK_SIZE), comm.ddp_hook)

    return register


def _power_sgd_bytes(numel: int) -> float:
    return 4 * sum(sum(shape) for shape in matrices(numel))


BASE = {ALL_REDUCE: "fp32 all-reduce", REDUCE_SCATTER: "fp32 all-reduce", DDP: "DDP without hook"}
"""By group: whom the ratio is to."""
PLAIN = {
    ALL_REDUCE: ("fp32 all-reduce", "bf16 all-reduce"),
    REDUCE_SCATTER: ("fp32 reduce-scatter", "bf16 reduce-scatter"),
    DDP: ("DDP without hook", None),
}
"""By group: the same in fp32 and in bf16."""

ALL = (
    Contender("fp32 all-reduce", ALL_REDUCE, _all_reduce(torch.float32), lambda n, w: all_reduced(4 * n, w)),
    Contender("bf16 all-reduce", ALL_REDUCE, _all_reduce(torch.bfloat16), lambda n, w: all_reduced(2 * n, w)),
    Contender("8 bits all-reduce", ALL_REDUCE, _ours(8), lambda n, w: all_reduced(quantized(n, 8), w)),
    Contender("4 bits all-reduce", ALL_REDUCE, _ours(4), lambda n, w: all_reduced(quantized(n, 4), w)),
    Contender(
        "4 bits hadamard all-reduce",
        ALL_REDUCE,
        _ours(4, "hadamard"),
        lambda n, w: all_reduced(quantized(n, 4), w),
    ),
    # gloo's reduce-scatter is an all-reduce whose result is cut: it sends twice what it would have to.
    Contender(
        "fp32 reduce-scatter",
        REDUCE_SCATTER,
        _reduce_scatter(torch.float32),
        lambda n, w: all_reduced(4 * n, w),
        lambda n, w: scattered(4 * n, w),
    ),
    Contender(
        "bf16 reduce-scatter",
        REDUCE_SCATTER,
        _reduce_scatter(torch.bfloat16),
        lambda n, w: all_reduced(2 * n, w),
        lambda n, w: scattered(2 * n, w),
    ),
    Contender(
        "fp32 reduce-scatter a2a", REDUCE_SCATTER, _scatter_and_sum(torch.float32), lambda n, w: scattered(4 * n, w)
    ),
    Contender(
        "bf16 reduce-scatter a2a", REDUCE_SCATTER, _scatter_and_sum(torch.bfloat16), lambda n, w: scattered(2 * n, w)
    ),
    Contender(
        "8 bits reduce-scatter", REDUCE_SCATTER, _ours(8, scatters=True), lambda n, w: scattered(quantized(n, 8), w)
    ),
    Contender(
        "4 bits reduce-scatter", REDUCE_SCATTER, _ours(4, scatters=True), lambda n, w: scattered(quantized(n, 4), w)
    ),
    Contender(
        "4 bits hadamard reduce-scatter",
        REDUCE_SCATTER,
        _ours(4, "hadamard", scatters=True),
        lambda n, w: scattered(quantized(n, 4), w),
    ),
    Contender("DDP without hook", DDP, _DDP(), lambda n, w: all_reduced(4 * n, w)),
    Contender("DDP fp16_compress_hook", DDP, _DDP(_fp16), lambda n, w: all_reduced(2 * n, w)),
    # It starts collectives from gloo's threads: with several buckets ranks do so in different orders and wait for ever.
    Contender(
        "DDP PowerSGD rank 1", DDP, _DDP(_power_sgd, one_bucket=True), lambda n, w: all_reduced(_power_sgd_bytes(n), w)
    ),
    Contender("DDP 8 bits", DDP, _DDP(_our_hook(8)), lambda n, w: all_reduced(quantized(n, 8), w)),
    Contender("DDP 4 bits", DDP, _DDP(_our_hook(4)), lambda n, w: all_reduced(quantized(n, 4), w)),
)
