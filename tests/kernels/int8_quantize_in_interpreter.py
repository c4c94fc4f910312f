"""Padded codes of operands, and whole layers of them, in Triton's interpreter: the bits of the definition.

`test_int8_triton.py` runs this file in a process of its own, because TRITON_INTERPRET must be set before triton is
imported. Layers are in fp32: the interpreter truncates where a GPU rounds to bf16.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import ds_quant
from benchmarks.roofline import AFTER
from ds_quant.kernels import choice, launching, registry
from ds_quant.kernels.int8 import ops, triton, triton_quantize
from ds_quant.linear.step_key import remove_forward_counter
from ds_quant.linear.weight_codes import weights_changed
from ds_quant.numerics import products as reference
from ds_quant.numerics.random import fold_key

KEY = fold_key(5)
STREAMS = (3, 4 + (9 << 33) + (1 << 31))
"""The second one has both its words, and a low one that is no int32."""
# One element, less than a tile, several programs with a rest, whole tiles.
SHAPES = ((1, 1), (5, 70), (35, 130), (64, 128))


def wild(rng, shape, dtype=torch.float32, denormal=2.0**-140):
    """Rows and columns of zeros, denormals, and what is not finite, beside usual ones."""
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 3)
    if min(shape) > 4:
        x[2], x[:, 3] = 0.0, denormal * rng.integers(-300, 300, size=shape[0])
        x[4, 0], x[0, 4] = rng.choice([np.inf, -np.inf, np.nan, 3e38], size=2)
    return torch.from_numpy(x).to(dtype)


def scales(rng, count):
    found = torch.from_numpy(10.0 ** rng.uniform(-4, 1, size=count)).float()
    found[count // 2] = rng.choice([0.0, np.nan, 1e-44, 1.0])
    return found


def assert_same(got, expected, context):
    for number, (left, right) in enumerate(zip(got, expected, strict=True)):
        assert (left.dtype, left.shape, left.is_contiguous()) == (right.dtype, right.shape, True), context
        same = (left == right) | (left.isnan() & right.isnan())
        assert same.all(), f"{context} result {number}: {(~same).sum()} differ, first {(~same).nonzero()[0]}"


def assert_sums(got, want, x):
    """In another order: 2^-24 of each magnitude that is added, at most so often as there are sums in a row."""
    if len(want):
        same = (got == want) | (got.isnan() & want.isnan())
        assert (same | ((got - want).abs() <= x.abs().sum(0) * len(x) * 2.0**-24)).all()


@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizers(rng, shape, key):
    x = wild(rng, shape)
    rows, columns = scales(rng, shape[0]), scales(rng, shape[1])
    with np.errstate(all="ignore"):
        for granularity, factor, levels in (
            ("row", columns, 127.0),
            ("row", None, 127.5),
            ("column", rows, 127.0),
            ("column", rows[:1], 127.5),
            ("tensor", None, 127.5),
        ):
            options = {"granularity": granularity, "factor": factor, "key": key}
            for stream in STREAMS[: 1 if key is None else 2]:
                got = triton_quantize.quantize_operand(x, levels, **options, stream=stream)
                assert_same(got, reference.quantize_operand(x, levels, **options, stream=stream), f"{levels} {options}")
        options = {"key": key, "row_stream": STREAMS[0], "column_stream": STREAMS[1]}
        for column_scale, row_scale in ((columns, rows), (columns[:1], None)):
            options |= {"column_scale": column_scale, "row_scale": row_scale, "sums": row_scale is None}
            got = triton_quantize.quantize_gradient(x, 7.0, **options)
            want = reference.quantize_gradient(x, 7.0, **options)
            assert_same(got[:4], want[:4], f"{options}")
            assert_sums(got[4], want[4], x)


def test_more_parts_than_are_read_at_a_time(rng):
    x, rows = wild(rng, (530, 17)), scales(rng, 530)
    options = {"row_scale": rows, "sums": True}
    with np.errstate(all="ignore"):
        got, want = (module.quantize_gradient(x, 127.0, **options) for module in (triton_quantize, reference))
        assert_same(got[:4], want[:4], "")
        assert_sums(got[4], want[4], x)
        options = {"granularity": "tensor"}
        x[torch.randint(530, ()).item(), 5] = 1e30
        x = x.nan_to_num(posinf=1, neginf=1)
        got, want = (module.quantize_operand(x, 127.0, **options) for module in (triton_quantize, reference))
        assert_same(got, want, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_strides_and_ways(rng, dtype):
    whole = wild(rng, (70, 50), dtype, denormal=0.0)  # the interpreter has denormals of its own
    with np.errstate(all="ignore"):
        for x, ways in zip(
            (whole, whole.t(), whole[::3, 3:40], whole[:1].expand(40, 50)), (*reference.WAYS, "both"), strict=True
        ):
            options = {"granularity": "row", "key": KEY, "ways": ways}
            got = triton_quantize.quantize_operand(x, 127.0, **options)
            assert_same(got, reference.quantize_operand(x, 127.0, **options), f"{x.shape} {x.stride()} {ways}")


def test_ties_and_the_division(rng):
    """Steps that lie between two codes, and next to that."""
    halves = np.arange(-126.5, 127)
    for absmax in (127.0, 1.0, *rng.uniform(1, 2, size=3)):
        x = (halves * (np.float32(absmax) / np.float32(127))).astype(np.float32).view(np.int32)
        x = (x + rng.integers(-2, 3, size=(6, 1), dtype=np.int32)).view(np.float32)
        x[:, 77] = absmax
        for granularity in ("row", "tensor"):
            got = triton_quantize.quantize_operand(torch.from_numpy(x), 127.0, granularity=granularity)
            want = reference.quantize_operand(torch.from_numpy(x), 127.0, granularity=granularity)
            assert_same(got, want, f"{absmax} {granularity}")


def test_elements_beyond_32_bits(rng, monkeypatch):
    """The numbers of elements have two words: taken for small matrices here, whose upper words are 0."""
    monkeypatch.setattr(triton_quantize, "_is_narrow", lambda x: False)
    x = wild(rng, (20, 40))
    with np.errstate(all="ignore"):
        for granularity in ("row", "tensor"):
            options = {"granularity": granularity, "key": KEY}
            got = triton_quantize.quantize_operand(x, 127.0, **options)
            assert_same(got, reference.quantize_operand(x, 127.0, **options), granularity)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_without_elements(shape):
    x = torch.zeros(shape)
    for granularity in ("row", "column", "tensor"):
        options = {"granularity": granularity}
        assert_same(
            triton_quantize.quantize_operand(x, 127.0, **options),
            reference.quantize_operand(x, 127.0, **options),
            granularity,
        )
    options = {"sums": True}
    assert_same(
        triton_quantize.quantize_gradient(x, 127.0, **options), reference.quantize_gradient(x, 127.0, **options), ""
    )


@pytest.fixture
def launches(monkeypatch):
    """The kernels as a backend of CPUs that may be chosen; the names of those that are launched."""
    monkeypatch.setattr(registry, "BACKENDS", [*registry.BACKENDS])
    monkeypatch.setattr(registry, "CHOICES", [*choice.CHOICES])
    monkeypatch.setattr(choice, "CHOICES", registry.CHOICES)
    registry.add_backend(registry.Backend("interpreted", ("cpu",), by_choice=True))
    for name in ("quantize_operand", "quantize_gradient", "padded_matmul"):
        getattr(ops, name).by("interpreted")(getattr(triton, name, None) or getattr(triton_quantize, name))
    found = []

    def counting(launch, device):
        found.append(launch.kernel.fn.__name__)
        with _disable_current_modes():
            launching.run(launch, device)

    monkeypatch.setattr(triton, "run", counting)
    monkeypatch.setattr(triton_quantize, "run", counting)
    yield found
    registry._serving.cache_clear()


class Computed(TorchDispatchMode):
    """The names of operations of torch that are neither views nor allocations."""

    HARMLESS = ("empty", "new_empty", "view", "_unsafe_view", "slice", "as_strided", "t", "transpose", "detach")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names += [name] if name not in self.HARMLESS else []
        return func(*args, **(kwargs or {}))


MOST_LAUNCHES = 8
"""Of forward and backward with the weight's quantization, in the recipe of `full_int8.json`."""
GROUPS, TILES, PRODUCT = ["group_kernel"], ["scan_kernel", "tile_kernel"], ["kernel"]
RECIPE = [*GROUPS, *GROUPS, *PRODUCT, *TILES, *PRODUCT, *PRODUCT]
"""X, W, the result; the gradient in both ways, and its products."""
ONE_SCALE = [*TILES, *TILES, *PRODUCT, *TILES, *PRODUCT, *PRODUCT]
"""A scale for a tensor is known when all of it is read. Both products have one gradient's codes, to nearest."""
ONE_SCALE_DRAWN = [*TILES, *TILES, *PRODUCT, *TILES, *TILES, *PRODUCT, *PRODUCT]
"""Stochastic rounding draws for each product, so that the gradient is quantized twice."""


@pytest.mark.parametrize(
    ("granularity", "rounding", "expected"),
    [
        ("group", "nearest", RECIPE),
        ("group", "stochastic", RECIPE),
        ("tensor", "nearest", ONE_SCALE),
        ("tensor", "stochastic", ONE_SCALE_DRAWN),
    ],
)
@pytest.mark.parametrize("kind", [ds_quant.QuantLinear, ds_quant.QuantConv1D])
def test_layers(monkeypatch, launches, kind, granularity, rounding, expected):
    """The bits of the C++ kernels, in so many launches: nothing else but views and allocations is done."""
    config = {"weight": {"bits": 8}, "activation": {"bits": 8, "rounding": rounding}, "backend": "int8"}
    config["gradient"] = {"bits": 8, "rounding": rounding}
    if granularity == "tensor":
        for name in ("weight", "activation", "gradient"):
            config[name]["granularity"] = "tensor"
    torch.manual_seed(0)
    module = kind(*((50, 21) if kind is ds_quant.QuantLinear else (21, 50)), config=config)
    remove_forward_counter(module)  # both draw the bits of one step
    x, g = torch.randn(2, 19, 50), torch.randn(2, 19, 21)
    results = []
    for backend in ("", "interpreted"):
        monkeypatch.setenv("DS_QUANT_KERNELS", backend)
        weights_changed()
        inputs = x.clone().requires_grad_()
        with Computed() as computed:
            y = module(inputs)
            y.backward(g)
        results.append((y.detach(), inputs.grad, module.weight.grad, module.bias.grad))
        module.zero_grad()
    for got, want in zip(*results, strict=True):
        is_sum = got.dim() == 1  # in another order
        torch.testing.assert_close(got, want, rtol=1e-5 if is_sum else 0, atol=1e-5 if is_sum else 0)
    # The sum of the bias is a launch of its own where the gradient has one scale.
    assert (launches, computed.names) == (expected, [] if granularity == "group" else ["sum"])
    assert granularity == "tensor" or len(launches) == AFTER.launches <= MOST_LAUNCHES
