"""`benchmark.py generated`: launches and bytes of compiled layers and steps, by the code that Inductor generates."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import choices, recipes
from benchmarks.generated_code import Graph, generate, recording
from benchmarks.single_layers import as_in_a_model
from ds_quant import QuantLinear
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import print_table
from ds_quant.kernels.adamw import compiled
from ds_quant.linear import operands
from ds_quant.numerics.integer import symmetric_levels
from ds_quant.optim import QuantAdamW

HELP = "launches and bytes of compiled layers on a GPU, by generated code, without a GPU"
BF16 = torch.bfloat16
LEVELS = symmetric_levels(8)
ROUNDINGS = ("nearest", "stochastic")
FP8 = {
    f"fp8, {gradient} gradient{scales}": recipes.w8a8g8_fp8(gradient, granularity)
    for gradient in ("e4m3", "e5m2")
    for scales, granularity in (("", None), (", a scale a tensor", "tensor"))
}
COLUMNS = ["", "Inductor", "libraries", "ours", "together", "MB"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Counts and measures nothing: has Inductor generate the code of compute capability 9.0 for a linear layer and "
        "an MLP with a norm, forward and backward, in bf16, int8 and fp8, for a norm and the codes that it gives, and "
        "for steps of AdamW under torch.compile; and counts what is launched: Inductor's kernels, calls of libraries, "
        "kernels of ours. Bytes are those that each launch reads and writes, a tensor once."
    )
    parser.add_argument("--hidden", type=int, default=2048, help="features (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of X (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the tables."""
    choices.at_least("--hidden", options.hidden, 16)
    choices.at_least("--tokens", options.tokens, 16)
    if importlib.util.find_spec("triton") is None:
        raise CommandError("generated: got no package triton; allowed: Linux on x86_64 with triton; pip install triton")
    hidden, tokens = options.hidden, options.tokens
    print(f"torch {torch.__version__}, compute capability 9.0, nothing was run")
    layers = []
    for name, make in (("linear", linear), ("norm, linear, GELU, linear", mlp)):
        for kind in ("bf16", *(f"int8, {rounding}" for rounding in ROUNDINGS), *FP8):
            layers.append(cells(f"{name}: {kind}", layer(make, kind, hidden, tokens)))
    print_table(f"forward and backward, {tokens} tokens, {hidden} features, the MLP's 4 times that", COLUMNS, layers)
    norms = [cells(name, norm_to_codes(name, tokens, hidden)) for name in QUANTIZERS]
    print_table(f"RMSNorm and int8 codes of bf16 [{tokens}, {hidden}], in both ways", COLUMNS, norms)
    steps = [cells(f"{bits} bits", adamw_step(bits, hidden * hidden)) for bits in (8, 4)]
    print_table(f"AdamW step of a parameter of {hidden}x{hidden} by DS_QUANT_KERNELS=compiled", COLUMNS, steps)


def cells(name: str, graphs: Sequence[Graph]) -> list[str]:
    """A row of `COLUMNS`: a forward and its backward together."""
    launched = [
        sum(len(part) for part in parts)
        for parts in zip(*((g.kernels, g.libraries, g.operator_launches) for g in graphs), strict=True)
    ]
    num_bytes = sum(graph.num_bytes for graph in graphs)
    return [name, *map(str, launched), str(sum(launched)), f"{num_bytes / 1e6:.0f}"]


def linear(kind: str, in_features: int, out_features: int) -> nn.Module:
    """A layer with a bias in bf16: "bf16", "int8, nearest", or one of FP8."""
    if kind == "bf16":
        return nn.Linear(in_features, out_features, dtype=BF16)
    section = FP8.get(kind) or recipes.w8a8g8("int8", rounding=kind.removeprefix("int8, "))
    return as_in_a_model(QuantLinear(in_features, out_features, dtype=BF16, config=section))


def mlp(kind: str, in_features: int, out_features: int) -> nn.Module:
    """A norm, and two layers with a GELU between them, four times as wide."""
    wide = 4 * in_features
    norm = nn.RMSNorm(in_features, dtype=BF16)
    return nn.Sequential(norm, linear(kind, in_features, wide), nn.GELU(), linear(kind, wide, out_features))


def layer(make: Callable[[str, int, int], nn.Module], kind: str, hidden: int, tokens: int) -> list[Graph]:
    """Forward and backward of what `make` gives, of a batch of sequences."""
    x = torch.empty(2, tokens // 2, hidden, dtype=BF16, requires_grad=True)
    return generate(make(kind, hidden, hidden), x)


def opaque(x: Tensor) -> tuple[Tensor, ...]:
    """The operator, which layers call in eager mode."""
    found: tuple[Tensor, ...] = torch.ops.ds_quant.quantize_operand(x, LEVELS, "row")
    return found


QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "as an operator": opaque,
    "fused, as layers do": functools.partial(operands.fusible_codes, levels=LEVELS),
}


def norm_to_codes(name: str, tokens: int, features: int) -> list[Graph]:
    """RMSNorm, and the codes and scales of its output by one of QUANTIZERS."""
    quantize = QUANTIZERS[name]

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return quantize(nn.functional.rms_norm(x, x.shape[-1:], weight))

    return generate(call, torch.empty(tokens, features, dtype=BF16), torch.empty(features, dtype=BF16))


def adamw_step(bits: int, numel: int) -> list[Graph]:
    """A step of one fp32 parameter with both moments in so many bits, `DS_QUANT_KERNELS=compiled`."""
    param = nn.Parameter(torch.zeros(numel))
    param.grad = torch.zeros(numel)
    moment: dict[str, Any] = {"bits": bits}
    optimizer = QuantAdamW([param], exp_avg=moment, exp_avg_sq=moment)
    optimizer.step()  # makes the moments
    with recording() as (found, backend):
        compile_step = functools.partial(compiled._compiled.__wrapped__, backend=backend)
        with mock.patch.object(compiled, "_compiled", compile_step):
            optimizer.step()
    return found
