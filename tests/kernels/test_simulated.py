"""What layers in floating point have in kernels: the definitions' bits as it is compiled for CPUs, narrow operands."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_quant.kernels import compiling, registry
from ds_quant.kernels.simulated import compiled
from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.products import Operand, sums
from ds_quant.numerics.format import Format, Group, Integers, quantize_to
from ds_quant.numerics.integer import quantize
from ds_quant.numerics.random import derive_key, fold_key

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STREAMS = (4, 5, 6 + (3 << 32))


@pytest.fixture
def compiles(monkeypatch):
    backend = registry.Backend("compiled", ("cpu",), is_usable=lambda family: family is kernels.FAMILY)
    monkeypatch.setattr(registry, "BACKENDS", [backend])
    caches = (registry._serving, compiling.compiled_with)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a.nan_to_num(nan=-7.5), b.nan_to_num(nan=-7.5))
        else:
            assert a == b


def test_quantizers(compiles):
    """By Inductor, a folded gradient and its random bits; `tests/numerics` holds the other formats to it."""
    to, key = Format(Integers(8), Group("row")), fold_key(3)
    for shape, stream in zip(((9, 64), (33, 50), (1, 40)), STREAMS, strict=True):
        x, factor = torch.randn(shape).bfloat16(), torch.rand(shape[1])
        x[0, :2] = torch.tensor([float("inf"), 0.0])
        got = kernels.quantize(x, factor, to, "stochastic", key, stream)
        assert_same(got, quantize_to(x * factor, to, rounding="stochastic", key=derive_key(key, stream)))


def test_the_end_of_products(compiles):
    for rows, columns in ((5, 40), (40, 5), (1, 8)):
        y, a, b, bias = torch.randn(rows, columns), torch.rand(rows, 1), torch.rand(columns, 1), torch.randn(columns)
        expected = (y * a * b.t() + bias).to(BF16)
        assert torch.equal(kernels.finish(y, a, b, bias, BF16), expected)


def test_nothing_compiles_again(monkeypatch, compiles):
    """For new shapes, keys and streams."""
    counters, real = {}, compiling.compiled_with
    monkeypatch.setattr(
        compiled, "compiled_with", lambda *kind: real(*kind, backend=counters.setdefault(kind, CompileCounter()))
    )
    to = Format(Integers(8), Group("row"))
    for number, shape in enumerate(((9, 64), (64, 9), (3, 4), (768, 20), (1, 5))):
        x, key, stream = torch.randn(shape), fold_key(number), STREAMS[number % 2] + 7 * number
        got = kernels.quantize(x, None, to, "stochastic", key, stream)
        assert_same(got, quantize_to(x, to, rounding="stochastic", key=derive_key(key, stream)))
        kernels.finish(x, torch.rand(shape[0], 1), None, None, BF16)
    assert [counter.frame_count for counter in counters.values()] == [1, 1]


def test_where_it_is_compiled(monkeypatch):
    """What a graph is made of is left to its compiler."""
    x, cuda = torch.randn(4, 6), torch.device("cuda")
    for operation, function in ((kernels.quantize, compiled.quantize), (kernels.finish, compiled.finish)):
        assert operation.on(cuda) is function
        with monkeypatch.context() as patched:
            patched.setenv("DS_QUANT_KERNELS", "reference")
            assert operation.on(cuda) is operation.reference
    assert not compiled._is_compiled(x[:1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(registry.Operation, "on", None)
    kernels.quantize(x, None, Format(Integers(8), Group("row")), "nearest", None, 0)
    assert torch.equal(kernels.finish(x.clone(), None, None, None, FP32), x)


def test_codes_are_exact_in_16_bits():
    codes = torch.arange(-128, 128).to(torch.int8)
    for dtype in (BF16, FP16):
        assert torch.equal(codes.to(dtype).to(torch.int32), codes.int())


OPERANDS = {
    "symmetric": lambda x: quantize(x, 8, granularity="row"),
    "full range": lambda x: quantize(x, 8, granularity="tensor", full_range=True),
    "asymmetric": lambda x: quantize(x, 8, granularity="row", symmetric=False),
    "bf16": lambda x: x.to(BF16),
    "fp16": lambda x: x.to(FP16),
    "fp32": lambda x: x,
}


def expected_dtype(left, right):
    kinds = {left, right}
    if kinds & {"asymmetric", "fp32"} or kinds >= {"bf16", "fp16"}:
        return FP32
    return FP16 if "fp16" in kinds else BF16


@pytest.mark.parametrize(("left", "right"), itertools.product(OPERANDS, repeat=2))
def test_narrow_products(monkeypatch, left, right):
    """As on a device that has them: exact operands in the dtype that both are exact in, sums in fp32."""
    a, b = OPERANDS[left](torch.randn(5, 24) + 3), OPERANDS[right](torch.randn(7, 24))
    want = sums(Operand(a, 1), Operand(b, 1))
    seen, real = [], torch.mm

    def mm(x, y, out_dtype=FP32):
        assert out_dtype == FP32
        seen.append((x.dtype, y.dtype))
        return real(x.float(), y.float())

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(kernels, "multiplies_narrow", lambda device: True)
    got = sums(Operand(a, 1), Operand(b, 1))
    assert seen == [(expected_dtype(left, right),) * 2]
    assert torch.equal(got, want)


def test_which_devices_multiply_narrow(monkeypatch):
    assert not kernels.multiplies_narrow(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kernels.multiplies_narrow(torch.device("cuda", 0)) == expected
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not kernels.multiplies_narrow(torch.device("cuda", 0))


def test_a_traced_gpu_multiplies_narrow(monkeypatch):
    """Without one: torch's own shapes for its product of bf16 with an fp32 result."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        x, w = (torch.empty(size, 8, device="cuda", dtype=BF16) for size in (5, 7))
        a, b = (quantize(operand, 8, granularity="row") for operand in (x, w))
        with OperatorNames() as operators:
            y = sums(Operand(a, 1), Operand(b, 1))
        assert (y.dtype, y.shape, y.device.type) == (FP32, (5, 7), "cuda")
    computed = [name for name in operators.found if name != "prim.device"]
    assert computed == ["_to_copy", "_to_copy", "t", "mm.dtype"]


class OperatorNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(str(func).removeprefix("aten.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_layers_hand_over_what_they_quantize(monkeypatch):
    """Eight calls of what is compiled on a GPU: X, W, W in the backward, G twice, and the ends of three products."""
    import ds_quant

    calls, on = [], registry.Operation.on
    monkeypatch.setattr(registry.Operation, "on", lambda self, device: calls.append(self.name) or on(self, device))
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}}
    module = ds_quant.QuantLinear(8, 12, config=config)
    module(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert (calls.count("quantize"), calls.count("finish"), len(calls)) == (5, 3, 8)
