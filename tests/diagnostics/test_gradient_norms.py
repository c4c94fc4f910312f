"""Norms, spikes and shares of known gradients."""

import math

import pytest
import torch
from small_models import batch, converted, gpt2
from torch import nn

from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.gradient_norms import GradientNormRecorder, norm_history, spike_ratios, zero_counts
from ds_quant.diagnostics.hooks import attach


def test_a_known_sparse_gradient():
    grad = torch.zeros(1, 100)
    grad[0, :7] = torch.tensor([1.0, -0.5, 1.2 / 14, 1 / 14, 1.2 / 254, 1 / 254, 2.0**-20])
    zero, four, eight, twelve, sixteen, twenty_four, numel = zero_counts(grad).tolist()
    assert (zero, numel) == (93, 100)
    assert four == 97  # 1/14 of the largest lies half-way to the first code, and goes to even
    assert eight == 95
    assert (twelve, sixteen, twenty_four) == (94, 94, 93)
    for bits, count in ((4, four), (8, eight)):
        levels = 2 ** (bits - 1) - 1
        assert (torch.round(grad * levels) == 0).sum() == count


def test_the_recorder_has_the_norms_of_the_gradients_and_the_shares_of_the_outputs():
    layer = nn.Sequential(nn.Linear(3, 4))
    x, grad = torch.randn(10, 3), torch.zeros(10, 4)
    grad[0, 0], grad[1, 1] = 1.0, 0.01
    recorder = GradientNormRecorder()
    with attach(layer, [recorder]):
        (layer(x) * grad).sum().backward()
    found = recorder.result(4)
    norms = {row["parameter"]: row["norm"] for row in found.rows}
    assert norms == pytest.approx({name: float(p.grad.norm()) for name, p in layer.named_parameters()})
    assert found.scalars["norm"] == pytest.approx(math.hypot(*norms.values()))
    weight, bias = found.rows
    assert weight["output_zero"] == found.scalars["output_zero"] == 38 / 40
    assert weight["output_becomes_zero_4"] == 39 / 40
    assert weight["output_becomes_zero_8"] == 38 / 40
    assert bias["output_zero"] is None


def test_of_large_gradients_rows_from_all_over_are_counted():
    grad = torch.zeros(4096, 256)
    grad[:, ::2] = 1e-6
    grad[4095, 1] = 1.0  # in none of the rows that are counted
    zero, *below, numel = zero_counts(grad).tolist()
    assert numel == 2**18
    assert zero == numel / 2
    assert below[:3] == [numel] * 3


def test_micro_batches_count_by_their_mean_square():
    layer = nn.Sequential(nn.Linear(1, 1, bias=False))
    recorder = GradientNormRecorder()
    with attach(layer, [recorder]):
        for value in (3.0, 4.0):
            layer(torch.tensor([[value]])).sum().backward()
    assert recorder.result(1).scalars["norm"] == pytest.approx(math.sqrt((9 + 16) / 2))


def test_tied_and_transposed_weights_have_their_layer():
    model, recorder = converted(gpt2()).eval(), GradientNormRecorder()
    with attach(model, [recorder]):
        model(**batch()).loss.backward()
    rows = {row["parameter"]: row for row in recorder.result(1).rows}
    assert rows["transformer.wte.weight"]["output_zero"] is not None  # tied to lm_head
    assert rows["transformer.h.0.attn.c_attn.weight"]["output_zero"] is not None
    assert rows["transformer.wpe.weight"]["output_zero"] is None
    assert rows["transformer.wpe.weight"]["norm"] == pytest.approx(float(model.transformer.wpe.weight.grad.norm()))


def test_spikes_stand_above_the_median_before_them():
    norms = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 3.1, 1.0, math.inf, 2.9]
    ratios = spike_ratios(norms)
    assert ratios[:5] == [None] * 5
    assert ratios[5:] == pytest.approx([1.0, 3.1, 1.0, math.inf, 2.9])
    found = norm_history(range(10), norms)
    assert found.settings["spikes_at"] == [6, 8]
    assert found.scalars["spikes"] == 2
    assert found.scalars["largest_over_median"] == math.inf
    assert [row["spike"] for row in found.rows] == [0] * 6 + [1, 0, 1, 0]
    assert norm_history(range(10), norms, factor=2.8).settings["spikes_at"] == [6, 8, 9]


def test_the_window_follows_a_level_that_changes():
    norms = [1.0] * 10 + [4.0] * 10
    assert norm_history(range(20), norms, window=5).settings["spikes_at"] == [10, 11, 12]
    assert len(norm_history(range(20), norms, window=50).settings["spikes_at"]) == 10


def test_zero_and_missing_norms():
    assert spike_ratios([0.0] * 6 + [1.0]) == [None] * 7
    with pytest.raises(ConfigError, match="no norm"):
        norm_history([], [])
