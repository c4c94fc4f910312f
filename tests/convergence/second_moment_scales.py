"""4-bit exp_avg_sq with other scales than one for each block, along the trajectories of moment_trajectories.py: the
tables of docs/results/2026-11-30-second-moment-scales.md.

    python tests/convergence/second_moment_scales.py [--rows 32] [--steps 600]

All are rounded stochastically to 16 codes; m is exact. The codes of what is not in the package are spaced evenly in
their logarithm, and `octaves` are the powers of two between the least code and the largest.

    power, log  the maps of the package, with one scale for a block and with two
    block       one scale for a block, its largest element
    max         elements divided by min(largest of the row, largest of the column) first (Li et al., arXiv 2309.01507,
                section 4.2), then one scale for each block of 128
    factors     divided by mean of the row * mean of the column / mean first (Shazeer and Stern, arXiv 1804.04235,
                algorithm 1), then one scale for each block of 128
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from moment_trajectories import NUM_COLUMNS, NUM_ROWS, V4, Figures, Moment, follow, recorded, synthetic, table
from torch import Tensor

from ds_quant.numerics import code_map, fold_key
from ds_quant.numerics.random import uniform

TINY = 1e-38
"""Below what fp32 holds of squares that matter; keeps divisions finite."""
CODES = 16


def blocks_of(x: Tensor, block_size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % block_size)).reshape(-1, block_size)


def rounded(x: Tensor, least: Tensor, octaves: Tensor, key: Tensor) -> Tensor:
    """`x` at one of 16 codes from `least` to `least` * 2^`octaves`, such that the mean is right between neighbours."""
    gap = octaves / (CODES - 1)
    low = ((x / least).clamp_min(TINY).log2() / gap).floor().clamp(0, CODES - 2)
    below, above = least * torch.exp2(low * gap), least * torch.exp2((low + 1) * gap)
    return torch.where(uniform(key, x.shape) < (x - below) / (above - below), above, below)


class Blocks(NamedTuple):
    """One scale for each block."""

    octaves: int
    block_size: int = 128

    def stored(self, x: Tensor, step: int, stream: int) -> Tensor:
        blocks = blocks_of(x, self.block_size)
        octaves = torch.tensor(float(self.octaves))
        least = blocks.amax(dim=1, keepdim=True).clamp_min(TINY) / torch.exp2(octaves)
        return rounded(blocks, least, octaves, fold_key(1, step=step, stream=stream)).reshape(-1)[: x.numel()]


class RowsAndColumns(NamedTuple):
    """Scales of rows and columns of each matrix, then one for each block."""

    widths: Sequence[int]
    """Columns of the matrices, which have the same number of elements; a last row may be cut off."""
    by: str
    octaves: int

    def stored(self, x: Tensor, step: int, stream: int) -> Tensor:
        parts = x.chunk(len(self.widths))
        scales = torch.cat([self.scales(part, width) for part, width in zip(parts, self.widths, strict=True)])
        return Blocks(self.octaves).stored(x / scales, step, stream) * scales

    def scales(self, x: Tensor, width: int) -> Tensor:
        rows = blocks_of(x, width)
        if self.by == "max":
            scales = torch.minimum(rows.amax(dim=1, keepdim=True), rows.amax(dim=0, keepdim=True))
        else:
            held = blocks_of(torch.ones_like(x), width)
            of_rows, of_columns = (rows.sum(dim, keepdim=True) / held.sum(dim, keepdim=True) for dim in (1, 0))
            scales = of_rows * of_columns / x.mean().clamp_min(TINY)
        return scales.expand_as(rows).reshape(-1)[: x.numel()].clamp_min(TINY)


def schemes(widths: Sequence[int]) -> dict[str, tuple[None, Moment | Blocks | RowsAndColumns]]:
    log = Moment(code_map("log", 4, signed=False), 128, "stochastic")
    every: dict[str, Moment | Blocks | RowsAndColumns] = {"power, block of 128": V4}
    every |= {f"log, block of {block_size}": log._replace(block_size=block_size) for block_size in (256, 128, 64, 32)}
    every |= {f"block of 128, {octaves} octaves": Blocks(octaves) for octaves in (16, 20)}
    every |= {f"max, {octaves} octaves": RowsAndColumns(widths, "max", octaves) for octaves in (8, 10, 12)}
    every |= {f"factors, {octaves} octaves": RowsAndColumns(widths, "factors", octaves) for octaves in (8, 12)}
    return {name: (None, stored) for name, stored in every.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help=f"rows of {NUM_COLUMNS} synthetic elements")
    parser.add_argument("--steps", type=int, default=600, help="of the recorded training run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training = recorded(arguments.steps)
    for beta2 in (0.95, 0.999):
        for name, trajectory, widths in (
            ("stationary", synthetic(beta2, num_rows=arguments.rows), [NUM_COLUMNS]),
            ("training", training, [64, 64, 64, 160, 64, 64]),
            ("fall", synthetic(beta2, factor=0.1, num_rows=arguments.rows), [NUM_COLUMNS]),
        ):
            figures: dict[str, Figures] = follow(trajectory, beta2, schemes(widths))
            print(f"\n### {name}, beta2 {beta2}\n\n{table(figures)}", flush=True)


if __name__ == "__main__":
    main()
