import ctypes
import itertools

import pytest
import torch
from kernels.works import FORMATS, KEY, SECOND_FORMATS, assert_same, copy_work, make_work, rough_values, tensors

from ds_quant.kernels import build, native
from ds_quant.kernels.adamw import cpu, reference
from ds_quant.kernels.adamw.ops import adamw_
from ds_quant.numerics.blockwise import QuantizedBlocks, dequantize_blockwise, quantize_blockwise
from ds_quant.numerics.codes import CodeMap, code_map, code_values
from ds_quant.numerics.random import derive_key, uniform16

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if build.load().library else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POWER8, POWER4, LOG4 = ("power", 8), ("power", 4), ("log", 4)

pytestmark = pytest.mark.skipif(not ISAS, reason=f"no C++ kernels: {build.load().reason}")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(works, context="", isas=ISAS):
    """Every instruction set does what the reference does."""
    expected = [copy_work(work) for work in works]
    reference.adamw_(expected)
    for isa in isas:
        got = [copy_work(work) for work in works]
        cpu.adamw_(got, isa=isa)
        for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert_same(mine, right, f"{isa} {context} works[{number}]")
    return expected


@pytest.mark.parametrize("first", FORMATS, ids=str)
def test_formats_and_roundings(rng, first):
    works = [
        make_work(rng, 700, first, second, stochastic=stochastic, stream=stream)
        for stream, (second, stochastic) in enumerate(
            itertools.product(SECOND_FORMATS, itertools.product((False, True), repeat=2))
        )
    ]
    check(works)


@pytest.mark.parametrize(("param", "grad"), list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_dtypes(rng, param, grad):
    works = [make_work(rng, numel, POWER8, POWER4, dtypes=(param, grad)) for numel in (1, 37, 1000)]
    for work in works:
        edges = [0.0, -0.0, 1e-7, -6e-8, 6.1e-5, 65504.0, -65520.0, 1e-40, 3e38, torch.inf, torch.nan]
        work.param[: len(edges)] = torch.tensor(edges).to(param)[: work.param.numel()]
        work.grad[-1] = 1.0
    check(works)


def test_every_fp16_and_bf16_is_read_and_rounded_right(rng):
    """A step that only multiplies the parameter, by numbers that reach ties and the ends of the range."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype, decay in itertools.product(DTYPES[1:], (1.0, 1 + 2**-11, 1 - 2**-12, 1 + 2**-8, 0.5, 3.0, 1e-3)):
        work = make_work(rng, 2**16, dtypes=(dtype, dtype))
        work = work._replace(param=bits.view(dtype), scalars=work.scalars._replace(decay=decay, step_size=0.0))
        work.exp_avg.zero_()
        work.exp_avg_sq.fill_(1.0)
        check([work._replace(grad=torch.zeros(2**16, dtype=dtype))], f"{dtype} {decay}")
        check([work._replace(grad=bits.view(dtype))], f"{dtype} {decay}")


@pytest.mark.parametrize(
    "block_sizes",
    [(1, 1), (2, 2), (8, 64), (64, 8), (128, 256), (4096, 4096), (4096, 1), (8192, 8192), (8192, 64), (2**20, 2**20)],
    ids=str,
)
def test_block_sizes(rng, block_sizes):
    works = [
        make_work(rng, numel, first, second, block_sizes=block_sizes, stream=numel)
        for numel in (0, 1, 2, 63, 4097, 8192, 20011)
        for first, second in (
            (POWER8, POWER8),
            (POWER4, POWER4),
            (POWER4, POWER8),
            (None, POWER4),
            (POWER8, None),
            (POWER4, LOG4),
        )
    ]
    check(works)


@pytest.mark.parametrize("numel", [1, 2, 3, 35, 255, 4095, 9999, 40003])
def test_granularities_tensor_and_channel(rng, numel):
    divisors = {size for size in (1, 3, 5, 7, 15, 17, 99, 273, numel) if numel % size == 0}
    works = [
        make_work(rng, numel, first, second, block_sizes=(size, size), stochastic=(True, True), stream=size)
        for size in sorted(divisors)
        for first, second in ((POWER8, POWER8), (POWER4, POWER4), (("dynamic", 4), None), (None, ("dynamic", 8)))
    ]
    # Blocks of one moment that do not fit into those of the other.
    works += [
        make_work(rng, numel, POWER4, POWER4, block_sizes=(numel, 256)),
        make_work(rng, numel, POWER4, POWER8, block_sizes=(64, numel)),
    ]
    check(works)


@pytest.mark.parametrize(
    "maps",
    [
        (CodeMap("power", 8, True, 127, 0, 1), CodeMap("power", 8, False, 255, 0, 2)),
        (CodeMap("power", 8, True, 127, 0, 2), CodeMap("power", 8, False, 255, 0, 4)),
        (CodeMap("power", 8, True, 127, 0, 8), CodeMap("power", 8, False, 260, 5, 4)),
        (CodeMap("power", 8, True, 20, 0, 4), CodeMap("power", 8, False, 512, 300, 8)),
        (CodeMap("power", 4, True, 7, 0, 8), CodeMap("power", 4, False, 16, 1, 4)),
        (CodeMap("power", 4, True, 9, 2, 2), CodeMap("power", 4, False, 12, 1, 1)),
    ],
    ids=str,
)
def test_other_levels_offsets_and_exponents(rng, maps):
    for stochastic in itertools.product((False, True), repeat=2):
        check([make_work(rng, 2000, *maps, stochastic=stochastic)], f"{stochastic}")


def test_values_of_codes_and_ties_between_them(rng):
    """Steps that leave a moment where it is: what the codes stand for, the middles between them, and neighbours."""
    for name, bits in FORMATS[1:]:
        for signed, scale in itertools.product((True, False), (1.0, 0.37, 1e-20)):
            values = code_values(code_map(name, bits, signed=signed))
            values = torch.cat((values, (values[1:] + values[:-1]) / 2))
            values = (
                torch.cat([values, *(values.nextafter(torch.tensor(to)) for to in (-2.0, 2.0))]).clamp(-1, 1) * scale
            )
            numel = values.numel()
            for stochastic in (False, True):
                work = make_work(rng, numel, block_sizes=(numel, numel), stochastic=(stochastic, stochastic))
                fresh = make_work(rng, numel, (name, bits), (name, bits), block_sizes=(numel, numel))
                # Zero codes with scale 0 and a gradient of `values` times 1 / (1 - beta) = 2, whose product is exact.
                scalars = work.scalars._replace(beta1=0.5)
                for moment in (fresh.exp_avg, fresh.exp_avg_sq):
                    moment.codes.zero_()
                    moment.scale.zero_()
                fields = {"exp_avg": fresh.exp_avg, "grad": values * 2} if signed else {"exp_avg_sq": fresh.exp_avg_sq}
                if not signed:
                    # exp_avg_sq itself cannot be chosen through its gradient: squares of whatever lies close.
                    fields["grad"] = (values / (1 - scalars.beta2)).sqrt()
                check([work._replace(scalars=scalars, **fields)], f"{name} {bits} {signed} {scale}")


@pytest.mark.parametrize("size", [64, 100, 8192])
def test_zeros_infinities_and_extremes(rng, size):
    numel = 100 * 64 * 13 if size != 8192 else 8192 * 13
    magnitudes = [0.0, 1e-45, 1e-42, 1e-38, 1e-30, 1e-20, 1e-5, 1.0, 1e10, 1e18, 1e19, 1e38, 3e38]
    for first, second in itertools.product(
        (POWER8, POWER4, ("dynamic", 8), ("dynamic", 4), None), (POWER8, POWER4, None)
    ):
        work = make_work(rng, numel, first, second, block_sizes=(size, size), stochastic=(True, True))
        grad = rough_values(rng, numel)
        for part, magnitude in zip(grad.chunk(13), magnitudes, strict=True):
            part.mul_(magnitude / part.abs().max())
        for moment in (work.exp_avg, work.exp_avg_sq):
            if isinstance(moment, QuantizedBlocks):
                moment.codes.zero_()
                moment.scale.zero_()
            else:
                moment.zero_()
        for value in (torch.nan, torch.inf, -torch.inf):
            grad[rng.integers(numel)] = value
        work = check([work._replace(grad=grad)], f"{first} {second}")[0]
        check([work._replace(grad=-grad.roll(7))], f"{first} {second} again")


def test_several_steps_in_a_row(rng):
    works = [
        make_work(rng, 1100, *pair, stream=stream) for stream, pair in enumerate(itertools.product(FORMATS, repeat=2))
    ]
    for step in range(4):
        works = check([work._replace(grad=rough_values(rng, 1100)) for work in works], f"step {step}", ISAS[-1:])


def test_shapes_are_free(rng):
    work = make_work(rng, 6 * 35, POWER4, None, block_sizes=(35, 35))
    shaped = work._replace(
        param=work.param.view(6, 5, 7), grad=work.grad.view(30, 7), exp_avg_sq=work.exp_avg_sq.view(6, 5, 7)
    )
    check([shaped])


def test_many_tensors_and_numbers_of_threads(rng, two_threads):
    sizes = [*rng.integers(0, 300, 150).tolist(), 200_000, 5, 70_000]
    pairs = [(POWER8, POWER8), (POWER4, POWER4), (None, None), (("dynamic", 8), POWER8)]
    works = []
    for number, size in enumerate(sizes):
        block_size = max(1, size) if number % 5 == 0 or size == 200_000 else 128
        dtypes = (DTYPES[number % 3], DTYPES[number % 2])
        pair = pairs[number % 4]
        works.append(make_work(rng, size, *pair, block_sizes=(block_size,) * 2, dtypes=dtypes, stream=2**62 + number))
    expected = [copy_work(work) for work in works]
    torch.set_num_threads(1)
    cpu.adamw_(expected)
    torch.set_num_threads(2)
    for _ in range(3):
        got = [copy_work(work) for work in works]
        cpu.adamw_(got)
        for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert_same(mine, right, f"works[{number}] of {sizes[number]}")
    torch.set_num_threads(1)
    reference.adamw_(works)
    for number, (mine, right) in enumerate(zip(works, expected, strict=True)):
        assert_same(right, mine, f"works[{number}] of {sizes[number]}")


@pytest.mark.parametrize("index", [0, 5, 2**31 - 8, 2**33 - 50, 2**33, 2**33 - 64, 2**40 + 3, 2**62 - 3])
def test_random_numbers_are_those_of_the_definition(index):
    library = build.load().library
    key = torch.tensor(KEY, dtype=torch.int64)
    expected = (uniform16(key, 101, offset=index) * 2**16).int()
    for isa in range(len(ISAS)):
        bits = (ctypes.c_uint32 * 101)()
        library.ds_quant_uniform16(isa, (ctypes.c_uint32 * 2)(*KEY), ctypes.c_uint64(index), bits, ctypes.c_int64(101))
        assert list(bits) == expected.tolist()


@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1, 2**32, 2**64 - 1])
def test_subkeys_are_those_of_the_definition(stream):
    key = (ctypes.c_uint32 * 2)(*KEY)
    build.load().library.ds_quant_derive_key(key, ctypes.c_uint64(stream))
    assert list(key) == derive_key(torch.tensor(KEY, dtype=torch.int64), stream).tolist()


def test_nothing_to_do():
    cpu.adamw_([])
    adamw_([])


def test_what_does_not_fit_is_refused_before_anything_is_written(rng):
    good = make_work(rng, 1000, POWER8, POWER4, block_sizes=(256, 128))
    before = copy_work(good)
    first, second = good.exp_avg, good.exp_avg_sq
    bad = [
        ("param", {"param": good.param.double()}),
        ("param", {"param": good.param.repeat_interleave(2)[::2]}),
        ("grad", {"grad": good.grad[:-1]}),
        ("grad", {"grad": good.grad.to("meta")}),
        ("exp_avg", {"exp_avg": good.param.bfloat16()}),
        ("exp_avg.codes", {"exp_avg": first._replace(codes=first.codes[:-1])}),
        ("exp_avg.codes", {"exp_avg": first._replace(codes=first.codes.view(torch.uint8))}),
        ("exp_avg.scale", {"exp_avg": first._replace(scale=first.scale[:-1])}),
        ("exp_avg.scale", {"exp_avg": first._replace(scale=first.scale.double())}),
        ("exp_avg", {"exp_avg": first._replace(numel=999)}),
        ("exp_avg", {"exp_avg": first._replace(block_size=96)}),
        ("exp_avg_sq", {"exp_avg_sq": good.param.bfloat16()}),
        ("exp_avg_sq.codes", {"exp_avg_sq": second._replace(codes=second.codes[:-1])}),
        ("exp_avg_sq.codes", {"exp_avg_sq": second._replace(codes=second.codes.repeat_interleave(2)[::2])}),
    ]
    for name, changed in bad:
        with pytest.raises(ValueError, match=rf"adamw_\(works\[1\]\.{name}\): got .*; allowed: .*; "):
            adamw_([good, good._replace(**changed)])
    for changed in ({"exp_avg_key": (-1, 0)}, {"exp_avg_key": (0, 2**32)}, {"stream": 2**63}, {"stream": -1}):
        with pytest.raises(ValueError, match=r"adamw_\(works\[1\]\): got keys .*; allowed: .*; "):
            cpu.adamw_([good, good._replace(**changed)])
    odd = first._replace(code_map=CodeMap("power", 8, True, 127, 0, 3))
    with pytest.raises(ValueError, match=r"adamw_\(exp_avg\): got CodeMap.*; allowed: .*; "):
        cpu.adamw_([good, good._replace(exp_avg=odd)])
    with pytest.raises(ValueError, match=r"adamw_\(exp_avg\): got CodeMap.*; allowed: signed maps; "):
        cpu.adamw_([good, good._replace(exp_avg=second)])
    with pytest.raises(ValueError, match=r"adamw_\(isa\): got 'sse'; allowed: plain"):
        cpu.adamw_([good], isa="sse")
    assert_same(good, before)


def test_dispatch_serves_the_cpu_with_the_kernel(rng, monkeypatch):
    assert adamw_.implementation("cpu") == f"cpu: C++ {native.isa()}"
    assert adamw_.implementation(torch.device("meta")) == "reference"
    work = make_work(rng, 100, POWER8, POWER8)
    with pytest.raises(ValueError, match=r"adamw_\(works\): got parameters on cpu and meta; allowed: one "):
        adamw_([work, work._replace(param=work.param.to("meta"))])
    expected = copy_work(work)
    adamw_([expected])
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    assert adamw_.implementation("cpu") == "reference"
    monkeypatch.setattr(cpu, "adamw_", None)
    adamw_([work])
    assert_same(expected, work)


@pytest.mark.parametrize("block_sizes", [(64, 64), (192, 64), (64, 192), (320, 320), (128, 256), (256, 128)], ids=str)
@pytest.mark.parametrize("second", [("float", 8), POWER8, POWER4, ("dynamic", 8)], ids=str)
@pytest.mark.parametrize("first", [("float", 8), POWER8, POWER4, ("linear", 4)], ids=str)
def test_whole_blocks_that_are_decoded_and_stepped_in_one_loop(rng, first, second, block_sizes):
    works = [
        make_work(rng, numel, first, second, block_sizes=block_sizes, dtypes=dtypes)
        for numel in (960, 3840)
        for dtypes in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32))
    ]
    check(works)


@pytest.mark.parametrize("numel", [7, 35, 9999])
def test_the_half_byte_behind_an_odd_block_becomes_zero(rng, numel):
    work = make_work(rng, numel, POWER4, POWER4, block_sizes=(numel, numel))
    for moment in (work.exp_avg, work.exp_avg_sq):
        moment.codes[-1] |= 0xF0
    check([work])


@pytest.mark.parametrize("form", [("float", 8), POWER8, POWER4, ("dynamic", 8)], ids=str)
def test_the_largest_value_keeps_the_top_code_whatever_is_drawn(rng, form):
    """The reciprocal of a huge scale is denormal: its product with the scale may exceed 1, and a draw of 0 sends up."""
    candidates = torch.from_numpy(rng.uniform(2.0**126, 2.0**127, 1000).astype("float32"))
    value = candidates[candidates * (1 / candidates) > 1][0]
    numel = 2**18
    assert (uniform16(derive_key(torch.tensor(KEY), 18), numel) == 0).any()
    work = make_work(rng, numel, form, form, stochastic=(True, True))
    # As an older checkpoint may hold it: a gradient counts as 2^63 at most.
    values = torch.full((numel,), value.item())
    stored = [quantize_blockwise(values, m.code_map, block_size=m.block_size) for m in (work.exp_avg, work.exp_avg_sq)]
    scalars = work.scalars._replace(beta1=1.0, beta2=1.0)
    work = work._replace(grad=torch.zeros(numel), exp_avg=stored[0], exp_avg_sq=stored[1], scalars=scalars)
    stepped = check([work], isas=ISAS[-2:])[0]
    assert (dequantize_blockwise(stepped.exp_avg) == value).all()


@pytest.mark.parametrize("block_sizes", [(256, 256), (4, 4), (2048, 2048), (8192, 8192)], ids=str)
@pytest.mark.parametrize("form", [None, ("float", 8), POWER8, POWER4, ("dynamic", 8)], ids=str)
def test_huge_finite_gradients_keep_their_blocks_finite(rng, form, block_sizes):
    """One pass, two passes, whole blocks and tails: all finite, and ordinary neighbours of Inf and NaN too."""
    numel = 8192 + 333
    grad = rough_values(rng, numel)
    for number, size in enumerate([1e18, 2.0**63, 1e19, 1e20, 3e38, torch.finfo(torch.float32).max]):
        grad[number * 1300 + 7], grad[number * 1300 + 700] = size, -size
    work = make_work(rng, numel, form, form, block_sizes=block_sizes, stochastic=(True, True))
    if form and block_sizes[0] == 8192:
        work = make_work(rng, 8192, form, form, block_sizes=block_sizes, stochastic=(True, True))
    grad = grad[: work.param.numel()]
    works = [work._replace(grad=grad), work._replace(grad=grad.clamp(-3e38, 3e38).bfloat16())]
    for _ in range(3):
        works = [after._replace(grad=work.grad) for after, work in zip(check(works), works, strict=True)]
        for stepped in works:
            assert all(part.isfinite().all() for _, part in tensors(stepped) if part.is_floating_point())
    grad[4100], grad[5], grad[6000] = torch.inf, -torch.inf, torch.nan
    stepped = check([works[0]._replace(grad=grad)])[0]
    assert stepped.param.isnan().nonzero().reshape(-1).tolist() == [5, 4100, 6000]
    assert not all(part.isfinite().all() for name, part in tensors(stepped) if name.startswith("exp_avg"))
