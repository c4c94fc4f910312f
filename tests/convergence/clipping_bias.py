"""What the code that integers have on the negative side alone does to the mean: what docs/formats.md reports.

    python tests/convergence/clipping_bias.py [--checkpoints RUN ...]

Rows are formats with integers in the range that ds_quant has, -n to n, and with the code -(n + 1) besides: where scales
take 8 bits at the same scale (`one more`), with fp32 scales as `"range": "full"` of activations has it. Numbers are
Gaussian, 2^22 of them in bf16, and the output gradients of the linear layers of runs for batches of a text; each comes
with its negative, so that a range that is symmetric has no bias. Columns:

    lowest   share of the elements with the code -(n + 1)
    bias     sum (xq - x) / sum |x|, in units of 1e-6
    noise    of stochastic rounding, what bias is off by, in units of 1e-6: the root mean square of the errors by the
             square root of their number, over the mean of |x|
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_quant.cli.diagnosing import common, recorded_tensors
from ds_quant.numerics.format import Format, Group, Integers, named_format, scale_of
from ds_quant.numerics.integer import expand_groups, in_steps, quantize, reduce_groups, round_steps
from ds_quant.numerics.random import fold_key

FORMATS = {
    "mxint8 (floor)": named_format("mxint8"),
    "mxint8 (up)": named_format("mxint8", scale_rule="up"),
    "nvint4": named_format("nvint4"),
    "int8, blocks of 32": Format(Integers(8), Group("block", 32)),
    "int4, blocks of 16": Format(Integers(4), Group("block", 16)),
}


def rounded(x: Tensor, fmt: Format[Integers], kept: str, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and values of x, a matrix in fp32, in fp32 both."""
    elements, group, _ = fmt
    if kept == "full":
        rounding = "nearest" if key is None else "stochastic"
        options = {"granularity": "block", "block_size": group.block_size, "full_range": True}
        q = quantize(x, elements.bits, rounding=rounding, key=key, **options)
        return q.codes.float(), q.codes.float() * expand_groups(q.scale, x, "block", group.block_size)
    scale = scale_of(x, reduce_groups(x.abs(), torch.amax, "block", group.block_size), fmt)
    scale = expand_groups(scale, x, "block", group.block_size)
    lowest, highest = elements.code_range
    codes = round_steps(in_steps(x, scale), key).clamp(lowest - (kept == "one more"), highest)
    return codes, codes * scale


def rows(found: dict[str, list[Tensor]]) -> Iterator[tuple[str, ...]]:
    """Of every format, range, rounding and kind of numbers."""
    for name, fmt in FORMATS.items():
        for kept in ("narrow", "full" if fmt.scale.kind == "float" else "one more"):
            for key in (None, fold_key(0, 1)):
                for what, matrices in found.items():
                    error = square = size = lowest = numel = 0.0
                    for x in (torch.cat((matrix, -matrix)) for matrix in matrices):
                        codes, values = rounded(x, fmt, kept, key)
                        off = (values - x).double()
                        error += float(off.sum())
                        square += float(off.square().sum())
                        size += float(x.double().abs().sum())
                        lowest += int((codes < -(2 ** (fmt.elements.bits - 1)) + 1).sum())
                        numel += x.numel()
                    rounding = "nearest" if key is None else "stochastic"
                    noise = "" if key is None else f"{1e6 * square**0.5 / size:.1f}"
                    figures = f"{lowest / numel:.1e}", f"{1e6 * error / size:.1f}", noise
                    yield name, kept, rounding, what, *figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="RUN")
    common.add_model(parser)
    common.add_text(parser)
    options = parser.parse_args()
    found = {"Gaussian": [torch.randn(1 << 13, 512, generator=torch.Generator().manual_seed(0)).bfloat16().float()]}
    for subject in common.subjects(options) if options.checkpoints else ():
        recorded = recorded_tensors.record(subject, by_layer=False)
        found |= {what: tensors for what, tensors in recorded.items() if what.endswith("gradients")}
    print("| format | codes | rounding | numbers | lowest | bias | noise |\n|---|---|---|---|---|---|---|")
    for row in rows(found):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
