"""`benchmark.py roofline`: what an int8 layer should take on a GPU, from its shapes and the device's rates alone.

Nothing here is measured on a GPU. The rule, for one linear layer, forward and backward, with T tokens:

    bf16 = operations / rate of bf16                                    operations = 6 T in out, of three products
    int8 = operations / rate of int8
           + bytes / bandwidth         of what quantizing reads and writes, and what results cost beyond bf16's own
           + instructions / issue rate of the random bits, where gradients are rounded stochastically

What a GEMM itself reads and writes is within its rate, in both columns alike. Launches have no time of their own: that
holds where kernels follow each other without a gap, as in a CUDA graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import markdown_table, print_table

HELP = "predicted time of int8 layers on a GPU, by bytes, operations and launches"

BEGIN, END = "<!-- benchmark.py roofline: begin -->", "<!-- benchmark.py roofline: end -->"
_MICRO = 1e6


class Rates(NamedTuple):
    """What a device reaches, not what its data sheet says."""

    name: str
    bf16: float
    """Operations a second of a large GEMM."""
    int8: float
    bandwidth: float
    """Bytes a second."""
    instructions: float
    """Instructions a second of all threads, where nothing else holds them up."""


H100 = Rates("H100 SXM", 620e12, 1150e12, 2.6e12, 0.6 * 132 * 128 * 1.755e9)
"""The instruction rate: 60% of what 132 multiprocessors of 128 lanes issue at 1755 MHz."""


class Way(NamedTuple):
    """A way to compute a layer, by what it moves: bytes an element."""

    name: str
    x: float
    """Quantizing X [T, in], all reads and writes, copies included."""
    w: float
    """Quantizing W [out, in]."""
    g: float
    """Quantizing G [T, out], for both products of the backward."""
    results: float
    """More than bf16 moves for each element of Y, dX and dW."""
    random_instructions: float
    """More for each element of G where it is rounded stochastically."""
    launches: int | None
    """Forward and backward with rounding to nearest, without the sum for the bias; None: not counted."""
    random_launches: int | None
    """More with stochastic rounding."""


BEFORE = Way("before", x=9, w=3, g=14, results=8, random_instructions=73, launches=None, random_launches=106)
"""The code of 2026-11-28. A read of its generated code for sm_90 says: 61 instructions an element of G and 134 with
random bits, 53 launches for each of a layer's two keys, and int32 results written and read again, 8 bytes an element.
The other bytes are the whole numbers that give the times of that reading, five layers to within 2 us."""

AFTER = Way("after", x=4, w=4, g=6, results=0, random_instructions=56, launches=7, random_launches=0)
"""Codes in the two orientations that products take, scales and bias in the GEMM's epilogue. By count: X and W are read
once from memory (2; a row is read again from a cache) and their codes are written twice (1 + 1); G is read for the
maxima of rows and columns (2), read again (2), and written for each product (1 + 1). The kernel that writes G's codes
has 58 PTX instructions an element for sm_90, and 114 with random bits. Launches: X 1, W 1, G 2, and a product each for
Y, dX and dW; tests/kernels/int8_quantize_in_interpreter.py counts them."""

UNCACHED = AFTER._replace(name="after, nothing cached", x=6, w=6)
"""Where no cache has what the second read of a row needs: all programs together read more than it holds (64 MiB of X at
4096 features and 8192 tokens; an H100's holds 50 MB, in two halves)."""

LAYERS = (
    (768, 3072, 2048),
    (768, 3072, 8192),
    (3072, 768, 8192),
    (768, 50304, 8192),
    (2048, 2048, 8192),
    (4096, 4096, 8192),
    (4096, 14336, 8192),
)
"""(in, out, tokens)."""
GOALS = {(4096, 4096, 8192): 1.5, (768, 3072, 8192): 1.0}
"""Speed-ups that the work is to reach, by layer."""
BLOCK = ((1, 3), (1, 1), (1, 4), (4, 1))
"""Linear layers of a transformer's block, (in, out) in units of the hidden size."""
TOKENS = (2048, 8192, 16384)
_STEP, _LARGEST = 64, 16384


class Predicted(NamedTuple):
    """One layer, forward and backward."""

    bf16: float
    """Seconds."""
    int8: float
    operations: float
    num_bytes: float
    """Of quantizing and of results beyond bf16's."""

    @property
    def speed_up(self) -> float:
        return self.bf16 / self.int8


def predict(
    path: Way, in_features: int, out_features: int, tokens: int, *, stochastic: bool = False, rates: Rates = H100
) -> Predicted:
    """By the rule of the module docstring."""
    x, w, g = tokens * in_features, out_features * in_features, tokens * out_features
    operations = 6.0 * tokens * in_features * out_features
    # Y is as large as G, dX as X, dW as W.
    num_bytes = path.x * x + path.w * w + path.g * g + path.results * (x + w + g)
    instructions = path.random_instructions * g if stochastic else 0.0
    int8 = operations / rates.int8 + num_bytes / rates.bandwidth + instructions / rates.instructions
    return Predicted(operations / rates.bf16, int8, operations, num_bytes)


def predict_block(
    path: Way, hidden: int, tokens: int, *, stochastic: bool = False, rates: Rates = H100
) -> tuple[float, float]:
    """Seconds of the linear layers of a block in bf16 and in int8."""
    layers = [predict(path, a * hidden, b * hidden, tokens, stochastic=stochastic, rates=rates) for a, b in BLOCK]
    return sum(layer.bf16 for layer in layers), sum(layer.int8 for layer in layers)


def pays_from(path: Way, tokens: int, *, stochastic: bool = False, rates: Rates = H100) -> int | None:
    """The smallest hidden size, a multiple of 64, from which a block's linear layers are no slower in int8."""
    least = None
    for hidden in range(_LARGEST, 0, -_STEP):
        bf16, int8 = predict_block(path, hidden, tokens, stochastic=stochastic, rates=rates)
        if int8 > bf16:
            break
        least = hidden
    return least


def layer_table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows: every layer by both paths."""
    columns = ["in → out, tokens", "GFLOP", "bf16 us"]
    for path in (BEFORE, AFTER):
        columns += [f"{path.name} MB", f"{path.name} us", "speed-up"]
    columns.append("goal")
    rows = []
    for layer in LAYERS:
        cells: list[str] = []
        for path in (BEFORE, AFTER):
            nearest, random = (predict(path, *layer, stochastic=stochastic) for stochastic in (False, True))
            cells += [
                f"{nearest.num_bytes / 1e6:.0f}",
                f"{nearest.int8 * _MICRO:.0f} / {random.int8 * _MICRO:.0f}",
                f"{nearest.speed_up:.2f} / {random.speed_up:.2f}",
            ]
        size = "{} → {}, {}".format(*layer)
        head = [size, f"{nearest.operations / 1e9:.0f}", f"{nearest.bf16 * _MICRO:.0f}"]
        rows.append([*head, *cells, f"{GOALS[layer]:.1f}" if layer in GOALS else ""])
    return columns, rows


def size_table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows: from which hidden size on int8 pays, by tokens."""
    columns = ["tokens", "before", "before, stochastic", "after", "after, stochastic"]
    rows, kinds = [], [(path, stochastic) for path in (BEFORE, AFTER) for stochastic in (False, True)]
    for tokens in TOKENS:
        found = [pays_from(path, tokens, stochastic=stochastic) for path, stochastic in kinds]
        rows.append([str(tokens), *("never" if size is None else str(size) for size in found)])
    return columns, rows


def terms_table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the constants of both paths."""
    columns = ["path", "X", "W", "G", "each result", "instructions for random bits", "launches", "more for random bits"]
    rows = []
    for path in (BEFORE, AFTER):
        counts = ["not counted" if n is None else str(n) for n in (path.launches, path.random_launches)]
        terms = (path.x, path.w, path.g, path.results, path.random_instructions)
        rows.append([path.name, *(f"{term:g}" for term in terms), *counts])
    return columns, rows


def page_part() -> str:
    """What docs/gpu.md holds of this, between its marks."""
    rates = (
        f"Rates of an {H100.name}, as reached: bf16 {H100.bf16 / 1e12:.0f} TF/s, int8 {H100.int8 / 1e12:.0f} TOPS, "
        f"{H100.bandwidth / 1e12:g} TB/s, {H100.instructions / 1e12:.1f} T instructions/s."
    )
    block = (
        "The smallest hidden size from which the linear layers of a block (qkv, output, and an MLP of four times the "
        "size) are no slower than in bf16:"
    )
    uncached = ", ".join(
        "{} → {}: {:.2f} / {:.2f}".format(
            *layer[:2], *(predict(UNCACHED, *layer, stochastic=stochastic).speed_up for stochastic in (False, True))
        )
        for layer in GOALS
    )
    cache = (
        "The rows of X and W are read twice, and counted once: the second read goes backwards, so that a cache has "
        f"what the first one read last. If nothing were cached, speed-ups at 8192 tokens would be {uncached}."
    )
    parts = [
        rates,
        "Bytes moved for each element, and launches of a layer, forward and backward:",
        "\n".join(markdown_table(*terms_table())),
        "One layer, forward and backward, gradients rounded to nearest / stochastically:",
        "\n".join(markdown_table(*layer_table())),
        cache,
        block,
        "\n".join(markdown_table(*size_table())),
    ]
    return "\n\n".join([BEGIN, *parts, END])


def write_page(page: Path) -> None:
    """Replace what stands between the marks in a page; CommandError where they are not there."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in text or END not in text:
        raise CommandError(f"--page: got {page}; allowed: a page with the lines {BEGIN!r} and {END!r}; correct it")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(before + page_part() + after, encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predicts, and measures nothing: time and speed-up over bf16 of linear layers in int8 on an H100, before and "
        "after codes in both orientations and fused epilogues, and the hidden size from which int8 pays."
    )
    parser.add_argument("--page", type=Path, help="the page to write the tables into: docs/gpu.md")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the tables, write the page."""
    titles = ("bytes an element", "predicted: one layer, nearest / stochastic", "predicted: int8 pays from hidden size")
    for title, (columns, rows) in zip(titles, (terms_table(), layer_table(), size_table()), strict=True):
        print_table(title, columns, rows)
    if options.page:
        write_page(options.page)
        print(f"written: {options.page}")
