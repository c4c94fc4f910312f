"""Errors of quantized gradients: zero where the quantizer is exact, and one computed by hand."""

import math

import pytest
import torch
from small_models import batch, converted, gpt2, llama
from torch import nn

import ds_quant
from ds_quant.base.errors import ConfigError
from ds_quant.config import GradientCommunicationConfig, GradientConfig
from ds_quant.diagnostics.gradient_error import (
    GradientErrorRecorder,
    error_sums,
    gradient_error,
    quantized_weight_gradient,
    through_wire,
)
from ds_quant.diagnostics.hooks import attach


def look(model, x, grad, recorder):
    with attach(model, [recorder]):
        (model(x) * grad).sum().backward()
    return recorder.result(1)


def test_an_exact_quantizer_has_no_error():
    # Integers up to 127 whose largest is 127: the codes are the values.
    generator = torch.Generator().manual_seed(0)
    grad = torch.randint(-127, 128, (6, 4), generator=generator).float()
    grad[0] = 127.0
    x = torch.randint(-3, 4, (6, 8), generator=generator).float()
    model = nn.Sequential(nn.Linear(8, 4))
    for granularity in ("tensor", "channel"):
        found = look(model, x, grad, GradientErrorRecorder(GradientConfig(bits=8, granularity=granularity)))
        assert found.rows[0]["cosine"] == pytest.approx(1, abs=1e-12)
        assert (found.rows[0]["relative_l2"], found.rows[0]["relative_l1"]) == (0, 0)
        assert found.rows[0]["norm_ratio"] == 1


def test_a_hand_computed_error():
    # One token, X = [1, 2], G = [7, 3.4]: 4 bits per tensor have the scale 1, so that 3.4 becomes 3.
    # dW = [[7, 14], [3.4, 6.8]] exactly, [[7, 14], [3, 6]] quantized.
    model = nn.Sequential(nn.Linear(2, 2))
    x, grad = torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, 3.4]])
    found = look(model, x, grad, GradientErrorRecorder(GradientConfig(bits=4, granularity="tensor")))
    (row,) = found.rows
    exact, quantized = 5 * (49 + 3.4**2), 5 * (49 + 9)
    assert row["relative_l2"] == pytest.approx(math.sqrt(5 * 0.16 / exact), rel=1e-6)
    assert row["relative_l1"] == pytest.approx(3 * 0.4 / (3 * 10.4), rel=1e-6)
    assert row["cosine"] == pytest.approx(5 * (49 + 3.4 * 3) / math.sqrt(exact * quantized), rel=1e-7)
    assert row["norm_ratio"] == pytest.approx(math.sqrt(quantized / exact), rel=1e-6)
    assert found.scalars["lowest_cosine"] == row["cosine"]
    assert found.scalars["highest_relative_l2"] == row["relative_l2"]


@pytest.mark.parametrize("linear", [
    {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}},
    {"weight": {"bits": 4}, "activation": {"bits": 4}, "gradient": {"bits": 4}},
    {"activation": {"bits": 8}, "gradient": {"bits": 4, "granularity": "token"}},
    {"gradient": {"bits": 4, "granularity": "token", "used_for": ["weight"]}},
    {"activation": {"bits": 4}, "gradient": {"bits": 8, "granularity": "channel"}, "backward_operands": "original"},
    {"activation": {"bits": 4, "granularity": "block", "block_size": 16}},
    {"activation": {"bits": 4, "symmetric": False}, "gradient": {"bits": 8}},
    {"activation": {"bits": 8}, "gradient": {"format": "nvfp4"}},
    {"activation": {"bits": 4}, "gradient": {"bits": 4}, "rotation": {"block_size": 32}},
    {"activation": {"bits": 4, "split_mean": True}, "gradient": {"bits": 4, "split_mean": True}},
    {"activation": {"bits": 4, "outlier_share": 0.1}, "gradient": {"bits": 8, "granularity": "token"}},
])  # fmt: skip
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_quantized_gradient_is_the_one_of_training(make, linear):
    model = converted(make(), linear).eval()
    seen = {}

    class Both(GradientErrorRecorder):
        def observe_grad_output(self, name, module, x, grad_output):
            super().observe_grad_output(name, module, x, grad_output)
            x2, g2 = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
            seen[name] = module, quantized_weight_gradient(x2, g2, module._quant_plan) if name in self._plans else None

    with attach(model, [Both()]):
        model(**batch()).loss.backward()
    compared = 0
    for module, found in seen.values():
        if found is not None:
            compared += 1
            grad = module.weight.grad.t() if module.transposed else module.weight.grad
            # Sums of 64 products of fp32, in another order.
            torch.testing.assert_close(found, grad, rtol=0, atol=64 * 2**-23 * float(grad.abs().max()))
    assert compared == (14 if make is llama else 8)


def test_gradients_by_ms_eden():
    """Along the exact one (no factor is left), and nearer to it than by stochastic rounding."""
    x, grad = torch.randn(256, 64), torch.randn(256, 32)
    found = {}
    for rounding in ("ms_eden", "stochastic"):
        gradient = {"bits": 4, "granularity": "block", "block_size": 16, "rounding": rounding}
        rotation = {"block_size": 64, "signs": "drawn"}
        linear = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": gradient, "rotation": rotation}
        model = converted(nn.Sequential(nn.Linear(64, 32)), {**linear, "exclude": []})
        found[rounding] = look(model, x, grad, GradientErrorRecorder()).scalars["relative_l2"]
    # The root of a half, as of the squares.
    assert 0 < found["ms_eden"] < 0.85 * found["stochastic"]


def test_the_error_falls_with_bits_and_the_wire_adds_to_it():
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(64, 32, generator=generator), torch.randn(64, 16, generator=generator)
    model = nn.Sequential(nn.Linear(32, 16))
    errors = {}
    for bits in (2, 4, 8):
        for wire in (None, 4, 8):
            config = wire and GradientCommunicationConfig(bits=wire)
            found = look(model, x, grad, GradientErrorRecorder(GradientConfig(bits=bits), config))
            errors[bits, wire] = found.scalars["relative_l2"]
    assert errors[2, None] > errors[4, None] > errors[8, None] > 0
    assert errors[8, 4] > errors[8, 8] > errors[8, None]


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_wire_alone(bits, rotation):
    config = GradientCommunicationConfig(bits=bits, block_size=32, rotation=rotation)
    grad = torch.randn(3, 33, generator=torch.Generator().manual_seed(0))
    sent = through_wire(grad, config)
    assert sent.shape == grad.shape
    if rotation == "none":
        flat, n = grad.reshape(-1), 2 ** (bits - 1) - 1
        blocks = [flat[i : i + 32] for i in range(0, 99, 32)]
        by_hand = torch.cat([(b / (b.abs().max() / n)).round() * (b.abs().max() / n) for b in blocks])
        torch.testing.assert_close(sent.reshape(-1), by_hand, rtol=1e-6, atol=0)
    error = (sent - grad).norm() / grad.norm()
    assert 0 < error < (0.2 if bits == 4 else 0.01)


def test_a_wire_measures_layers_that_quantize_nothing_with_the_layout_of_the_parameter():
    model, recorder = gpt2().eval(), GradientErrorRecorder(wire=GradientCommunicationConfig(bits=4, block_size=32))
    with attach(model, [recorder]):
        model(**batch()).loss.backward()
    row = next(row for row in recorder.result(1).rows if row["layer"] == "transformer.h.0.mlp.c_fc")
    exact = model.transformer.h[0].mlp.c_fc.weight.grad
    expected = gradient_error(error_sums(exact, through_wire(exact, recorder.wire)))
    assert row["relative_l2"] == pytest.approx(expected.relative_l2, rel=1e-5)


def test_stochastic_rounding_repeats_itself_and_depends_on_the_seed():
    config = GradientConfig(bits=4, rounding="stochastic")
    x, grad = torch.randn(16, 8), torch.randn(16, 4)
    model = nn.Sequential(nn.Linear(8, 4))
    errors = [look(model, x, grad, GradientErrorRecorder(config, seed=seed)).scalars for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_a_zero_gradient_has_no_error_to_speak_of():
    assert all(math.isnan(value) for value in gradient_error(error_sums(torch.zeros(3), torch.zeros(3))))
    assert gradient_error(error_sums(torch.ones(3), torch.zeros(3))).cosine == 0


def test_nothing_quantized_is_refused_with_the_fix():
    recorder = GradientErrorRecorder()
    with attach(llama(), [recorder]):
        pass
    with pytest.raises(ConfigError, match="name one"):
        recorder.result(1)


def test_layers_that_are_left_out_are_passed_over():
    model = llama()
    ds_quant.convert(model, {"gradient": {"bits": 8}, "include": ["*q_proj"]})
    recorder = GradientErrorRecorder()
    with attach(model, [recorder]):
        model(**batch()).loss.backward()
    found = recorder.result(1)
    assert [row["layer"].rpartition(".")[2] for row in found.rows] == ["q_proj", "q_proj"]
