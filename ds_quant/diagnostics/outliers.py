"""Activation outliers: input channels of a linear that are far larger than the others, which 8 bits must cover too.

arXiv 2407.11722: the mean of |x| over all tokens is taken for each input channel of a linear; a channel is an outlier
where it exceeds mean + 6 standard deviations of these means. Among n channels no value can lie further than
sqrt(n - 1) standard deviations above the mean, so that a layer of 37 channels or fewer never has one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.recorder import Recorder, features_of, zeros

NUM_STD = 6.0
"""Standard deviations above the mean of all channels, from the paper."""


def outlier_channels(channel_means: Tensor, num_std: float = NUM_STD) -> tuple[Tensor, float]:
    """The channels above mean + num_std * std, and that threshold.

    channel_means: [channels], the mean of |x| of each; the deviation is that of the population. Indices are int64.
    """
    values = channel_means.double()
    threshold = float(values.mean() + num_std * values.std(unbiased=False))
    return torch.nonzero(values > threshold).flatten(), threshold


class OutlierRecorder(Recorder):
    """Mean |x| of each input channel of each linear layer, and the channels that stand out."""

    kind = "outliers"
    watches_inputs = True

    def __init__(self, num_std: float = NUM_STD):
        super().__init__()
        self.num_std = num_std

    def prepare(self, name: str, module: nn.Module) -> None:
        # The last element counts tokens.
        self._sums.setdefault(name, zeros(features_of(module)[0] + 1, module.weight))  # type: ignore[arg-type]

    def observe_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        sums = self._sums[name]
        sums[:-1] += rows.abs().sum(0, dtype=torch.float32)
        sums[-1] += rows.shape[0]

    def result(self, step: int | None) -> Measurement:
        self._check_seen(sum(float(sums[-1]) for sums in self._sums.values()))
        rows: list[Row] = []
        channels = outliers = 0
        ratios = [0.0]
        for name, sums in self._sums.items():
            if not sums[-1]:
                continue
            means = sums[:-1] / sums[-1]
            found, threshold = outlier_channels(means, self.num_std)
            mean, largest = float(means.mean()), float(means.max())
            channels, outliers = channels + means.numel(), outliers + found.numel()
            if mean:
                ratios.append(largest / mean)
            rows.append(
                {
                    "layer": name,
                    "channels": means.numel(),
                    "outliers": found.numel(),
                    "indices": " ".join(str(int(index)) for index in found),
                    "mean": mean,
                    "largest": largest,
                    "largest_over_mean": largest / mean if mean else None,
                    "threshold": threshold,
                }
            )
        scalars = {
            "outlier_channels": float(outliers),
            "outlier_share": outliers / channels,
            "layers_with_outliers": float(sum(bool(row["outliers"]) for row in rows)),
            "largest_over_mean": max(ratios),
        }
        tokens = max(float(sums[-1]) for sums in self._sums.values())
        settings: dict[str, Any] = {"num_std": self.num_std, "tokens": int(tokens)}
        return Measurement(self.kind, step, scalars, rows, settings)


def persistence(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """How long outlier channels stay outliers, from measurements of one run at two steps or more, oldest first.

    One object a layer that ever had one: `channels`, those that were outliers at any look; `always`, those that were
    at every look; of all pairs of looks `before`, the outliers of the first, and `kept`, those of them that are
    outliers at the next.

    Raises:
        ConfigError: fewer than two measurements of outliers, or of models with other layers.
    """
    if len(measurements) < 2 or any(found.kind != "outliers" for found in measurements):
        raise fail(
            "outliers: persistence",
            f"{len(measurements)} looks",
            "two measurements of outliers or more, of several checkpoints of one run",
            "name more checkpoints, or look more than once",
        )
    looks = [{str(row["layer"]): _channels(row) for row in found.rows} for found in measurements]
    if any(look.keys() != looks[0].keys() for look in looks):
        raise fail("outliers: persistence", "models with other layers", "looks at one model", "leave the others out")
    result = []
    for layer in looks[0]:
        sets = [look[layer] for look in looks]
        before = sum(len(found) for found in sets[:-1])
        after = sum(len(a & b) for a, b in itertools.pairwise(sets))
        ever = set().union(*sets)
        if ever:
            always = set.intersection(*sets)
            found = {"channels": sorted(ever), "always": sorted(always), "before": before, "kept": after}
            result.append({"layer": layer, **found})
    return result


def _channels(row: Row) -> set[int]:
    return {int(index) for index in str(row["indices"]).split()}
