"""What is counted, and what is made of it."""

import math

import numpy as np
import pytest
import torch
from collectives_definition import simulate

from ds_quant.comm.layout import Span, build, cut_evenly
from ds_quant.comm.statistics import Statistics, Traffic
from ds_quant.numerics import wire


def test_counts_add_up_and_begin_anew():
    statistics = Statistics()
    statistics.count(100, 300, 4)
    statistics.count(50, 100, 2)
    statistics.errors += [1.0, 16.0]
    errors = statistics.errors
    found = statistics.take()
    assert found == Traffic(150, 1400, 1.0, 16.0)
    assert found.compression == 1400 / 150
    assert found.relative_error == 0.25
    assert statistics.take() == Traffic(0, 0, 0.0, 0.0)
    assert statistics.errors is errors, "kernels keep the array"


def test_without_errors():
    statistics = Statistics(with_errors=False)
    statistics.count(1, 1, 4)
    assert statistics.errors is None
    assert statistics.take() == Traffic(1, 4, 0.0, 0.0)


def test_of_nothing():
    nothing = Traffic(0, 0, 0.0, 0.0)
    assert math.isnan(nothing.compression)
    assert math.isnan(nothing.relative_error)


@pytest.mark.parametrize("bits", [8, 4])
def test_relative_error_is_that_of_what_was_quantized(bits):
    fmt = wire.WireFormat(bits, 64)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    layout = build(cut_evenly([Span("", 0, 0, 0, 1000)], fmt, 2), fmt, 2, 0)
    statistics = Statistics()
    message = torch.zeros(sum(layout.send_splits), dtype=torch.uint8)
    wire.quantize([values], layout.sent, message, fmt, errors=statistics.errors)
    # Half of the elements go to rank 1. A single sender beside zeros: what arrives is what was sent, less a second
    # quantization that finds its own grid and loses nothing but roundings of fp32.
    sent = values[layout.sent.start[0] :]
    shares = [[values], [torch.zeros(1000)]]
    arrived = simulate(shares, layout.pieces, fmt)[0][0][layout.sent.start[0] :]
    expected = float((arrived - sent).double().norm() / sent.double().norm())
    assert expected > 0.001
    assert statistics.take().relative_error == pytest.approx(expected, rel=1e-3)


def test_errors_are_float64_for_the_kernels():
    assert Statistics().errors.dtype == np.float64
    assert Statistics().errors.shape == (2,)


def test_errors_on_a_device_are_read_once():
    statistics = Statistics()
    assert statistics.errors_on(torch.device("cpu")) is statistics.errors
    there = statistics.errors_on(torch.device("meta"))
    assert there.device.type == "meta"
    assert statistics.errors_on(torch.device("meta")) is there
    statistics._on_devices = {(torch.device("cpu"), 1): torch.tensor([1.0, 16.0]).double()}
    assert statistics.take().relative_error == 0.25
    assert statistics.take() == Traffic(0, 0, 0.0, 0.0)
    assert Statistics(with_errors=False).errors_on(torch.device("meta")) is None
