"""Operands of int8 products: C++ against the reference, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from kernels.int8_cases import DTYPES, ISAS, KEYS, SHAPES, assert_same, needs_compiler, results, scales, tensor

from ds_quant.kernels.int8 import cpu, ops
from ds_quant.numerics import products as reference
from ds_quant.numerics.integer import symmetric_levels

LEVELS, FULL = symmetric_levels(8), symmetric_levels(8, full_range=True)


def check(rng, x, bits, keys, context="", column_scale=None, row_scale=None):
    column_scale = scales(rng, x.shape[1]) if column_scale is None else column_scale
    row_scale = scales(rng, x.shape[0]) if row_scale is None else row_scale
    arguments = (x, bits, column_scale, row_scale, keys)
    expected = results(reference, *arguments)
    for isa in ISAS:
        assert_same(results(cpu, *arguments, isa=isa), expected, f"{isa} {context}")


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_dtypes_and_roundings(rng, shape, dtype):
    x = tensor(rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 3), dtype)
    for keys in (None, KEYS):
        check(rng, x, int(rng.integers(2, 9)), keys, f"{keys}")


@needs_compiler
def test_bits(rng):
    for bits, keys in itertools.product(range(2, 9), (None, KEYS)):
        check(rng, tensor(rng.normal(size=(6, 37)), torch.bfloat16), bits, keys, f"{bits} {keys}")


@needs_compiler
@pytest.mark.parametrize(
    "extreme", [0.0, -0.0, 2.0**-149, 1e-44, 2.0**-133, 2.0**-127, 1e-37, 3.4e38, np.inf, -np.inf, np.nan]
)
def test_extremes(rng, extreme):
    for keys, bits, is_mixed in itertools.product((None, KEYS), (8, 2), (False, True)):
        context = f"{bits} {keys} {is_mixed}"
        with np.errstate(all="ignore"):
            x = tensor(extreme * rng.choice([-1.0, 0.0, 0.3, 0.5, 1.0], size=(20, 40))).float()
        if is_mixed:  # some rows and columns of usual numbers, some others with both
            x[5:, 16:24] = tensor(rng.normal(size=(15, 8)))
            x[5:9, :30] = tensor(rng.normal(size=(4, 30)))
        x[7, 9] = x[15, 20] = extreme
        check(rng, x, bits, keys, context, torch.ones(1), torch.ones(1))
        # Factors that are not finite, or that make elements so.
        column_scale, row_scale = scales(rng, 40), scales(rng, 20)
        column_scale[3], row_scale[7] = abs(extreme), abs(extreme)
        column_scale[30], row_scale[11] = 3e38, 0.0
        check(rng, x, bits, keys, f"{context} factors", column_scale, row_scale)


@needs_compiler
def test_ties_go_to_even_and_near_ties_where_division_says(rng):
    """x a few units beside (k + 1/2) scales: where a product with the inverse of the scale would be wrong."""
    halves = np.arange(-126.5, 127)
    for absmax in (127.0, 1.0, 3.0, *rng.uniform(1, 2, size=20)):
        scale = np.float32(absmax) / np.float32(127)
        x = (halves * scale).astype(np.float32).view(np.int32)
        x = (x + rng.integers(-2, 3, size=(40, 1), dtype=np.int32)).view(np.float32)
        x[20:] = np.nextafter(x[20:], np.float32(0))
        x[:, 77] = absmax
        x = tensor(x)
        assert x.abs().amax() == np.float32(absmax)
        check(rng, x, 8, None, f"{absmax}", torch.ones(1), torch.ones(1))
        check(rng, x.t().contiguous(), 8, None, f"{absmax} by column", torch.ones(1), torch.ones(1))
    for isa in ISAS:
        steps = tensor([[127.0, *(np.arange(-127, 128) / 2)]])
        codes, _ = cpu.quantize_rows(steps, LEVELS, isa=isa)
        assert torch.equal(codes, steps.round().to(torch.int8))


@needs_compiler
def test_the_full_range_of_codes(rng):
    """The largest magnitude is a tie of 127 and 128 scales, which the rounded scale moves to either side."""
    for absmax in (127.5, 1.0, *rng.uniform(1, 2, size=20).astype(np.float32).tolist()):
        scale = np.float32(absmax) / np.float32(127.5)
        x = (np.arange(-127.5, 128) * scale).astype(np.float32).view(np.int32)
        x = (x + rng.integers(-2, 3, size=(40, 1), dtype=np.int32)).view(np.float32)
        x = tensor(x).clamp(-absmax, absmax)
        x[:, 13], x[:20, 77] = -absmax, absmax
        check(rng, x, 8, None, f"{absmax}", torch.ones(1), torch.ones(1))
        check(rng, x, 8, KEYS, f"{absmax} stochastic", torch.ones(1), torch.ones(1))
    seen = set()
    for isa in ISAS:
        steps = tensor([np.arange(-127.5, 128)])
        codes, own = cpu.quantize_rows(steps, FULL, isa=isa)
        assert own.item() == 1.0
        assert torch.equal(codes, steps.round().clamp(-128, 127).to(torch.int8))
        for absmax in rng.uniform(1, 2, size=50).astype(np.float32):
            codes, _ = cpu.quantize_rows(tensor([[-absmax, absmax] * 9]), FULL, isa=isa)
            assert (codes[0, 1::2] == 127).all()
            seen |= set(codes[0, ::2].tolist())
    assert seen == {-128, -127}


@needs_compiler
def test_stochastic_codes_in_the_full_range():
    """-127.5 becomes -128 or -127, and 127.5 always 127: no code passes the last one."""
    x = torch.full((64, 4096), 127.5)
    x[:, ::2] *= -1
    for isa, quantize in itertools.product(ISAS, (cpu.quantize_rows, cpu.quantize_tensor)):
        codes, _ = quantize(x, FULL, key=KEYS[0], isa=isa)
        assert (codes[:, 1::2] == 127).all()
        share = (codes[:, ::2] == -128).double().mean().item()
        assert set(codes[:, ::2].unique().tolist()) == {-128, -127}
        assert abs(share - 0.5) < 5 * (0.25 / codes[:, ::2].numel()) ** 0.5, "five standard deviations"


@needs_compiler
def test_stochastic_codes_stay_within_the_levels():
    """A quotient just above the levels is not rounded up to the next code."""
    largest = np.float32(1.0)
    while not largest / (largest / np.float32(127)) > 127:
        largest = np.nextafter(largest, np.float32(2))
    x = torch.full((64, 4096), float(largest))  # some 30 of the draws are below the fraction
    x[:, ::2] *= -1
    for isa, quantize in itertools.product(ISAS, (cpu.quantize_rows, cpu.quantize_columns)):
        codes, _ = quantize(x, LEVELS, key=KEYS[0], isa=isa)
        assert torch.equal(codes, (x.sign() * 127).to(torch.int8))


@needs_compiler
def test_strides(rng):
    whole = tensor(rng.normal(size=(90, 150)), torch.bfloat16)
    views = {
        "columns of a wider matrix": whole[:, 3:120],
        "every third row": whole[::3],
        "one row for all": whole[:1].expand(40, 150),
        "one number for all": whole[:1, :1].expand(40, 33),
        "transposed": whole.t(),
        "every second column": whole[:, ::2],
        "one column": whole[:, 5:6],
        "one row of a transposed matrix": whole.t()[5:6],
    }
    for name, view in views.items():
        check(rng, view, 8, KEYS, name)
    scale = scales(rng, 300)
    check(rng, whole, 8, None, "strided factors", scale[::2], scale[:270:3])
    check(rng, whole, 8, None, "one factor", scale[:1], scale[5])
    check(rng, whole, 8, None, "one factor of two dimensions", scale[:1].reshape(1, 1), scale[:1])
    products_ = tensor(rng.integers(-(10**6), 10**6, size=(90, 150)), torch.int32)
    for name, view in {"rows": products_[::2], "columns": products_[:, 7:90], "transposed": products_.t()}.items():
        row_scale, column_scale = scales(rng, 2 * view.shape[0])[::2], scales(rng, view.shape[1])
        options = {"row_scale": row_scale, "column_scale": column_scale, "dtype": torch.float32}
        expected = [reference.epilogue(view, **options).contiguous()]
        assert_same([cpu.epilogue(view, **options)], expected, name)


@needs_compiler
def test_threads_make_no_difference(rng):
    x = tensor(rng.normal(size=(300, 700)), torch.bfloat16)
    matrix = tensor(rng.integers(-(10**6), 10**6, size=(300, 700)), torch.int32)
    column_scale, row_scale = scales(rng, 700), scales(rng, 300)
    options = {"row_scale": row_scale, "column_scale": column_scale, "dtype": torch.bfloat16}
    # So long that no thread has done all before another wakes.
    long = tensor(rng.normal(size=(20_000, 200)))
    before = torch.get_num_threads()

    def run(module):
        return [
            *results(module, x, 8, column_scale, row_scale, KEYS),
            module.epilogue(matrix, **options),
            *module.quantize_columns(long, LEVELS),
            *module.quantize_tensor(long, LEVELS),
        ]

    expected = run(reference)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert_same(run(cpu), expected, f"{threads}")
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_modes_of_autograd(rng):
    x = tensor(rng.normal(size=(5, 40))).requires_grad_()
    scale = torch.rand(40, requires_grad=True)
    expected = reference.quantize_rows(x, LEVELS, column_scale=scale)
    matrix = tensor(rng.integers(-1000, 1000, size=(5, 40)), torch.int32)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            got = ops.quantize_rows(x, LEVELS, column_scale=scale)
            y = ops.epilogue(matrix, column_scale=scale, bias=scale, dtype=torch.bfloat16)
        assert_same(got, expected, f"{mode}")
        assert not any(t.requires_grad for t in (*got, y))
