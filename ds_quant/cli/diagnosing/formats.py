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
from ds_quant.cli.diagnosing import common, recorded_tensors
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
        "Relative errors of every number format, rounded to nearest, on Gaussian and heavy-tailed numbers, the "
        "matrices of files, and weights, activations and gradients of checkpoints; and what is left of them in the "
        "mean of 16 stochastic roundings, a quarter of the error of one where there is no bias."
    )
    parser.add_argument(
        "--tensors",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="safetensors files, whose matrices are measured as well: weights of a checkpoint, recorded activations",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        default=[],
        metavar="CHECKPOINT",
        help="models whose linear layers are measured as well: their weights, and the inputs and output gradients of "
        f"{recorded_tensors.TOKENS} tokens of each batch of a text; output heads are left out",
    )
    parser.add_argument("--by_layer", action="store_true", help="each layer of a checkpoint apart; default: all pooled")
    common.add_model(parser)
    common.add_text(parser)
    parser.add_argument(
        "--draws",
        type=int,
        default=DRAWS,
        help="stochastic roundings whose mean is taken; 0: none, which leaves that column empty (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the numbers that are drawn (default: 0)")
    parser.add_argument("--output", type=Path, help="a CSV file; default: the same on the terminal")


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    if options.draws < 0:
        raise CommandError(f"--draws: got {options.draws}; allowed: 0 or more; correct it")
    found = numbers(options.seed, options.tensors)
    if options.by_layer and not options.checkpoints:
        raise CommandError("--by_layer: got no checkpoint; allowed: beside --checkpoints; name one, or leave it out")
    for subject in common.subjects(options) if options.checkpoints else ():
        found |= recorded_tensors.record(subject, by_layer=options.by_layer)
    rows = list(table(found, options.draws))
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


def table(found: dict[str, list[Tensor]], draws: int) -> Iterator[tuple[object, ...]]:
    """Rows of COLUMNS, errors pooled over the matrices of a kind."""
    for name, scale, fmt in formats():
        for what, matrices in found.items():
            error = bias = square = elements = scales = 0.0
            for x in matrices:
                error += float((fake_quantize_to(x, fmt) - x).double().square().sum())
                bias += _bias(x, fmt, draws)
                square += float(x.double().square().sum())
                elements += x.numel()
                scales += _scale_bits(x, fmt)
            bits = fmt.elements.bits + scales / elements
            left = f"{(bias / square) ** 0.5:.4g}" if draws else ""
            yield name, scale, f"{bits:.4g}", what, f"{(error / square) ** 0.5:.4g}", left


def _bias(x: Tensor, fmt: Format[Integers | Minifloat], draws: int) -> float:
    """The squared error of the mean of so many stochastic roundings, added up; 0 without any."""
    if not draws:
        return 0.0
    rounded = (fake_quantize_to(x, fmt, rounding="stochastic", key=fold_key(0, draw)) for draw in range(draws))
    mean = sum((draw.double() for draw in rounded), torch.zeros((), dtype=torch.float64)) / draws
    return float((mean - x).square().sum())


def _scale_bits(x: Tensor, fmt: Format[Integers | Minifloat]) -> float:
    """Bits of all scales of a matrix together."""
    rows, features = x.shape
    count = rows * -(-features // fmt.group.block_size) if fmt.group.granularity == "block" else rows
    if fmt.scale.kind == "float":
        return 32.0 * count
    return 8.0 * count / fmt.group.block_rows + (32 if fmt.scale.kind == "e4m3" else 0)
