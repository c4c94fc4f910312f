"""A hand-made second moment, of which it is known what becomes zero under which map."""

import math

import pytest
import torch

from ds_quant.base.errors import ConfigError
from ds_quant.config import MomentConfig
from ds_quant.diagnostics.moments import FORMATS, LOWEST, MomentRecorder, loss_sums, octaves
from ds_quant.numerics.codes import code_map, code_values
from ds_quant.optim.state import QuantizedState

LINEAR = {"bits": 8, "map": "linear", "rounding": "nearest"}


def look(moment, *formats, which="exp_avg_sq", seed=0):
    recorder = MomentRecorder(which, formats or None, seed)
    recorder.observe("a", moment)
    return recorder.result(3)


def hand_made():
    """Two channels of 512: one large and flat, one of which 1/4 is below half a step of the largest value."""
    v = torch.full((2, 512), 1.0)
    v[1] = 1e-3
    v[1, :128] = 1e-3 / 600
    return v


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        # One scale: all of the second channel is below 1/510 of the largest value, 1.
        ({"granularity": "tensor"}, 512 / 1024),
        # A scale a channel: 1/600 of the channel's largest value is below 1/510 of it.
        ({"granularity": "channel"}, 128 / 1024),
        # Blocks of 128: each holds one value, which is its own scale.
        ({"block_size": 128}, 0.0),
        # Blocks of 256: the 128 small ones share a scale with 128 large ones.
        ({"block_size": 256}, 128 / 1024),
    ],
)
def test_the_share_that_becomes_zero_under_the_linear_map_by_granularity(settings, lost):
    found = look(hand_made(), {**LINEAR, **settings})
    (share,) = [value for name, value in found.scalars.items() if name.startswith("becomes_zero")]
    assert share == lost
    label = next(name for name in found.rows[0] if name not in ("bin", "before"))
    assert found.rows[0] == {"bin": "0", "before": 0.0, label: lost}
    assert sum(row["before"] for row in found.rows) == pytest.approx(1)
    assert sum(row[label] for row in found.rows) == pytest.approx(1)


@pytest.mark.parametrize("config", [{"bits": 8}, {"bits": 4}, {"bits": 4, "map": "linear"}])
def test_maps_without_a_zero_lose_nothing(config):
    found = look(hand_made() * 1e-9, config)
    assert [v for k, v in found.scalars.items() if k.startswith("becomes_zero")] == [0.0]


def test_the_histogram_counts_octaves():
    values = torch.tensor([0.0, 0.0, 1.0, 1.5, 2.0, -3.0, 0.25, 2.0**-149, float("inf")])
    counts = octaves(values)
    found = {number + LOWEST: int(count) for number, count in enumerate(counts.tolist()) if count}
    assert found == {LOWEST: 2, 0: 2, 1: 2, -2: 1, -149: 1, 127: 1}
    rows = look(torch.tensor([[4.0, 4.0, 5.0, 0.0]]), LINEAR).rows
    assert [(row["bin"], row["before"]) for row in rows] == [("0", 0.25), ("2^2", 0.75)]


def test_losses_of_known_values():
    before, after = torch.tensor([0.0, 1.0, 2.0, 4.0]), torch.tensor([0.0, 0.0, 4.0, 2.0])
    assert loss_sums(before, after).tolist() == [1, 3, 1 + 4 + 4, 21, 1 + 1, 2]
    values = code_values(code_map("power", 8, signed=False))
    exact = look(values.reshape(1, -1), {"bits": 8, "map": "power", "rounding": "nearest"})
    assert exact.scalars["log2_rms/8-bit power per 256 nearest"] < 1e-5


def test_quantized_moments_are_taken_as_the_values_that_they_stand_for():
    v = torch.rand(300, generator=torch.Generator().manual_seed(0)) ** 6
    map_ = code_map("power", 8, signed=False)
    moment = QuantizedState.quantize(v, map_, 256)
    # Quantized to nearest a second time, codes stay what they are.
    found = look(moment, {"bits": 8, "map": "power", "rounding": "nearest"})
    assert found.scalars["relative_l2/8-bit power per 256 nearest"] < 1e-6
    assert look(v, {"bits": 8, "map": "power", "rounding": "nearest"}).scalars != found.scalars


def test_many_parts_are_one_moment_and_ranks_add_up():
    parts = torch.rand(4, 256, generator=torch.Generator().manual_seed(0)).unbind()
    whole, half = MomentRecorder(formats=[LINEAR]), [MomentRecorder(formats=[LINEAR]) for _ in range(2)]
    for number, part in enumerate(parts):
        whole.observe(str(number), part)
        half[number % 2].observe(str(number), part)
    for one, other in zip(half[0].sums(), half[1].sums(), strict=True):
        one += other
    assert half[0].result(1).rows == whole.result(1).rows
    assert half[0].result(1).scalars == pytest.approx(whole.result(1).scalars)
    assert whole.result(1).settings["elements"] == 1024


def test_stochastic_rounding_repeats_itself():
    v = torch.rand(500) * 1e-8
    one, same, other = (look(v, {"bits": 8}, seed=seed).scalars for seed in (0, 0, 1))
    assert one == same != other


def test_the_first_moment_and_the_defaults():
    found = look(torch.randn(64, 64), which="exp_avg")
    assert found.settings["moment"] == "exp_avg"
    assert len(found.settings["formats"]) == len(FORMATS)
    assert all(MomentConfig.parse(item) for item in FORMATS)
    assert all(math.isfinite(value) for value in found.scalars.values())


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="exp_avg or exp_avg_sq"):
        MomentRecorder("exp_avg_cube")
    with pytest.raises(ConfigError, match="bits"):
        MomentRecorder(formats=[{"bits": 5}])
    with pytest.raises(ConfigError, match="optimizer states"):
        MomentRecorder().result(1)
