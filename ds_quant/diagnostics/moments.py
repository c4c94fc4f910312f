"""What a code map makes of Adam's moments: their histogram before and after, and the share that becomes zero.

A second moment that becomes zero beside a first moment that does not makes an update of m / eps, which is why the
paper's linear 8-bit exp_avg_sq fails (arXiv 2407.11722). Any map, bits, block size and granularity of
`ds_quant.optimizer` can be asked about, whatever the run itself stores.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.config import MomentConfig
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.recorder import Recorder, zeros
from ds_quant.numerics.blockwise import dequantize_blockwise, group_size, quantize_blockwise
from ds_quant.numerics.codes import code_map
from ds_quant.numerics.random import fold_key
from ds_quant.optim.group_options import DEFAULT_ROUNDING, MOMENTS
from ds_quant.optim.state import QuantizedState

LOWEST = -150
"""Exponent below that of the smallest fp32 number; its bin holds the zeros."""

_BINS = 128 - LOWEST
_SUMS = ("lost", "present", "error_square", "square", "log_square", "both")

FORMATS: tuple[dict[str, Any], ...] = (
    {"bits": 8},
    {"bits": 8, "map": "dynamic"},
    {"bits": 4},
    {"bits": 8, "map": "linear"},
    {"bits": 8, "map": "linear", "granularity": "channel"},
    {"bits": 8, "map": "linear", "granularity": "tensor"},
)
"""What is compared where nothing is asked for: this package's own, bitsandbytes' map, and the paper's rows."""


def requantized(moment: Tensor, config: MomentConfig, *, which: str, key: Tensor) -> Tensor:
    """`moment`, fp32 of its parameter's shape, as a step would find it again: quantized and dequantized.

    which: "exp_avg" or "exp_avg_sq". key: for stochastic rounding, see `fold_key`.
    """
    how = config.rounding or DEFAULT_ROUNDING
    blocks = quantize_blockwise(
        moment.reshape(-1),
        code_map(config.map, config.bits, signed=which == "exp_avg"),
        block_size=group_size(moment.shape, config.granularity, config.block_size),
        rounding=how,
        key=key if how == "stochastic" else None,
    )
    return dequantize_blockwise(blocks).reshape(moment.shape)


def octaves(values: Tensor) -> Tensor:
    """How many |values| lie in each [2^e, 2^(e+1)): fp64 [278], bin i for e = LOWEST + i; bin 0 holds the zeros.

    Values that are not finite are counted in the last bin.
    """
    magnitude = values.detach().float().abs().reshape(-1)
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = torch.where(magnitude == 0, LOWEST, exponent)
    exponent = torch.where(magnitude.isfinite(), exponent, 127).clamp(LOWEST, 127)
    return torch.bincount(exponent - LOWEST, minlength=_BINS).double()


def loss_sums(before: Tensor, after: Tensor) -> Tensor:
    """What becomes of a moment, as figures that add up over tensors: fp64 of shape (6,).

    Elements that were not 0 and are 0; that were not 0; sum (after - before)^2; sum before^2; sum log2(after/before)^2
    over those that are 0 neither before nor after; their number.
    """
    x, y = before.double(), after.double()
    present = x != 0
    both = present & (y != 0)
    log = torch.where(both, y.abs().log2() - x.abs().log2(), 0.0)
    lost = (present & (y == 0)).sum()
    parts = [lost, present.sum(), (y - x).square().sum(), x.square().sum(), log.nan_to_num().square().sum(), both.sum()]
    return torch.stack([part.double() for part in parts])


def label_of(config: MomentConfig) -> str:
    """A format in a few words: `8-bit float per 256`."""
    place = f"per {config.block_size}" if config.granularity == "block" else f"per {config.granularity}"
    rounding = f" {config.rounding}" if config.rounding else ""
    return f"{config.bits}-bit {config.map} {place}{rounding}"


class MomentRecorder(Recorder):
    """Histograms of one moment over all tensors shown to `observe`, in fp32 and in each of `formats`.

    Args:
        which: "exp_avg" or "exp_avg_sq".
        formats: objects of `ds_quant.optimizer.exp_avg(_sq)`; None: `FORMATS`. With whole parameters any granularity
            means what it says; of flat partitions show only those per block.
        seed: of stochastic rounding.

    Raises:
        ConfigError: `which` or a format is out of range.
    """

    kind = "moments"

    def __init__(
        self, which: str = "exp_avg_sq", formats: Sequence[MomentConfig | dict[str, Any]] | None = None, seed: int = 0
    ):
        super().__init__()
        if which not in MOMENTS:
            raise fail("diagnostics: moments", which, " or ".join(MOMENTS), "name one of them")
        self.which, self.seed = which, seed
        parsed = [MomentConfig.parse(item) if isinstance(item, dict) else item for item in formats or FORMATS]
        self.formats = {label_of(config): config for config in parsed}
        self._observed = 0
        like = torch.zeros(())
        self._sums["before"] = zeros(_BINS, like)
        for label in self.formats:
            self._sums[label] = zeros(_BINS, like)
            self._sums[f"{label} losses"] = zeros(len(_SUMS), like)

    def reset(self) -> None:
        super().reset()
        self._observed = 0

    def observe(self, name: str, moment: Tensor) -> None:
        """Take in the moment of one parameter, or a part of it; quantized ones as the values that they stand for."""
        values = moment.dequantize() if isinstance(moment, QuantizedState) else moment.detach().float()
        self._sums["before"] += octaves(values).cpu()
        for number, (label, config) in enumerate(self.formats.items()):
            key = fold_key(self.seed % 2**64, rank=number, stream=self._observed, device=values.device)
            after = requantized(values, config, which=self.which, key=key)
            self._sums[label] += octaves(after).cpu()
            self._sums[f"{label} losses"] += loss_sums(values, after).cpu()
        self._observed += 1

    def result(self, step: int | None) -> Measurement:
        before = self._sums["before"]
        if not before.sum():
            raise fail(
                "diagnostics: moments",
                f"no {self.which}",
                "the state of an optimizer of the Adam family after a step",
                "look after the first step, or name a checkpoint with optimizer states",
            )
        histograms = {"before": before, **{label: self._sums[label] for label in self.formats}}
        used = torch.stack(list(histograms.values())).sum(0).nonzero().flatten()
        used = used[used > 0]
        bins = [0, *range(int(used.min()), int(used.max()) + 1)] if used.numel() else [0]
        total = float(before.sum())
        rows: list[Row] = [
            {
                "bin": f"2^{LOWEST + number}" if number else "0",
                **{name: float(counts[number]) / total for name, counts in histograms.items()},
            }
            for number in bins
        ]
        scalars: dict[str, float] = {}
        for label in self.formats:
            found = dict(zip(_SUMS, self._sums[f"{label} losses"].tolist(), strict=True))
            scalars[f"becomes_zero/{label}"] = found["lost"] / found["present"] if found["present"] else 0.0
            scalars[f"relative_l2/{label}"] = math.sqrt(
                found["error_square"] / found["square"] if found["square"] else 0
            )
            scalars[f"log2_rms/{label}"] = math.sqrt(found["log_square"] / found["both"] if found["both"] else 0)
        settings: dict[str, Any] = {
            "moment": self.which,
            "elements": int(total),
            "seed": self.seed,
            "formats": {
                label: {
                    **config.model_dump(mode="json"),
                    "rounding": config.rounding or DEFAULT_ROUNDING,
                }
                for label, config in self.formats.items()
            },
        }
        return Measurement(self.kind, step, scalars, rows, settings)
