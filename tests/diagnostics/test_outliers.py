"""Planted outlier channels are found, all of them and no other."""

import pytest
import torch
from torch import nn

from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.outliers import OutlierRecorder, outlier_channels, persistence

PLANTED = [3, 77, 200]


def look(x, num_std=6.0, batches=1):
    layer = nn.Sequential(nn.Linear(x.shape[-1], 4))
    recorder = OutlierRecorder(num_std)
    with attach(layer, [recorder]):
        for part in x.chunk(batches):
            layer(part)
    return recorder.result(5)


@pytest.mark.parametrize("batches", [1, 4])
def test_planted_channels_are_found_and_no_other(batches):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert look(x).scalars["outlier_channels"] == 0
    x[:, PLANTED] *= 40
    found = look(x, batches=batches)
    (row,) = found.rows
    assert row["indices"] == "3 77 200"
    assert row["outliers"] == found.scalars["outlier_channels"] == 3
    assert found.scalars["outlier_share"] == 3 / 256
    assert found.scalars["layers_with_outliers"] == 1
    means = x.double().abs().mean(0)
    assert row["largest"] == pytest.approx(float(means.max()), rel=1e-6)
    assert row["mean"] == pytest.approx(float(means.mean()), rel=1e-6)
    assert found.scalars["largest_over_mean"] == pytest.approx(float(means.max() / means.mean()), rel=1e-6)
    assert row["threshold"] == pytest.approx(float(means.mean() + 6 * means.std(unbiased=False)), rel=1e-6)
    assert found.settings == {"num_std": 6.0, "tokens": 64}


def test_the_threshold_is_mean_plus_six_deviations_of_the_means():
    # 99 channels of 1 and one of c: mean 1 + d/100, deviation d sqrt(99)/100, with d = c - 1: always above for 6.
    means = torch.ones(100)
    means[42] = 2.0
    found, threshold = outlier_channels(means)
    assert found.tolist() == [42]
    assert threshold == pytest.approx(1.01 + 6 * 99**0.5 / 100)
    assert outlier_channels(means, num_std=9.9)[0].tolist() == [42]  # (1 - 0.01) / 0.0995 = 9.95 deviations above
    assert outlier_channels(means, num_std=9.96)[0].tolist() == []


def test_few_channels_cannot_have_an_outlier():
    for channels, can in ((36, False), (38, True)):
        means = torch.zeros(channels)
        means[0] = 1.0
        assert bool(outlier_channels(means)[0].numel()) == can  # at most sqrt(channels - 1) deviations above


def measured(**layers):
    rows = [{"layer": name, "indices": indices} for name, indices in layers.items()]
    return Measurement("outliers", 1, {}, rows, {})


def test_persistence_counts_pairs_of_looks():
    looks = [measured(a="1 2", b=""), measured(a="1 2 3", b=""), measured(a="2 3", b="")]
    (found,) = persistence(looks)
    assert found == {"layer": "a", "channels": [1, 2, 3], "always": [2], "before": 5, "kept": 4}


def test_persistence_needs_two_looks_at_one_model():
    with pytest.raises(ConfigError, match="1 looks"):
        persistence([measured(a="1")])
    with pytest.raises(ConfigError, match="other layers"):
        persistence([measured(a="1"), measured(b="1")])
