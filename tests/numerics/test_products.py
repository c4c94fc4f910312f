"""The definition of the fused operations against the oracle, and against the codes and results of simulated.py."""

import numpy as np
import pytest
import torch
from numerics import oracle

from ds_quant.linear import modules, recipe, simulated
from ds_quant.numerics import products
from ds_quant.numerics.integer import symmetric_levels
from ds_quant.numerics.random import derive_key, fold_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 7), (5, 1), (7, 13), (33, 20), (0, 5), (5, 0), (0, 0))
WORDS = (oracle.fold_key(11), oracle.fold_key(12))
KEYS = (fold_key(11), fold_key(12))


def wild(rng, shape):
    """Groups of all kinds: usual, denormal, huge, of zeros, not finite."""
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 8)
    for index in np.ndindex(*(min(n, 4) for n in shape)):
        if rng.uniform() < 0.2:
            x[index] = rng.choice([0.0, -0.0, 1e-44, 3e38, np.inf, -np.inf, np.nan])
    if shape[0] > 2:
        x[2] = 0.0
    if shape[1] > 2:
        x[:, 2] = 2.0**-149 * rng.integers(-300, 300, size=shape[0])
    return torch.from_numpy(x).float()


def assert_quantized(got, y, bits, granularity, words, context):
    codes, scale = got
    expected, expected_scale, _ = oracle.quantize(
        y, bits, granularity=granularity, block_size=0, symmetric=True, key=words
    )
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert scale.dtype == torch.float32
    assert scale.shape == (1 if granularity == "tensor" else y.shape[0 if granularity == "row" else 1],)
    np.testing.assert_array_equal(codes.numpy(), expected, err_msg=context)
    np.testing.assert_array_equal(
        oracle.bits_of(scale.numpy()), oracle.bits_of(expected_scale.reshape(-1)), err_msg=context
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantizers(rng, shape, bits):
    levels = symmetric_levels(bits)
    for dtype in DTYPES:
        x = wild(rng, shape).to(dtype)
        array = x.float().numpy()
        column_scale = torch.from_numpy(10.0 ** rng.uniform(-3, 3, size=shape[1])).float()
        row_scale = torch.from_numpy(10.0 ** rng.uniform(-3, 3, size=shape[0])).float()
        with np.errstate(all="ignore"):
            by_column, by_row = array * column_scale.numpy(), array * row_scale.numpy()[:, None]
        for keys, words in ((None, (None, None)), (KEYS, WORDS)):
            context = f"{dtype} {keys}"
            first, second = keys or (None, None)
            rows = products.quantize_rows(x, levels, key=first)
            assert_quantized(rows, array, bits, "row", words[0], context)
            columns = products.quantize_columns(x, levels, key=first)
            assert_quantized(columns, array, bits, "column", words[0], context)
            assert_quantized(products.quantize_tensor(x, levels, key=first), array, bits, "tensor", words[0], context)
            rows = products.quantize_rows(x, levels, column_scale=column_scale, key=first)
            assert_quantized(rows, by_column, bits, "row", words[0], context)
            columns = products.quantize_columns(x, levels, row_scale=row_scale, key=second)
            assert_quantized(columns, by_row, bits, "column", words[1], context)
            both = products.quantize_both(
                x, levels, column_scale=column_scale, row_scale=row_scale, row_key=first, column_key=second
            )
            assert_quantized(both[:2], by_column, bits, "row", words[0], context)
            assert_quantized(both[2:], by_row, bits, "column", words[1], context)


def test_one_factor_for_all(rng):
    x, factor = wild(rng, (7, 13)), torch.tensor([3e-3])
    with np.errstate(all="ignore"):
        y = x.numpy() * np.float32(3e-3)
    for one in (factor, factor.reshape(()), factor.reshape(1, 1)):
        assert_quantized(products.quantize_rows(x, 127.0, column_scale=one), y, 8, "row", None, "")
        assert_quantized(products.quantize_columns(x, 127.0, row_scale=one), y, 8, "column", None, "")


def test_strides_make_no_difference(rng):
    x = wild(rng, (13, 7))
    for quantize in (products.quantize_rows, products.quantize_columns, products.quantize_tensor):
        got, expected = quantize(x.t(), 127.0, key=KEYS[0]), quantize(x.t().contiguous(), 127.0, key=KEYS[0])
        assert torch.equal(got[0], expected[0])
        assert got[0].is_contiguous()
        assert torch.equal(got[1].nan_to_num(-1), expected[1].nan_to_num(-1))


def rounded(y, dtype):
    """float32 to dtype and back, ties to even."""
    if dtype == torch.float32:
        return y
    if dtype == torch.float16:
        return y.astype(np.float16).astype(np.float32)
    bits = y.view(np.uint32).astype(np.uint64)
    up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return np.where(np.isnan(y), y, up.astype(np.uint32).view(np.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue(rng, shape):
    exponents = rng.uniform(0, 31, size=shape)
    integers = (rng.choice([-1, 1], size=shape) * 2.0**exponents).astype(np.int64).clip(-(2**31), 2**31 - 1)
    row_scale = (10.0 ** rng.uniform(-6, 1, size=shape[0])).astype(np.float32)
    column_scale = (10.0 ** rng.uniform(-6, 1, size=shape[1])).astype(np.float32)
    column_scale[1:2], row_scale[1:2] = np.nan, 0.0
    one = np.float32(1.7e-5)
    matrix = torch.from_numpy(integers.astype(np.int32))
    for rows, columns in ((None, None), (row_scale, None), (None, column_scale), (row_scale, column_scale), (one, one)):
        for dtype in DTYPES:
            for bias in (None, torch.from_numpy(rng.normal(size=shape[1])).to(dtype)):
                with np.errstate(all="ignore"):
                    y = integers.astype(np.float32)
                    if rows is not None:
                        y = y * np.reshape(rows, (-1, 1))
                    if columns is not None:
                        y = y * columns
                    if bias is not None:
                        y = y + bias.float().numpy()
                    expected = rounded(y, dtype)
                scales = [None if s is None else torch.from_numpy(np.atleast_1d(s)) for s in (rows, columns)]
                got = products.epilogue(matrix, row_scale=scales[0], column_scale=scales[1], bias=bias, dtype=dtype)
                assert got.dtype == dtype
                np.testing.assert_array_equal(oracle.bits_of(got.float().numpy()), oracle.bits_of(expected))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", [modules.QuantLinear, None], ids=["linear", "transposed"])
@pytest.mark.parametrize(
    ("weight", "activation", "gradient"), [("channel", "token", "outer"), ("tensor", "tensor", "tensor")]
)
def test_linear_has_these_operands_and_results(monkeypatch, rounding, layout, weight, activation, gradient):
    """Every sum of products of this size is exact in fp32, so that results are equal as well."""
    calls = []
    product = simulated.product

    def recording(a, b, dtype, bias=None, **how):
        calls.append((a, b, bias, product(a, b, dtype, bias, **how)))
        return calls[-1][-1]

    monkeypatch.setattr(simulated, "product", recording)
    torch.manual_seed(0)
    config = {
        "weight": {"bits": 8, "granularity": weight},
        "activation": {"bits": 6, "granularity": activation},
        "gradient": {"bits": 8, "granularity": gradient, "rounding": rounding},
    }
    module = modules.QuantLinear(48, 24, dtype=torch.bfloat16, config=config)
    if layout is None:
        module.weight = torch.nn.Parameter(module.weight.detach().t().contiguous())
        module.transposed = True
        module.configure_quantization(module.quant_config, module.step_key, index=3)
    x = torch.randn(3, 20, 48, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)
    w = (module.weight.t() if module.transposed else module.weight).detach()
    x2, g2 = x.detach().reshape(-1, 48), g.reshape(-1, 24)

    per_row = products.quantize_rows if weight == "channel" else products.quantize_tensor
    qw, w_scale = per_row(w, 127.0)
    per_row = products.quantize_rows if activation == "token" else products.quantize_tensor
    qx, x_scale = per_row(x2, 31.0)
    first = second = None
    if rounding == "stochastic":
        local, stream = module.step_key.local(x.device), module._quant_plan.stream
        first = derive_key(local, stream + recipe.STREAM_GRAD_INPUT)
        second = derive_key(local, stream + recipe.STREAM_GRAD_WEIGHT)
    if gradient == "outer":
        g_rows, g_scale, g_columns, g_column_scale = products.quantize_both(
            g2, 127.0, column_scale=w_scale, row_scale=x_scale, row_key=first, column_key=second
        )
        by_input = by_weight = None
    else:
        g_rows, g_scale = products.quantize_tensor(g2, 127.0, key=first)
        g_columns, g_column_scale = products.quantize_tensor(g2, 127.0, key=second)
        by_input, by_weight = w_scale, x_scale

    forward, dx, dw = calls
    assert_operand(forward[0], qx, x_scale)
    assert_operand(forward[1], qw, w_scale)
    assert_operand(dx[0], g_rows, g_scale)
    assert_operand(dx[1], qw, by_input)
    left, right = (dw[1], dw[0]) if module.transposed else (dw[0], dw[1])
    assert_operand(left, g_columns, g_column_scale)
    assert_operand(right, qx, by_weight)

    def result(a, b, row_scale, column_scale, bias=None):
        return products.epilogue(
            a.int() @ b.int(), row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=torch.bfloat16
        )

    assert torch.equal(forward[3], result(qx, qw.t(), x_scale, w_scale, forward[2]))
    assert torch.equal(dx[3], result(g_rows, qw, g_scale, by_input))
    if module.transposed:
        assert torch.equal(dw[3], result(qx.t(), g_columns, by_weight, g_column_scale))
    else:
        assert torch.equal(dw[3], result(g_columns.t(), qx, g_column_scale, by_weight))


def assert_operand(operand, codes, scale):
    assert torch.equal(operand.value.codes, codes)
    assert operand.scaled == (scale is not None)
    if scale is not None:
        assert torch.equal(operand.value.scale.reshape(-1), scale)
