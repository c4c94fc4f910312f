"""The Triton kernel in Triton's interpreter, which numpy computes: rounded to nearest, nothing fused, bit for bit.

`test_adamw_triton.py` runs this file in a process of its own: TRITON_INTERPRET must be set before triton is imported.
The interpreter's one departure: it truncates where a GPU rounds to bf16.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ds_quant.kernels.adamw import triton_kernel as kernels
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.numerics import (
    code_map,
    code_values,
    dequantize_blockwise,
    derive_key,
    fold_key,
    quantize_blockwise,
    uniform16,
)
from ds_quant.numerics.adam import adamw_scalars, adamw_step
from ds_quant.numerics.blockwise import QuantizedBlocks
from ds_quant.numerics.codes import encode

FORMATS = {
    "8/8": (("power", 8, 256), ("power", 8, 256)),
    "float 8/8": (("float", 8, 256), ("float", 8, 256)),
    "m4 vfloat": (("power", 4, 128), ("float", 8, 256)),
    "4/4": (("power", 4, 128), ("power", 4, 128)),
    "m4v8": (("power", 4, 128), ("power", 8, 256)),
    "m8v4": (("power", 8, 512), ("power", 4, 64)),
    "m8v32": (("power", 8, 64), None),
    "m32v4": (None, ("power", 4, 32)),
    "32/32": (None, None),
    "linear 8/8": (("linear", 8, 32), ("linear", 8, 128)),
    "linear 4/4": (("linear", 4, 64), ("linear", 4, 64)),
    "m4vlog": (("power", 4, 128), ("log", 4, 128)),
    "m8vlog": (("float", 8, 256), ("log", 4, 64)),
    "m32vlog": (None, ("log", 4, 32)),
    "large blocks": (("power", 8, 4096), ("power", 8, 2048)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STREAM = 2**40 + 3


def spread(rng, length):
    return (rng.normal(size=length) * np.exp(3 * rng.normal(size=length))).astype(np.float32)


def make_moment(values, layout, signed):
    if layout is None:
        return values.clone()
    name, bits, block_size = layout
    return quantize_blockwise(values, code_map(name, bits, signed=signed), block_size=block_size)


def make_work(rng, length, layouts, *, dtype=torch.float32, grad_dtype=torch.float32, keys=(None, None), step=3):
    first, second = (torch.from_numpy(spread(rng, length)) for _ in range(2))
    return AdamWWork(
        torch.from_numpy(spread(rng, length)).to(dtype),
        torch.from_numpy(spread(rng, length)).clamp(-6e4, 6e4).to(grad_dtype),
        make_moment(first, layouts[0], True),
        make_moment(second.square(), layouts[1], False),
        adamw_scalars(10.0 ** rng.uniform(-5, -1), (0.9, 0.999), 1e-8, 0.1, step),
        *keys,
        STREAM,
    )


@pytest.fixture(autouse=True)
def exact_roots(monkeypatch):
    """torch takes roots on CPUs from MKL, which are an ulp off here and there; the definition rounds to nearest."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


def as_stored(updated, dtype):
    """fp32 parameters as the interpreter stores them."""
    if dtype == torch.bfloat16:
        return (updated.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return updated.to(dtype)


def subkey(key, number):
    return None if key is None else derive_key(torch.tensor(key), 2 * STREAM + number)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_step(work):
    """Do the step with the kernel and demand the reference's bits."""
    param, first, second = adamw_step(
        work.param.float(), work.grad, work.exp_avg, work.exp_avg_sq, work.scalars,
        subkey(work.exp_avg_key, 0), subkey(work.exp_avg_sq_key, 1),
    )  # fmt: skip
    grad = work.grad.clone()
    kernels.adamw_(work)
    assert_same(work.param, as_stored(param, work.param.dtype))
    assert_same(work.grad, grad)
    for got, expected in ((work.exp_avg, first), (work.exp_avg_sq, second)):
        if isinstance(got, QuantizedBlocks):
            assert_same(got.scale, expected.scale)
            assert_same(got.codes, expected.codes)
        else:
            assert_same(got, expected)


def random_key(rng):
    """The upper bits are set too, or not, at random."""
    return tuple(fold_key(int(rng.integers(2**62)), step=5).tolist())


def lengths(rng, layouts):
    blocks = [layout[2] for layout in layouts if layout] or [256]
    smallest, largest = min(blocks), max(blocks)
    odd = 2 * int(rng.integers(1, largest // 2)) + 1
    return (1, smallest - 1, largest, largest + smallest + 1, max(kernels.TILE, largest) + odd)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_format(name, stochastic, rng):
    layouts = FORMATS[name]
    keys = [random_key(rng) if stochastic and layout else None for layout in layouts]
    for length in lengths(rng, layouts):
        assert_step(make_work(rng, length, layouts, keys=keys))


@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
def test_dtypes(param, grad, rng):
    key = random_key(rng)
    assert_step(make_work(rng, 999, FORMATS["m4v8"], dtype=param, grad_dtype=grad, keys=(None, key)))


@pytest.mark.parametrize("name", ["8/8", "4/4", "m4 vfloat", "float 8/8", "linear 4/4"])
def test_steps_from_zeros(name, rng):
    """From a fresh state: zero bytes and scales of zero, which some blocks keep for want of gradients."""
    layouts = FORMATS[name]
    work = make_work(rng, 1333, layouts)
    for moment in (work.exp_avg, work.exp_avg_sq):
        moment.codes.zero_()
        moment.scale.zero_()
    scale = torch.where(torch.arange(1333) // 256 % 3 == 0, 0.0, 1e-3)
    for step in range(1, 6):
        grad = torch.from_numpy(spread(rng, 1333)) * scale
        scalars = adamw_scalars(1e-3, (0.9, 0.95), 1e-8, 0.01, step)
        work = work._replace(grad=grad, scalars=scalars, exp_avg_sq_key=random_key(rng))
        assert_step(work)
    assert (work.exp_avg.scale[:1] == 0).all()


@pytest.mark.parametrize("name", ["8/8", "4/4", "float 8/8", "m4 vfloat", "m8v4", "linear 8/8"])
@pytest.mark.parametrize("kind", ["non-finite", "denormal", "huge", "wide"])
def test_edges(name, kind, rng):
    work = make_work(rng, 1111, FORMATS[name], keys=(None, random_key(rng)))
    grad = work.grad
    if kind == "non-finite":
        where = rng.choice(1111, size=3, replace=False)
        grad[torch.from_numpy(where)] = torch.tensor([np.nan, np.inf, -np.inf])
    elif kind == "denormal":
        for moment in (work.exp_avg, work.exp_avg_sq):
            moment.scale.copy_(torch.rand(moment.scale.shape) * 1e-40)
        grad *= 1e-20
    elif kind == "huge":
        grad.copy_(torch.from_numpy(rng.choice([-1, 1], 1111) * 10.0 ** rng.uniform(0, 38, 1111)))
    else:
        grad.copy_(torch.from_numpy(rng.choice([-1, 1], 1111) * 2.0 ** rng.uniform(-140, 20, 1111)))
    assert_step(work)


def test_nan_stays_in_its_block(rng):
    """Blocks of NaN scale stay, the others are touched by no NaN."""
    work = make_work(rng, 1000, FORMATS["m4v8"])
    work.exp_avg.scale[2] = np.nan
    assert_step(work)
    assert work.exp_avg.scale.isnan().nonzero().flatten().tolist() == [2]
    assert work.param.isnan().nonzero().flatten().tolist() == list(range(256, 384))
    assert not work.exp_avg_sq.scale.isnan().any()


def test_unaligned_views(rng):
    work = make_work(rng, 700, FORMATS["m4v8"])
    big = torch.zeros(701)
    big[1:] = work.param
    assert_step(work._replace(param=big[1:]))
    assert big[0] == 0


def test_neighbours_are_left_alone(rng):
    """What lies behind the ends of all tensors stays as it is."""
    guarded = []

    def guard(tensor):
        big = torch.cat((tensor.reshape(-1), torch.full((64,), 77).to(tensor.dtype)))
        guarded.append((big, tensor.numel()))
        return big[: tensor.numel()]

    for length in (33, 129, 1157):
        for name in ("m4v8", "4/4", "m8v32"):
            work = make_work(rng, length, FORMATS[name])
            moments = [
                m._replace(codes=guard(m.codes), scale=guard(m.scale)) if isinstance(m, QuantizedBlocks) else guard(m)
                for m in (work.exp_avg, work.exp_avg_sq)
            ]
            assert_step(work._replace(param=guard(work.param), exp_avg=moments[0], exp_avg_sq=moments[1]))
    assert all((big[length:] == 77).all() for big, length in guarded)


@triton.jit
def draw(output, low_word, high_word, key_0, key_1):
    offset = tl.arange(0, 128)
    key = (key_0.to(tl.uint32, bitcast=True), key_1.to(tl.uint32, bitcast=True), low_word.to(tl.uint32, bitcast=True))
    draws = kernels._draws(offset, (key[0], key[1], key[2], high_word.to(tl.uint32, bitcast=True)))
    tl.store(output + offset, draws.to(tl.float32) * (1.0 / 65536))


def test_draws(rng):
    """Subkeys and 64-bit indices as the definition has them."""
    for start in (0, 128, 2**32 - 128, 2**32, 2**33 - 128, 2**33, 5 * 2**33 + 2**32):
        key, output = random_key(rng), torch.empty(128)
        signed = [word - (word >> 31 << 32) for word in (start >> 1 & 0xFFFFFFFF, start >> 33)]
        draw[(1,)](output, *signed, *kernels._words(key, STREAM))
        assert_same(output, uniform16(derive_key(torch.tensor(key), STREAM), 128, offset=start))


@triton.jit
def encode_row(x, output, FORMAT: tl.constexpr):
    at = tl.arange(0, 4096)[None, :]
    ones = tl.full([1], 1.0, tl.float32)
    zero = tl.full([1], 0, tl.uint32)
    tl.store(output + at, kernels._encode(tl.load(x + at), ones, at, (zero, zero, zero, zero), FORMAT))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("name", "bits"), [("power", 8), ("power", 4), ("linear", 8), ("linear", 4), ("float", 8)])
def test_ties_and_neighbours(name, bits, signed):
    """All values of a map, the middles between them, and the numbers next to both."""
    kind = code_map(name, bits, signed=signed)
    points = code_values(kind).sort().values
    points = torch.cat((points, (points[1:] + points[:-1]) / 2))
    x = torch.cat([points, *(points.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))]).clamp(-1, 1)
    x, output = torch.cat((x, torch.zeros(4096 - x.numel()))), torch.empty(4096, dtype=torch.int32)
    like = QuantizedBlocks(output, output, 4096, 4096, kind)
    encode_row[(1,)](x, output, kernels._format(like, 4096, None))
    assert_same(output, encode(x, kind).int())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("error", [2.0**-12, -(2.0**-12)])
def test_rough_roots(bits, signed, error, rng, monkeypatch):
    """Guesses that are often off by one are corrected. A GPU's roots are much better than that."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(
        builder,
        "create_sqrt",
        lambda x: builder.unary_op(x, lambda a: np.sqrt(a) * np.float32(1 + error)),
        raising=True,
    )
    kind = code_map("power", bits, signed=signed)
    x = torch.from_numpy(rng.uniform(-1 if signed else 0, 1, 4096).astype(np.float32)) ** 3
    output, draws = torch.empty(4096, dtype=torch.int32), uniform16(torch.zeros(2, dtype=torch.int64), 4096)
    encode_row[(1,)](x, output, kernels._format(QuantizedBlocks(output, output, 4096, 4096, kind), 4096, (0, 0)))
    assert_same(output, encode(x, kind, draws).int())


def sparse(folder, count, dtype):
    """A tensor of zeros that takes memory where it is written only."""
    name = folder / f"{len(list(folder.iterdir()))}"
    return torch.from_file(str(name), shared=True, size=count, dtype=dtype)


def test_more_than_2_to_the_33_elements(rng, monkeypatch, tmp_path):
    """The last whole blocks and the tail of a partition whose draws take a high word."""
    from triton.runtime import interpreter

    # It would copy every tensor onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    start, part = 2**33 + 8192, make_work(rng, 1024 + 77, FORMATS["m4v8"], keys=(random_key(rng), random_key(rng)))
    numel = start + part.param.numel()
    work = part._replace(
        param=sparse(tmp_path, numel, torch.float16),
        exp_avg=part.exp_avg._replace(
            codes=sparse(tmp_path, (numel + 1) // 2, torch.uint8),
            scale=sparse(tmp_path, -(-numel // 128), torch.float32),
            numel=numel,
        ),
        exp_avg_sq=part.exp_avg_sq._replace(
            codes=sparse(tmp_path, numel, torch.uint8),
            scale=sparse(tmp_path, -(-numel // 256), torch.float32),
            numel=numel,
        ),
    )
    ends = [
        (work.param[start:], part.param.half()),
        (work.exp_avg.codes[start // 2 :], part.exp_avg.codes),
        (work.exp_avg.scale[start // 128 :], part.exp_avg.scale),
        (work.exp_avg_sq.codes[start:], part.exp_avg_sq.codes),
        (work.exp_avg_sq.scale[start // 256 :], part.exp_avg_sq.scale),
    ]
    for end, values in ends:
        end.copy_(values)
    # The parameter is its own gradient, which saves the room of another.
    part = part._replace(param=part.param.half(), grad=part.param.half())
    work = work._replace(grad=work.param)
    expected = adamw_step(part.param.float(), *part[1:5])
    moments = []
    for number, (before, after) in enumerate(((part.exp_avg, expected[1]), (part.exp_avg_sq, expected[2]))):
        grad, decay = part.grad.float(), (part.scalars.beta1, part.scalars.beta2)[number]
        value = dequantize_blockwise(before) * decay + (grad.square() if number else grad) * (1 - decay)
        key = subkey(part[5 + number], number)
        moments.append(
            quantize_blockwise(
                value, after.code_map, block_size=after.block_size, rounding="stochastic", key=key, offset=start
            )
        )
    whole, tail = kernels.launches(work)
    arguments = list(whole.arguments)
    first_unit = len(arguments) - 7
    assert arguments[first_unit] == 0
    arguments[first_unit] = start // 128
    kernels.kernel[(1,)](*arguments, **whole.options)
    kernels.kernel[tail.grid](*tail.arguments, **tail.options)
    assert_same(ends[0][0], expected[0].half())
    for number, moment in enumerate(moments):
        assert_same(ends[1 + 2 * number][0], moment.codes)
        assert_same(ends[2 + 2 * number][0], moment.scale)


def test_no_elements(rng):
    work = make_work(rng, 0, FORMATS["8/8"])
    assert kernels.launches(work) == []
    kernels.adamw_(work)
