"""`diagnose formats`: what each number format loses of the same numbers, side by side.

Relative errors |x - xq| / |x|, rounded to nearest, and what is left of them in the mean of DRAWS stochastic roundings,
which falls with 1 / sqrt(DRAWS) where there is no bias. `candidates` has the formats, of products or of messages.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ds_quant.cli.diagnosing import common, recorded_tensors
from ds_quant.cli.diagnosing.candidates import USES, Candidate
from ds_quant.cli.shared.errors import CommandError
from ds_quant.numerics import rotation
from ds_quant.numerics.format import fake_quantize_to
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
        "--used_for",
        choices=USES,
        default="products",
        help="products: operands of linear layers, as matrices. wire: gradients of parameters in messages, with the "
        "blocks that messages have; of checkpoints, the gradients of all parameters (default: %(default)s)",
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
    on_wire = options.used_for == "wire"
    record = recorded_tensors.record_gradients if on_wire else recorded_tensors.record
    for subject in common.subjects(options, with_backward=True) if options.checkpoints else ():
        found |= record(subject, by_layer=options.by_layer)
    if on_wire:  # messages know no rows
        found = {what: [x.reshape(1, -1) for x in tensors] for what, tensors in found.items()}
    rows = list(table(found, USES[options.used_for](), options.draws))
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


def table(found: dict[str, list[Tensor]], candidates: Iterator[Candidate], draws: int) -> Iterator[tuple[object, ...]]:
    """Rows of COLUMNS, errors pooled over the matrices of a kind."""
    for candidate in candidates:
        for what, matrices in found.items():
            error = bias = square = elements = scales = 0.0
            for x in matrices:
                y = rotation.rotate_rows(x, candidate.rotation) if candidate.rotation else x
                error += float((fake_quantize_to(y, candidate.format) - y).double().square().sum())
                bias += _bias(y, candidate, draws)
                square += float(y.double().square().sum())
                elements += x.numel()
                scales += candidate.scale_bits(x)
            bits = candidate.format.elements.bits + scales / elements
            left = f"{(bias / square) ** 0.5:.4g}" if draws else ""
            yield candidate.name, candidate.group, f"{bits:.4g}", what, f"{(error / square) ** 0.5:.4g}", left


def _bias(x: Tensor, candidate: Candidate, draws: int) -> float:
    """The squared error of the mean of so many stochastic roundings, added up; 0 without any."""
    if not draws:
        return 0.0
    keys = (fold_key(0, draw) for draw in range(draws))
    rounded = (fake_quantize_to(x, candidate.format, rounding="stochastic", key=key) for key in keys)
    mean = sum((draw.double() for draw in rounded), torch.zeros((), dtype=torch.float64)) / draws
    return float((mean - x).square().sum())
