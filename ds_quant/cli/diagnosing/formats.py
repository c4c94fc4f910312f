"""`diagnose formats`: what each number format loses of the same numbers, side by side.

Relative errors |x - xq| / |x|, rounded to nearest, and what is left of them in the mean of DRAWS stochastic roundings,
which falls with 1 / sqrt(DRAWS) where there is no bias. Integers of 8 and 4 bits and the formats whose groups are free
take a scale a row, and one for every 32 (8 and 6 bits) or 16 (4 bits) elements.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ds_quant.base.number_formats import FORMATS, FOUR_SIX
from ds_quant.cli.shared.errors import CommandError
from ds_quant.numerics.format import Format, Group, Integers, fake_quantize_to, named_format
from ds_quant.numerics.minifloat import Minifloat
from ds_quant.numerics.random import fold_key

HELP = "what each number format loses of the same numbers"

ROWS, FEATURES, DRAWS = 256, 512, 16
COLUMNS = ("format", "scale", "bits_an_element", "numbers", "relative_error", "bias_of_stochastic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Relative errors of every number format, rounded to nearest, on Gaussian and heavy-tailed numbers and the "
        "matrices of files; and what is left of them in the mean of 16 stochastic roundings, a quarter of the error of "
        "one where there is no bias."
    )
    parser.add_argument(
        "--tensors",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="safetensors files, whose matrices are measured as well: weights of a checkpoint, recorded activations",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the numbers that are drawn (default: 0)")
    parser.add_argument("--output", type=Path, help="a CSV file; default: the same on the terminal")


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises CommandError."""
    rows = list(table(numbers(options.seed, options.tensors)))
    stream = options.output.open("w", newline="") if options.output else sys.stdout
    try:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    finally:
        if options.output:
            stream.close()


def numbers(seed: int, files: list[Path]) -> dict[str, list[Tensor]]:
    """Matrices in fp32, by what they are."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(ROWS, FEATURES, generator=generator)
    chi = torch.randn(3, ROWS, FEATURES, generator=generator).square().mean(0)
    found = {"Gaussian": [normal], "Student t (3)": [normal / chi.sqrt()]}
    for path in files:
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except Exception as error:  # of safetensors, which has classes of its own
            raise CommandError(
                f"--tensors: got {path}, which is no readable safetensors file ({error}); allowed: files written by "
                "safetensors; fix: name another, or copy it again"
            ) from error
        matrices = [tensor.float() for tensor in tensors.values() if tensor.dim() == 2 and tensor.is_floating_point()]
        if not matrices:
            got, allowed = f"{path} without a matrix of floating-point numbers", "files with one"
            raise CommandError(f"--tensors: got {got}; allowed: {allowed}; fix: name another")
        found[path.name] = matrices
    return found


def formats() -> Iterator[tuple[str, str, Format[Integers | Minifloat]]]:
    """(name, what shares a scale, the format)."""
    for bits in (8, 4):
        size = 32 if bits == 8 else 16
        yield f"int{bits}", "row", Format(Integers(bits), Group("row"))
        yield f"int{bits}", f"block of {size}", Format(Integers(bits), Group("block", size))
    for name, named in FORMATS.items():
        if named.scale == "e8m0":
            for rule in ("floor", "up"):
                yield name, f"block of 32 ({rule})", named_format(name, scale_rule=rule)
        elif named.block_size:
            yield name, f"block of {named.block_size}", named_format(name)
            yield name, "tile of 16 x 16", named_format(name, block_rows=16)
            if name == "nvfp4":
                yield name, "block of 16 (4/6)", named_format(name, scale_rule=FOUR_SIX)
                yield name, "tile of 16 x 16 (4/6)", named_format(name, block_rows=16, scale_rule=FOUR_SIX)
        else:
            size = 16 if named.bits == 4 else 32
            yield name, "row", named_format(name, "row")
            yield name, f"block of {size}", named_format(name, "block", size)


def table(found: dict[str, list[Tensor]]) -> Iterator[tuple[object, ...]]:
    """Rows of COLUMNS, errors pooled over the matrices of a kind."""
    for name, scale, fmt in formats():
        for what, matrices in found.items():
            error = bias = square = elements = scales = 0.0
            for x in matrices:
                error += float((fake_quantize_to(x, fmt) - x).double().square().sum())
                draws = (
                    fake_quantize_to(x, fmt, rounding="stochastic", key=fold_key(0, draw)) for draw in range(DRAWS)
                )
                mean = sum((draw.double() for draw in draws), torch.zeros((), dtype=torch.float64)) / DRAWS
                bias += float((mean - x).square().sum())
                square += float(x.double().square().sum())
                elements += x.numel()
                scales += _scale_bits(x, fmt)
            bits = fmt.elements.bits + scales / elements
            yield name, scale, f"{bits:.4g}", what, f"{(error / square) ** 0.5:.4g}", f"{(bias / square) ** 0.5:.4g}"


def _scale_bits(x: Tensor, fmt: Format[Integers | Minifloat]) -> float:
    """Bits of all scales of a matrix together."""
    rows, features = x.shape
    count = rows * -(-features // fmt.group.block_size) if fmt.group.granularity == "block" else rows
    if fmt.scale.kind == "float":
        return 32.0 * count
    return 8.0 * count / fmt.group.block_rows + (32 if fmt.scale.kind == "e4m3" else 0)
