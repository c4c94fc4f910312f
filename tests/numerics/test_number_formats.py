"""Every format by its name: codes and scales against a slow definition, and against other implementations."""

import pytest
import torch
from numerics import format_oracle, oracle

from ds_quant.base.number_formats import FORMATS
from ds_quant.numerics.format import fake_quantize_to, named_format, quantize_to
from ds_quant.numerics.integer import dequantize, expand_scale, integer_values
from ds_quant.numerics.random import fold_key

SHAPES = ((5, 70), (1, 1), (3, 32), (33, 48))
GRANULARITIES = ("tensor", "row", "column", "block")


def drawn(shape):
    """Rows of very different sizes, with zeros, a block of zeros, an Inf and a NaN where there is place."""
    x = torch.randn(shape) * torch.exp(6 * torch.randn(shape[0], 1))
    x[torch.rand(shape) < 0.05] = 0.0
    if shape[0] > 2:
        x[0, :32] = 0.0
        x[1, 3], x[2, -1] = torch.inf, torch.nan
    return x


def cases(name):
    return ("block",) if FORMATS[name].block_size else GRANULARITIES


def assert_is(q, want_steps, want_scale):
    assert q.scale.dtype == torch.float32
    scale = expand_scale(q).expand(q.codes.shape)
    torch.testing.assert_close(scale, torch.from_numpy(want_scale), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(integer_values(q), torch.from_numpy(want_steps))


def test_the_names():
    assert set(FORMATS) == set(format_oracle.FORMATS)
    for name, (elements, scale, block) in format_oracle.FORMATS.items():
        bits = elements if isinstance(elements, int) else 1 + sum(format_oracle.KINDS[elements][:2])
        assert (FORMATS[name].bits, FORMATS[name].scale, FORMATS[name].block_size) == (bits, scale, block or 0)


@pytest.mark.parametrize("name", FORMATS)
def test_against_the_definition(name):
    for shape in SHAPES:
        for granularity in cases(name):
            x = drawn(shape)
            fmt = named_format(name, granularity, 16)
            block = fmt.group.block_size
            want = format_oracle.quantize(x.numpy(), name, granularity=granularity, block_size=block)
            assert_is(quantize_to(x, fmt), *want)
            key, numbers = fold_key(7, 3), oracle.fold_key(7, 3)
            want = format_oracle.quantize(x.numpy(), name, granularity=granularity, block_size=block, key=numbers)
            q = quantize_to(x, fmt, rounding="stochastic", key=key)
            same = integer_values(q) == torch.from_numpy(want[0])
            # As in test_minifloat: shares of fp32 and fp64 differ by 2^-24.
            assert same.float().mean() > 1 - 1e-3


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxint8"])
def test_the_rounding_up_rule(name):
    x = drawn((40, 64))
    x[5, :32] = 0.0
    x[5, 0] = 1.999  # more than 127/64, 7.5/4, ... : saturates by the other rule
    q = quantize_to(x, named_format(name, scale_rule="up"))
    assert_is(q, *format_oracle.quantize(x.numpy(), name, rule="up"))
    assert (q.scale[q.scale.isfinite()].log2() % 1 == 0).all()
    finite = x.isfinite() & expand_scale(q).isfinite()
    largest = format_oracle.table(format_oracle.FORMATS[name][0])[-1]
    assert ((x / expand_scale(q))[finite].abs() <= largest).all(), "something saturates"
    floor = quantize_to(x, named_format(name))
    assert ((x / expand_scale(floor))[finite].abs() > largest).any(), "the test could not see saturation"


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_tiles(name):
    for shape in ((40, 50), (16, 16), (3, 5)):
        x = drawn(shape)
        q = quantize_to(x, named_format(name, block_rows=16))
        assert_is(q, *format_oracle.quantize(x.numpy(), name, rows=16))
    # A tile and its transpose have the same codes: what one saves in the backward of a transposed weight.
    x = torch.randn(32, 48)
    fmt = named_format(name, block_rows=16)
    assert torch.equal(fake_quantize_to(x, fmt), fake_quantize_to(x.t().contiguous(), fmt).t())


@pytest.mark.parametrize("rows", [1, 16])
def test_four_over_six(rows):
    fmt = named_format("nvfp4", block_rows=rows, scale_rule="four_six")
    for shape in (*SHAPES, (40, 50)):
        x = drawn(shape)
        assert_is(quantize_to(x, fmt), *format_oracle.quantize(x.numpy(), "nvfp4", rows=rows, rule="four_six"))
        key, numbers = fold_key(7, 3), oracle.fold_key(7, 3)
        q = quantize_to(x, fmt, rounding="stochastic", key=key)
        want = format_oracle.quantize(x.numpy(), "nvfp4", rows=rows, rule="four_six", key=numbers)
        assert (integer_values(q) == torch.from_numpy(want[0])).float().mean() > 1 - 1e-3
    # Of 5, which e2m1 lacks, and 4 or 6, which it has: what the choice is for.
    one = torch.tensor([[10.0, 30.0, 30.0, 40.0] + 12 * [0.0], [20.0, 30.0, 60.0, 60.0] + 12 * [0.0]])
    x = torch.cat((one, torch.full((1, 16), 1536.0)))  # so that the tensor's scale is 1
    q = quantize_to(x, named_format("nvfp4", scale_rule="four_six"))
    assert q.scale.flatten().tolist() == [10.0, 10.0, 256.0]
    assert torch.equal(dequantize(q)[:2], one)


def test_four_over_six_loses_less():
    """By its definition in every block, and about a tenth on Gaussian numbers, where few blocks tie."""
    x = torch.randn(64, 256)
    errors = []
    for rule in ("floor", "four_six"):
        q = quantize_to(x, named_format("nvfp4", scale_rule=rule))
        errors.append((dequantize(q) - x).unflatten(-1, (-1, 16)).square().sum(-1))
        if rule == "four_six":
            fours = integer_values(q).unflatten(-1, (-1, 16)).abs().amax(-1) == 4
            assert 0.2 < fours.float().mean() < 0.8
    assert errors[1].mean() < errors[0].mean()


@pytest.mark.parametrize(("name", "rule"), [*((name, "floor") for name in FORMATS), ("nvfp4", "four_six")])
def test_edges(name, rule):
    fmt = named_format(name, "block", 32, scale_rule=rule)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        for x in (torch.zeros(2, 40), torch.full((2, 40), largest), torch.tensor([[largest, -largest, 1.0, 0.0]])):
            y = fake_quantize_to(x.to(dtype), fmt)
            assert y.isfinite().all(), (x, y)
            assert y.dtype == dtype
            assert torch.equal(y == 0, x.to(dtype) == 0) or x.shape == (1, 4)
    x = torch.randn(3, 96)
    x[1, 40] = torch.nan
    y, clean = fake_quantize_to(x, fmt), x.clone()
    block = fmt.group.block_size
    start = 40 // block * block
    assert y[1, start : start + block].isnan().all()
    assert y.isnan().sum() == block
    if FORMATS[name].scale != "e4m3":  # there what is left of the block may change the tensor's scale
        clean[1, start : start + block] = 0
        y[1, start : start + block] = 0
        assert torch.equal(y, fake_quantize_to(clean, fmt))
    for shape in ((0, 8), (4, 0), (), (7,)):
        assert fake_quantize_to(torch.ones(shape), fmt).shape == shape


@pytest.mark.parametrize("name", FORMATS)
def test_twice_is_once(name):
    """What is representable comes back as it was, where the scales can be found again."""
    x = torch.randn(8, 64).bfloat16().float()
    fmt = named_format(name, "row", 16)
    if FORMATS[name].scale == "e8m0":
        once = fake_quantize_to(x, fmt)
        assert torch.equal(fake_quantize_to(once, fmt), once)
    q = quantize_to(x, fmt)
    assert torch.equal(dequantize(q), integer_values(q) * expand_scale(q))


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_has_no_bias(name):
    """Over 500 keys the mean lies within 5 standard errors of x, where nothing saturates.

    Between two neighbours the standard deviation is at most half their distance.
    """
    x = torch.randn(2, 32)
    fmt = named_format(name, "row", scale_rule="up")
    q = quantize_to(x, fmt)
    table = torch.from_numpy(format_oracle.table(format_oracle.FORMATS[name][0]))
    steps = (x / expand_scale(q)).abs().double()
    above = torch.searchsorted(table, steps).clamp(1, len(table) - 1)
    gap = (table[above] - table[above - 1]) * expand_scale(q)
    draws = torch.stack(
        [fake_quantize_to(x, fmt, rounding="stochastic", key=fold_key(step)) for step in range(500)]
    ).double()
    error = (draws.mean(0) - x).abs()
    assert (error <= 5 * gap / 2 / len(draws) ** 0.5)[steps <= table[-1]].all()


COMPILED_IN_EVERY_RUN = ("mxint8", "nvfp4", "fp8_e4m3")
"""Scales of both kinds, and elements of both; layers of them: tests/linear/test_formats.py."""


@pytest.mark.parametrize(
    "name",
    [
        "nvfp4 four_six",
        *(name if name in COMPILED_IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS),
    ],
)
@pytest.mark.thorough
def test_compiled_gives_the_same_bits(name):
    torch._dynamo.reset()
    name, _, rule = name.partition(" ")
    fmt = named_format(name, "row", scale_rule=rule or "floor")

    @torch.compile(fullgraph=True)
    def compiled(x, key):
        return fake_quantize_to(x, fmt), fake_quantize_to(x, fmt, rounding="stochastic", key=key)

    x, key = drawn((6, 80)), fold_key(5)
    want = fake_quantize_to(x, fmt), fake_quantize_to(x, fmt, rounding="stochastic", key=key)
    torch.testing.assert_close(compiled(x, key), want, rtol=0, atol=0, equal_nan=True)


def test_nvfp4_as_compressed_tensors_has_it():
    """With a largest magnitude of 448 * 6, so that its reciprocal scale of the tensor is 1, as ours is."""
    package = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    # No block so small that its scale would be below 2^-10, where theirs becomes 0 and ours 2^-9.
    x = torch.randn(32, 64) * torch.exp(2 * torch.randn(32, 1)).clamp(min=0.05)
    x[3, 5] = 448 * 6
    x = x.clamp(-2688, 2688)
    arguments = package.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    blocks = x.unflatten(-1, (-1, 16))
    one = torch.ones(1)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=one)
    want = fake_quantize(x, scale.float(), zero, arguments, global_scale=one)
    assert torch.equal(fake_quantize_to(x, named_format("nvfp4")), want)


@pytest.mark.parametrize("rule", ["floor", "up"])
@pytest.mark.parametrize(("name", "elements"), [("mxfp8", torch.float8_e4m3fn), ("mxfp4", "fp4"), ("mxfp6", "fp6")])
def test_mx_as_torchao_has_it(name, elements, rule):
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3

    dtype = {"fp4": torch.float4_e2m1fn_x2, "fp6": DTYPE_FP6_E2M3}.get(elements, elements)
    mode = {"floor": ScaleCalculationMode.FLOOR, "up": ScaleCalculationMode.RCEIL}[rule]
    # Whole numbers: its rule takes absmax / largest in fp32, rounded, where ours compares exactly.
    x = torch.randint(-1000, 1000, (16, 64)).float()
    want = mx_tensor.MXTensor.to_mx(x, dtype, 32, mode).dequantize(torch.float32)
    assert torch.equal(fake_quantize_to(x, named_format(name, scale_rule=rule)), want)


def test_nvfp4_as_torchao_has_it():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(64, 128) * torch.exp(torch.randn(64, 1))
    scale = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
    want = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    got = fake_quantize_to(x, named_format("nvfp4"))
    # It multiplies with a rounded reciprocal where ours divides, which may move a value across a tie.
    assert (got == want).float().mean() > 0.999
