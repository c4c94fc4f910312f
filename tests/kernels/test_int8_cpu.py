"""Operands and results of int8 products: C++ against the reference, bit for bit, and what is refused."""

import itertools
import logging

import numpy as np
import pytest
import torch

from ds_quant.kernels import build, native, registry
from ds_quant.kernels.int8 import compiled, cpu, ops
from ds_quant.numerics import products as reference
from ds_quant.numerics.random import fold_key

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Beside whole vectors and their rests: blocks of columns (16384) and a bit, chunks of rows and groups of four.
SHAPES = ((1, 1), (1, 50), (70, 1), (3, 15), (4, 16), (5, 17), (9, 64), (130, 100), (5, 16387), (60, 1111), (2, 33000))
KEYS = (fold_key(1), fold_key(2, step=3))

needs_compiler = pytest.mark.skipif(not ISAS, reason=f"no C++ kernels: {build.load().reason}")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def scales(rng, count):
    return tensor(10.0 ** rng.uniform(-4, 1, size=count))


def bits_of(x):
    """Integers that tell all numbers apart and no NaN from another."""
    if not x.dtype.is_floating_point:
        return x
    integer, nan = (torch.int32, 0x7FC00000) if x.dtype == torch.float32 else (torch.int16, 0x7FC0)
    bits = x.view(integer)
    return torch.where(x.isnan(), torch.full_like(bits, nan), bits)


def assert_same(got, expected, context):
    for number, (left, right) in enumerate(zip(got, expected, strict=True)):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride()), context
        differ = bits_of(left) != bits_of(right)
        assert not differ.any(), f"{context} result {number}: {differ.sum()} differ, first {differ.nonzero()[0]}"


def results(module, x, bits, column_scale, row_scale, keys, **options):
    """All that the quantizers give, with and without factors."""
    first, second = keys or (None, None)
    both = {"row_key": first, "column_key": second}
    return (
        *module.quantize_rows(x, bits, key=first, **options),
        *module.quantize_rows(x, bits, column_scale=column_scale, key=first, **options),
        *module.quantize_columns(x, bits, key=first, **options),
        *module.quantize_columns(x, bits, row_scale=row_scale, key=second, **options),
        *module.quantize_both(x, bits, column_scale=column_scale, row_scale=row_scale, **both, **options),
        *module.quantize_both(x, bits, **both, **options),
        *module.quantize_tensor(x, bits, key=first, **options),
        *module.quantize_rows(x, bits, key=first, full_range=True, **options),
        *module.quantize_rows(x, bits, column_scale=column_scale, key=first, full_range=True, **options),
        *module.quantize_tensor(x, bits, key=first, full_range=True, **options),
    )


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
        codes, _ = cpu.quantize_rows(steps, 8, isa=isa)
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
        codes, own = cpu.quantize_rows(steps, 8, full_range=True, isa=isa)
        assert own.item() == 1.0
        assert torch.equal(codes, steps.round().clamp(-128, 127).to(torch.int8))
        for absmax in rng.uniform(1, 2, size=50).astype(np.float32):
            codes, _ = cpu.quantize_rows(tensor([[-absmax, absmax] * 9]), 8, full_range=True, isa=isa)
            assert (codes[0, 1::2] == 127).all()
            seen |= set(codes[0, ::2].tolist())
    assert seen == {-128, -127}


@needs_compiler
def test_stochastic_codes_in_the_full_range():
    """-127.5 becomes -128 or -127, and 127.5 always 127: no code passes the last one."""
    x = torch.full((64, 4096), 127.5)
    x[:, ::2] *= -1
    for isa, quantize in itertools.product(ISAS, (cpu.quantize_rows, cpu.quantize_tensor)):
        codes, _ = quantize(x, 8, key=KEYS[0], full_range=True, isa=isa)
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
        codes, _ = quantize(x, 8, key=KEYS[0], isa=isa)
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
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue(rng, shape):
    exponents = rng.uniform(0, 31, size=shape)
    numbers = (rng.choice([-1, 1], size=shape) * 2.0**exponents).clip(-(2**31), 2**31 - 1)
    numbers[0, 0], numbers[-1, -1] = -(2**31), 0
    matrix = torch.from_numpy(numbers.astype(np.int32))
    # Down to denormal and up to infinite results of each dtype, signs of zero, NaN.
    row_scale, column_scale = scales(rng, shape[0]), scales(rng, shape[1])
    special = tensor([-0.0, 0.0, np.nan, np.inf, 1e-44, 2.0**-40, 2.0**-130, 2.0**90])
    column_scale[: len(special)] = special[: len(column_scale)]
    row_scale[1:4] = tensor([-0.0, np.nan, 2.0**-12])[: len(row_scale[1:4])]
    row_scale[4:6] = -row_scale[4:6]
    bias = tensor(rng.normal(size=shape[1]))
    bias[3:6] = tensor([-0.0, np.inf, -np.inf])[: len(bias[3:6])]
    for rows, columns, added, dtype in itertools.product(
        (None, row_scale, row_scale[:1]), (None, column_scale, column_scale[-1]), (None, *DTYPES), DTYPES
    ):
        options = {"row_scale": rows, "column_scale": columns, "dtype": dtype}
        options["bias"] = None if added is None else bias.to(added)
        expected = reference.epilogue(matrix, **options)
        for isa in ISAS:
            assert_same([cpu.epilogue(matrix, **options, isa=isa)], [expected], f"{isa} {options}")


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue_of_whole_numbers_in_fp32(rng, shape):
    integers = tensor(rng.integers(-(2**24), 2**24, size=shape), torch.int32)
    others = tensor(rng.integers(-(2**30), 2**30, size=shape), torch.int32)
    integers[0, 0], others[-1, -1] = 0, -integers[-1, -1]
    whole = integers.float()
    whole[0, 0] = -0.0
    options = {"row_scale": -scales(rng, shape[0]), "column_scale": scales(rng, shape[1])}
    for dtype in DTYPES:
        for added, total in ((None, integers), (others, integers + others)):
            expected = [reference.epilogue(total, **options, dtype=dtype)]
            assert_same([reference.epilogue(whole, others=added, **options, dtype=dtype)], expected, "reference")
            for isa in ISAS:
                got = cpu.epilogue(whole, others=added, **options, dtype=dtype, isa=isa)
                assert_same([got], expected, f"{isa} {dtype} {added is None}")


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
            *module.quantize_columns(long, 8),
            *module.quantize_tensor(long, 8),
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
    expected = reference.quantize_rows(x, 8, column_scale=scale)
    matrix = tensor(rng.integers(-1000, 1000, size=(5, 40)), torch.int32)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            got = ops.quantize_rows(x, 8, column_scale=scale)
            y = ops.epilogue(matrix, column_scale=scale, bias=scale, dtype=torch.bfloat16)
        assert_same(got, expected, f"{mode}")
        assert not any(t.requires_grad for t in (*got, y))


# ---- dispatch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_without_elements(rng, shape):
    arguments = (torch.empty(shape), 8, scales(rng, shape[1]), scales(rng, shape[0]), KEYS)
    assert_same(results(ops, *arguments), results(reference, *arguments), "")
    y = ops.epilogue(torch.empty(shape, dtype=torch.int32), bias=torch.empty(shape[1]), dtype=torch.float16)
    assert (y.shape, y.dtype) == (shape, torch.float16)


def test_dispatch(rng, monkeypatch):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    arguments = (tensor(rng.normal(size=(9, 40))), 8, scales(rng, 40), scales(rng, 9), KEYS)
    expected = results(reference, *arguments)
    assert_same(results(ops, *arguments), expected, "")
    for name in ("quantize_rows", "quantize_columns", "quantize_both", "quantize_tensor", "dequantize", "epilogue"):
        serving = getattr(ops, name).on
        assert serving(torch.device("cpu")) is getattr(cpu if ISAS else reference, name)
        assert serving(torch.device("cuda")) is getattr(compiled, name)
        assert serving(torch.device("meta")) is getattr(reference, name)
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert ops.epilogue.on(torch.device("cpu")) is reference.epilogue
    assert_same(results(ops, *arguments), expected, "")


def forget():
    registry._serving.cache_clear()
    registry._is_ready.cache_clear()


def test_without_a_compiler_the_reference_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    monkeypatch.setattr(build, "load", lambda: build.Loaded(None, "no compiler here"))
    forget()
    x = torch.randn(3, 20)
    with caplog.at_level(logging.WARNING, logger="ds_quant"):
        got = [ops.quantize_rows(x, 8), ops.quantize_rows(x, 8)]
    forget()
    for pair in got:
        assert_same(pair, reference.quantize_rows(x, 8), "")
    (said,) = (record.getMessage() for record in caplog.records)
    assert "no compiler here" in said


X = torch.zeros(3, 4)
INTEGERS = torch.zeros(3, 4, dtype=torch.int32)
REFUSED = [
    (ops.quantize_rows, (torch.zeros(4), 8), {}, r"quantize_rows\(x\): got torch.float32 of shape \(4,\)"),
    (ops.quantize_columns, (X.double(), 8), {}, r"quantize_columns\(x\): got torch.float64"),
    (ops.quantize_both, ([1.0], 8), {}, r"quantize_both\(g\): got a list"),
    (ops.quantize_tensor, (X, 9), {}, r"quantize_tensor\(bits\): got 9; allowed: integers 2 to 8"),
    (ops.quantize_rows, (X, 1), {}, r"quantize_rows\(bits\): got 1"),
    (ops.quantize_rows, (X, True), {}, r"quantize_rows\(bits\): got True"),
    (ops.quantize_columns, (X, 8.0), {}, r"quantize_columns\(bits\): got 8.0"),
    (ops.quantize_rows, (X, 8), {"column_scale": torch.ones(3)}, r"quantize_rows\(column_scale\): .*\(3,\)"),
    (ops.quantize_rows, (X, 8), {"column_scale": torch.ones(4, 1)}, r"quantize_rows\(column_scale\)"),
    (ops.quantize_rows, (X, 8), {"column_scale": torch.ones(4).double()}, r"column_scale\): got torch.float64"),
    (ops.quantize_rows, (X, 8), {"column_scale": torch.ones(4, device="meta")}, r"column_scale\): .* on meta"),
    (ops.quantize_rows, (X, 8), {"column_scale": 2.0}, r"column_scale\): got a float"),
    (ops.quantize_columns, (X, 8), {"row_scale": torch.ones(4)}, r"quantize_columns\(row_scale\): .*\(4,\)"),
    (ops.quantize_both, (X, 8), {"column_scale": torch.ones(3)}, r"quantize_both\(column_scale\)"),
    (ops.quantize_both, (X, 8), {"row_scale": torch.ones(4)}, r"quantize_both\(row_scale\)"),
    (ops.quantize_both, (X, 8), {"row_key": KEYS}, r"quantize_both\(row_key\): got a tuple"),
    (ops.quantize_both, (X, 8), {"row_key": KEYS[0], "column_key": 1}, r"quantize_both\(column_key\): got a int"),
    (ops.quantize_rows, (X, 8), {"key": (1, 2)}, r"quantize_rows\(key\): got a tuple"),
    (ops.quantize_columns, (X, 8), {"key": torch.zeros(3)}, r"quantize_columns\(key\): got torch.float32"),
    (ops.quantize_tensor, (X, 8), {"key": torch.zeros(2)}, r"quantize_tensor\(key\): got torch.float32"),
    (ops.epilogue, (X.double(),), {"dtype": torch.float32}, r"epilogue\(products\): got torch.float64"),
    (ops.epilogue, (X,), {"dtype": torch.float32, "others": X}, r"epilogue\(others\): got torch.float32"),
    (ops.epilogue, (X,), {"dtype": torch.float32, "others": INTEGERS[:2]}, r"epilogue\(others\): .*\(2, 4\)"),
    (ops.epilogue, (INTEGERS[0],), {"dtype": torch.float32}, r"epilogue\(products\): .* of shape \(4,\)"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.int8}, r"epilogue\(dtype\): got torch.int8"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "bias": X}, r"epilogue\(bias\): .*\(3, 4\)"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "bias": X[0].int()}, r"epilogue\(bias\): got torch.int"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "row_scale": X[0]}, r"epilogue\(row_scale\)"),
    (ops.epilogue, (INTEGERS,), {"dtype": torch.float32, "column_scale": X[:, 0]}, r"epilogue\(column_scale\)"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "message"), REFUSED)
def test_refusals(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


@needs_compiler
def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"quantize\(isa\): got 'neon'"):
        cpu.quantize_rows(X, 8, isa="neon")


@needs_compiler
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(rng, shape, dtype):
    codes = tensor(rng.integers(-128, 128, size=shape), torch.int8)
    # Usual scales, and those whose values pass the largest number of the dtype by less and by more than a scale.
    largest = torch.finfo(dtype).max
    special = [0.0, np.nan, 1e-42, largest / 127.5, largest / 127 * 1.003, largest / 126.5, largest / 100, 3e38]
    for name, count in (("row_scale", shape[0]), ("column_scale", shape[1]), ("row_scale", 1), ("column_scale", 1)):
        scale = scales(rng, count)
        drawn = rng.choice(special, size=count).astype(np.float32)
        scale = torch.where(torch.from_numpy(rng.uniform(size=count) < 0.3), torch.from_numpy(drawn), scale)
        expected = reference.dequantize(codes, **{name: scale}, dtype=dtype)
        given = {"row_scale": None, "column_scale": None, name: scale}
        assert torch.equal(bits_of(ops.dequantize(codes, **given, dtype=dtype)), bits_of(expected))
        for isa in ISAS:
            got = cpu.dequantize(codes, **{name: scale}, dtype=dtype, isa=isa)
            assert_same([got], [expected], f"{isa} {name} of {count}")
            strided = codes.repeat(1, 2)[:, : shape[1]]
            assert_same([cpu.dequantize(strided, **{name: scale}, dtype=dtype, isa=isa)], [expected], isa)


def test_what_dequantize_refuses():
    codes, scale = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3)
    good = {"codes": codes, "row_scale": scale, "column_scale": None, "dtype": torch.float32}
    for arguments, match in (
        ({"codes": codes.int()}, r"dequantize\(codes\): got torch.int32"),
        ({"codes": codes[0]}, r"dequantize\(codes\): .*of two dimensions"),
        ({"row_scale": None}, r"dequantize\(row_scale, column_scale\): got none; allowed: one of the two"),
        ({"column_scale": torch.ones(4)}, r"got both; allowed: one of the two"),
        ({"row_scale": torch.ones(4)}, r"dequantize\(row_scale\): .*shape \(3,\)"),
        ({"dtype": torch.float64}, r"dequantize\(dtype\): got torch.float64"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.dequantize(**{**good, **arguments})


def test_epilogue_writes_where_it_is_told(rng):
    integers = tensor(rng.integers(-(2**20), 2**20, size=(5, 7)), torch.int32)
    scale, out = scales(rng, 5), torch.empty(9, 7, dtype=torch.bfloat16)
    expected = ops.epilogue(integers, row_scale=scale, dtype=torch.bfloat16)
    for module in (ops, reference):
        out.fill_(-1)
        got = module.epilogue(integers, row_scale=scale, dtype=torch.bfloat16, out=out[2:7])
        assert got.data_ptr() == out[2:7].data_ptr()
        assert torch.equal(out[2:7], expected)
        assert (out[[0, 1, 7, 8]] == -1).all()
    for wrong in (out[:5].float(), out[:4], out[:5].t().contiguous().t()):
        with pytest.raises(ValueError, match=r"epilogue\(out\): got .*bfloat16 of shape \(5, 7\)"):
            ops.epilogue(integers, row_scale=scale, dtype=torch.bfloat16, out=wrong)
