"""Values of a quantized state: got back, NaN, zeros, empty shapes, any layout."""

import itertools
import math

import numpy as np
import pytest
import torch
from quantized_states import ALL, BLOCK_SIZE, SOME, make, plain, values_of

from ds_quant.numerics import code_map, dequantize_blockwise, fold_key, quantize_blockwise
from ds_quant.optim.state import QuantizedState


def blocks_of_any_kind(rng, signed):
    """Rows of 32: usual ones, zeros, one value, many magnitudes, and the whole range of scales that stays normal."""
    rows = [rng.normal(size=32) * 10.0 ** rng.uniform(-6, 30) for _ in range(6)]
    rows += [np.zeros(32), np.full(32, rng.normal()), np.exp(4 * rng.normal(size=32)) * rng.choice([-1, 1], 32)]
    rows += [np.where(rng.random(32) < 0.8, 0.0, rng.normal(size=32)), rng.normal(size=32) * 2.0**-40]
    rows.append(rng.normal(size=19))
    values = torch.from_numpy(np.concatenate(rows).astype(np.float32))
    return values if signed else values.abs()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("case", ALL)
def test_what_was_dequantized_gets_its_codes_and_scales_back(case, rounding, rng):
    name, bits, signed = case
    m = code_map(name, bits, signed=signed)
    for _ in range(4):
        values = blocks_of_any_kind(rng, signed)
        key = fold_key(int(rng.integers(2**63))) if rounding == "stochastic" else None
        q = quantize_blockwise(values, m, block_size=BLOCK_SIZE, rounding=rounding, key=key)
        once = dequantize_blockwise(q)
        kept = torch.stack([part.abs().max() for part in once.split(BLOCK_SIZE)]) == q.scale
        if name == "dynamic" and signed:  # it has 1, but not -1
            kept = kept | (torch.stack([part.min() for part in values.split(BLOCK_SIZE)]) != -q.scale)
        elif name == "float" and rounding == "stochastic":  # may move even the largest value, once in 2^16 blocks
            assert kept.sum() >= len(kept) - 1
        else:
            assert kept.all()
        again = quantize_blockwise(once, m, block_size=BLOCK_SIZE)
        assert torch.equal(again.scale[kept], q.scale[kept])
        width = BLOCK_SIZE * bits // 8
        for block, codes in enumerate(q.codes.split(width)):
            assert not kept[block] or torch.equal(again.codes[block * width :][:width], codes)
        moment = QuantizedState(q, (len(values),))
        window = moment[3 : len(values) - 1]
        window.copy_(window.dequantize())
        assert torch.equal(moment.blocks.codes, again.codes)


@pytest.mark.parametrize("case", [case for case in ALL if case[::2] != ("dynamic", True)])
def test_denormal_values_come_back_as_near_as_fp32_has_them(case, rng):
    name, bits, signed = case
    m = code_map(name, bits, signed=signed)
    values = torch.from_numpy((rng.normal(size=320) * 2.0 ** rng.uniform(-125, -60)).astype(np.float32))
    once = dequantize_blockwise(quantize_blockwise(values if signed else values.abs(), m, block_size=BLOCK_SIZE))
    twice = dequantize_blockwise(quantize_blockwise(once, m, block_size=BLOCK_SIZE))
    assert (once.double() - twice.double()).abs().max() <= 2.0**-149


@pytest.mark.parametrize("case", ALL)
def test_nan_blocks_stay_nan_and_alone(case, rng):
    name, bits, signed = case
    values = values_of(rng, (100,), signed).abs()
    values[40] = math.nan
    moment = QuantizedState.quantize(values, code_map(name, bits, signed=signed), BLOCK_SIZE)
    clean = plain(moment)
    assert clean.isnan().tolist() == [32 <= i < 64 for i in range(100)]
    moment.copy_(moment.dequantize())
    assert torch.equal(plain(moment).nan_to_num(7.0), clean.nan_to_num(7.0))
    moment[50:70].mul_(1.0)
    assert plain(moment).isnan().tolist() == [32 <= i < 64 for i in range(100)]
    moment[32:64] = 0.5
    assert torch.equal(plain(moment)[32:64], torch.full((32,), 0.5))
    moment[70] = math.inf
    assert plain(moment).isnan().tolist() == [64 <= i < 96 for i in range(100)]


@pytest.mark.parametrize("case", SOME)
def test_zeros(case, rng):
    name, bits, signed = case
    m = code_map(name, bits, signed=signed)
    for shape, block_size in itertools.product(((), (0,), (3, 0), (1,), (33,), (6, 35)), (32, 64)):
        moment = QuantizedState.zeros(shape, m, block_size, torch.device("cpu"), stream=3)
        like = quantize_blockwise(torch.zeros(shape).reshape(-1), m, block_size=block_size)
        assert moment.blocks.codes.shape == like.codes.shape
        assert moment.blocks.codes.dtype == like.codes.dtype
        assert moment.blocks.scale.shape == like.scale.shape
        assert moment.shape == shape
        assert moment.whole
        assert torch.equal(moment.dequantize(), torch.zeros(shape))
        assert moment.stored_bytes == like.codes.nbytes + like.scale.nbytes
        moment.add_(1.0)
        assert torch.equal(moment.dequantize(), torch.ones(shape))
        assert torch.equal(moment.view(-1)[:1].dequantize(), torch.ones(shape).view(-1)[:1])


def test_shapes_without_elements_or_dimensions(rng):
    scalar, empty = make(rng, ()), make(rng, (0, 3))
    assert scalar.item() == plain(scalar).item()
    assert scalar.view(1).shape == (1,)
    scalar.mul_(2)
    empty.mul_(2)
    assert empty.sum() == 0
    assert empty.view(-1).shape == (0,)
    assert empty[:, 1:].shape == (0, 2)
    assert empty.dequantize().shape == (0, 3)
    window = make(rng, (70,))[70:]
    assert window.mul_(2).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantize_takes_any_layout(dtype, rng):
    values = values_of(rng, (35, 6), True).to(dtype).t().requires_grad_()
    m = code_map("power", 8, signed=True)
    moment = QuantizedState.quantize(values, m, BLOCK_SIZE, stream=4)
    expected = quantize_blockwise(values.detach().float().reshape(-1), m, block_size=BLOCK_SIZE)
    assert torch.equal(moment.blocks.codes, expected.codes)
    assert (moment.shape, moment.stream, moment.requires_grad) == ((6, 35), 4, False)
    again = QuantizedState.quantize(moment, m, BLOCK_SIZE)
    assert torch.equal(again.blocks.codes, expected.codes)


def test_meta_moments_have_sizes_and_no_memory():
    m = code_map("power", 4, signed=True)
    moment = QuantizedState.zeros((10**5, 10**4), m, 128, torch.device("meta"))
    assert moment.stored_bytes == 10**9 // 2 + 10**9 // 128 * 4
    assert moment[3:5].dequantize().shape == (2, 10**4)
    assert moment.detach().clone().blocks.codes.device.type == "meta"


def test_repr_says_what_is_stored(rng):
    moment = make(rng, (6, 35))
    expected = "QuantizedState(shape=(6, 35), 4-bit power, block_size=32, device=cpu)"
    assert repr(moment) == str(moment) == expected
    assert (
        repr(moment[1]) == "QuantizedState(shape=(35,), 4-bit power, block_size=32, device=cpu, window from 35 of 210)"
    )
