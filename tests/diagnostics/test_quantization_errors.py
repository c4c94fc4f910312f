"""Errors of quantizers on tensors whose codes are known."""

import itertools
import math

import pytest
import torch
from small_models import batch, converted, gpt2, llama

import ds_quant
from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.quantization_error import QuantizationErrorRecorder, error_figures, error_sums
from ds_quant.numerics import fake_quantize, quantize
from ds_quant.numerics.format import Integers


def figures(x, bits, **how):
    return error_figures(*error_sums(x, quantize(x, bits, **how), Integers(bits, **how)))


def test_a_hand_computed_error():
    # 4 bits, absmax 7: the scale is 1. 0.4 becomes 0, 2.25 becomes 2, 7 and -7 are the ends, 0 is not counted.
    found = figures(torch.tensor([[7.0, -7.0, 0.4, 2.25, 0.0]]), 4)
    error, square = 0.4**2 + 0.25**2, 49 + 49 + 0.4**2 + 2.25**2
    assert found["relative_l2"] == pytest.approx(math.sqrt(error / square), rel=1e-6)
    assert found["snr_db"] == pytest.approx(10 * math.log10(square / error), rel=1e-6)
    assert found["max_error"] == pytest.approx(0.4)
    assert found["becomes_zero"] == 1 / 4
    assert found["at_ends"] == 2 / 4


def test_asymmetric_codes():
    # 2 bits, 4 levels from 0 to 3: the scale is 1; 0.4 becomes 0, 3 and both zeros' codes are ends.
    found = figures(torch.tensor([[0.0, 0.4, 2.0, 3.0]]), 2, symmetric=False)
    assert found["max_error"] == pytest.approx(0.4)
    assert found["becomes_zero"] == 1 / 3
    assert found["at_ends"] == 2 / 3


def test_the_ends_of_the_full_range():
    # 4 bits, absmax 7.5: the scale is 1, codes are 7, -8, -7 and 1, and -7 is no end.
    model, recorder = torch.nn.Sequential(torch.nn.Linear(4, 2)), QuantizationErrorRecorder()
    ds_quant.convert(model, {"activation": {"bits": 4, "range": "full"}})
    with attach(model, [recorder]):
        model(torch.tensor([[7.5, -7.5, -6.6, 1.0]]))
    assert recorder.result(1).scalars["activation_at_ends"] == 2 / 4


def test_exact_and_empty_tensors():
    assert figures(torch.tensor([[3.0, -3.0, 1.0]]), 3)["relative_l2"] == 0
    assert figures(torch.tensor([[3.0, -3.0, 1.0]]), 3)["snr_db"] == math.inf
    assert all(math.isnan(value) for value in figures(torch.zeros(2, 3), 8).values())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_layers_are_measured_with_their_own_quantizers(make):
    linear = {"weight": {"bits": 4}, "activation": {"bits": 6, "granularity": "tensor", "rounding": "stochastic"}}
    model, recorder = converted(make(), linear).eval(), QuantizationErrorRecorder()
    inputs = {}
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith(("q_proj", "c_attn")))
    layer.register_forward_pre_hook(lambda module, args: inputs.setdefault(name, args[0].detach()))
    with attach(model, [recorder]), torch.no_grad():
        model(**batch())
    found = recorder.result(2)
    rows = {(row["layer"], row["operand"]): row for row in found.rows}
    assert len(rows) == len(found.rows) == (28 if make is llama else 16)
    weight = layer.weight.detach().t() if layer.transposed else layer.weight.detach()
    kept = fake_quantize(weight, 4, granularity="row")
    row = rows[name, "weight"]
    assert row["bits"] == 4
    assert row["relative_l2"] == pytest.approx(float((weight - kept).norm() / weight.norm()), rel=1e-5)
    assert row["max_error"] == pytest.approx(float((weight - kept).abs().max()), rel=1e-6)
    x = inputs[name]
    kept = fake_quantize(x, 6)  # rounded to nearest
    row = rows[name, "activation"]
    assert row["relative_l2"] == pytest.approx(float((x - kept).norm() / x.norm()), rel=1e-5)
    errors = [row["max_error"] for key, row in rows.items() if key[1] == "weight"]
    assert found.scalars["weight_max_error"] == max(errors)


def test_the_error_falls_by_six_decibels_a_bit():
    x = torch.rand(1000, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decibels = [figures(x, bits)["snr_db"] for bits in (4, 5, 6, 7, 8)]
    # Evenly spread values: the error is that of steps of 2/(2^b - 2), so the ratio to the next is 20 log10 of it.
    for bits, (lower, higher) in enumerate(itertools.pairwise(decibels), start=4):
        assert higher - lower == pytest.approx(20 * math.log10((2**bits - 1) / (2 ** (bits - 1) - 1)), abs=0.1)


def test_a_model_without_quantizers_is_refused_with_the_fix():
    for model in (llama(), converted(llama(), {"gradient": {"bits": 8}})):
        recorder = QuantizationErrorRecorder()
        with attach(model, [recorder]):
            model(**batch())
        with pytest.raises(ConfigError, match="--quantizers"):
            recorder.result(1)


def test_layers_that_are_left_out_are_passed_over():
    model, recorder = llama(), QuantizationErrorRecorder()
    ds_quant.convert(model, {"weight": {"bits": 8}, "include": ["*q_proj"]})
    with attach(model, [recorder]):
        model(**batch())
    found = recorder.result(1)
    assert {(row["layer"].rpartition(".")[2], row["operand"]) for row in found.rows} == {("q_proj", "weight")}
    assert not any(name.startswith("activation") for name in found.scalars)
