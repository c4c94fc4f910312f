"""A weight that provably oscillates, one that moves on, and how far weights lie from decision thresholds."""

import pytest
import torch
from small_models import batch, converted, llama
from torch import nn

import ds_quant
from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.oscillation import OscillationRecorder, codes_and_distances, sample_indices
from ds_quant.linear.recipe import Quantizer

FOUR_BITS = {"weight": {"bits": 4, "granularity": "tensor"}}


def layer(values, linear=FOUR_BITS):
    """A layer with a row of weights and the fixed 7.0, which makes the scale 1 at 4 bits."""
    model = nn.Sequential(nn.Linear(len(values) + 1, 1, bias=False))
    ds_quant.convert(model, linear)
    set_weights(model, values)
    return model


def set_weights(model, values):
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[*values, 7.0]]))


def looks(*weights):
    model, recorder, found = layer(weights[0]), OscillationRecorder(), []
    for step, values in enumerate(weights):
        set_weights(model, values)
        recorder.reset()
        with attach(model, [recorder]):
            model(torch.ones(2, len(values) + 1))
        found.append(recorder.result(step))
    return found


def test_a_weight_that_swings_reverses_and_one_that_moves_on_does_not():
    swings, moves, rests = (0.4, 0.6, 0.4, 0.6), (0.2, 1.2, 2.2, 3.2), (3.0, 3.1, 3.2, 2.9)
    first, second, third, fourth = looks(*zip(swings, moves, rests, strict=True))
    (row,) = first.rows
    assert (row["changed"], row["reversed"], row["returned"]) == (None, None, None)
    assert "changed" not in first.scalars
    assert second.scalars["changed"] == 2 / 4  # of four weights, the fixed one included
    assert "reversed" not in second.scalars
    for found in (third, fourth):
        assert found.scalars["changed"] == 2 / 4
        assert found.scalars["reversed"] == 1 / 4
        assert found.scalars["returned"] == 1 / 4


def test_a_change_after_a_rest_is_held_against_the_last_direction():
    found = looks([0.4], [0.6], [0.6], [0.4])
    assert [look.scalars.get("reversed") for look in found] == [None, None, 0.0, 1 / 2]
    assert [look.scalars.get("returned") for look in found] == [None, None, 0.0, 0.0]
    found = looks([0.4], [1.6], [2.6], [1.4])
    assert found[-1].scalars["reversed"] == 1 / 2
    assert found[-1].scalars["returned"] == 0  # to 1, which it was not two looks before


@pytest.mark.parametrize(
    ("weights", "distance", "near"), [([0.5, -1.5], 0.0, 1.0), ([0.46, 2.54], 0.04, 1.0), ([1.0, -3.25], 0.375, 0.0)]
)
def test_distances_from_the_nearest_threshold(weights, distance, near):
    (found,) = looks(weights)
    count = len(weights)
    # The fixed weight is 0.5 away from any threshold.
    assert found.scalars["mean_distance"] == pytest.approx((count * distance + 0.5) / (count + 1), abs=1e-6)
    assert found.scalars["near_threshold"] == near * count / (count + 1)


def test_evenly_spread_weights_are_a_quarter_of_a_scale_away():
    weight = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, distance = codes_and_distances(weight, Quantizer(8, "row", True, "nearest"), torch.arange(160000))
    assert float(distance.mean()) == pytest.approx(0.25, abs=0.005)
    assert 0 <= distance.min() <= distance.max() <= 0.5
    assert codes.unique().numel() == 255
    asymmetric, distance = codes_and_distances(weight, Quantizer(4, "row", False, "stochastic"), torch.arange(160000))
    assert asymmetric.unique().numel() == 16
    assert float(distance.mean()) == pytest.approx(0.25, abs=0.01)


def test_a_row_of_zeros_has_no_threshold():
    codes, distance = codes_and_distances(torch.zeros(2, 3), Quantizer(4, "row", True, "nearest"), torch.arange(6))
    assert not codes.any()
    assert (distance == 0.5).all()


def test_the_sample_is_fixed_by_name_and_seed():
    for name in ("a", "b"):
        one = sample_indices(name, 10**6, seed=1)
        assert one.shape == (65536,)
        assert 0 <= one.min() <= one.max() < 10**6
        assert torch.equal(one, sample_indices(name, 10**6, seed=1))
        assert not torch.equal(one, sample_indices(name, 10**6, seed=2))
    assert not torch.equal(one, sample_indices("a", 10**6, seed=1))
    # 65536 of 10^6 drawn with repetition: a share of exp(-0.0655) is not hit: 63,440 different ones, +- 5 deviations.
    assert abs(one.unique().numel() - 63440) < 5 * 46
    assert sample_indices("a", 3 * 2**40).max() > 2**41
    assert torch.equal(sample_indices("a", 100), torch.arange(100))


def test_a_resumed_run_goes_on_comparing():
    torch.manual_seed(0)
    model = converted(llama(), {"weight": {"bits": 4}})
    steady, resumed = OscillationRecorder(count=50), OscillationRecorder(count=50)
    results = []
    for step in range(4):
        if step == 2:
            state = resumed.state_dict()
            resumed = OscillationRecorder(count=50)
            resumed.load_state_dict(state)
        for recorder in (steady, resumed):
            recorder.reset()
        with attach(model, [steady, resumed]), torch.no_grad():
            model(**batch())
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        results.append((steady.result(step), resumed.result(step)))
        assert results[-1][0] == results[-1][1]
    assert results[-1][0].scalars["reversed"] > 0


def test_a_layer_that_is_called_twice_is_looked_at_once():
    model, recorder = layer([0.4]), OscillationRecorder()
    for _ in range(2):
        recorder.reset()
        with attach(model, [recorder]):
            for _ in range(3):
                model(torch.ones(1, 2))
    assert recorder.result(1).scalars["changed"] == 0
    assert recorder.result(1).rows[0]["returned"] is None


def test_unquantized_weights_are_refused_with_the_fix():
    for model in (llama(), converted(llama(), {"activation": {"bits": 8}})):
        recorder = OscillationRecorder()
        with attach(model, [recorder]):
            model(**batch())
        with pytest.raises(ConfigError, match="--quantizers"):
            recorder.result(1)
