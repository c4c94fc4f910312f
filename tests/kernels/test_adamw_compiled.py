"""The compiled step, on the CPU as far as it goes there; what serves CUDA, on a GPU if there is one."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ds_quant.kernels import registry
from ds_quant.kernels.adamw import compiled as cuda
from ds_quant.kernels.adamw import ops
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.numerics import code_map, derive_key, fold_key, quantize_blockwise
from ds_quant.numerics.adam import adamw_scalars, adamw_step
from ds_quant.numerics.blockwise import QuantizedBlocks

NO_TRITON = "test_adamw_triton.py fails where triton should be installed and is not"
DYNAMIC = (("dynamic", 8, 256), ("dynamic", 8, 256))
FORMATS = {
    "8/8": (("power", 8, 256), ("power", 8, 256)),
    "float": (("float", 8, 256), ("float", 8, 256)),
    "4/4": (("power", 4, 128), ("power", 4, 128)),
    "m4v8": (("power", 4, 128), ("power", 8, 256)),
    "m32v8": (None, ("power", 8, 64)),
    "32/32": (None, None),
    "linear by channel": (("linear", 4, 75), ("linear", 8, 75)),
    "linear by tensor": (("linear", 8, 1500), ("linear", 8, 1500)),
    "m4vlog": (("power", 4, 128), ("log", 4, 128)),
    "dynamic": DYNAMIC,
    "dynamic 4 bits": (("dynamic", 4, 128), ("dynamic", 4, 128)),
    "another block size": (("power", 8, 1024), ("power", 8, 1024)),
}
KEY = tuple(fold_key(11, step=3).tolist())


def values(rng, length):
    return torch.from_numpy((rng.normal(size=length) * np.exp(rng.normal(size=length))).astype(np.float32))


def make_work(rng, length, layouts, *, dtype=torch.float32, grad_dtype=None, keys=(None, None), step=3, device="cpu"):
    moments = [values(rng, length), values(rng, length).square()]
    for number, layout in enumerate(layouts):
        if layout:
            kind = code_map(layout[0], layout[1], signed=number == 0)
            moments[number] = quantize_blockwise(moments[number].to(device), kind, block_size=layout[2])
    return AdamWWork(
        values(rng, length).to(device, dtype),
        values(rng, length).to(device, grad_dtype or dtype),
        *(m if isinstance(m, QuantizedBlocks) else m.to(device) for m in moments),
        adamw_scalars(10.0 ** rng.uniform(-4, -1), (0.9, 0.99), 1e-8, 0.1, step),
        *keys,
        7,
    )


def clone(work):
    def copy(item):
        if isinstance(item, QuantizedBlocks):
            return item._replace(codes=item.codes.clone(), scale=item.scale.clone())
        return item.clone() if isinstance(item, torch.Tensor) else item

    return AdamWWork(*map(copy, work))


def reference(work):
    keys = [
        None if key is None else derive_key(torch.tensor(key, device=work.param.device), 2 * work.stream + number)
        for number, key in enumerate((work.exp_avg_key, work.exp_avg_sq_key))
    ]
    return adamw_step(*work[:5], *keys)


def assert_same(work, expected):
    torch.testing.assert_close(work.param, expected[0], rtol=0, atol=0)
    for got, moment in ((work.exp_avg, expected[1]), (work.exp_avg_sq, expected[2])):
        pairs = zip(got[:2], moment[:2], strict=True) if isinstance(got, QuantizedBlocks) else [(got, moment)]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(work, expected, same=0.999):
    """Parameters and scales within some ulp, codes the same but for a few that lie between two."""
    rtol = 1e-5 if work.param.dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(work.param, expected[0], rtol=rtol, atol=1e-5)
    for got, moment in ((work.exp_avg, expected[1]), (work.exp_avg_sq, expected[2])):
        if isinstance(got, QuantizedBlocks):
            torch.testing.assert_close(got.scale, moment.scale, rtol=1e-5, atol=0)
            assert (got.codes == moment.codes).double().mean() >= same
        else:
            torch.testing.assert_close(got, moment, rtol=1e-5, atol=1e-12)


@pytest.fixture
def forgetful(monkeypatch):
    """What serves is found out anew, here and after."""
    caches = (registry._serving, registry._is_ready)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def counters(monkeypatch):
    """By format, a backend of torch.compile that counts compilations and leaves operations as they are."""
    compiled, found = cuda._compiled, {}
    compiled.cache_clear()

    def count(*layouts):
        return compiled(*layouts, backend=found.setdefault(layouts, CompileCounter()))

    monkeypatch.setattr(cuda, "_compiled", count)
    yield found
    compiled.cache_clear()


def test_import_needs_no_triton():
    program = "import sys; sys.modules.update(triton=None); import ds_quant.kernels.adamw.compiled"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_what_serves_cuda(forgetful, monkeypatch, caplog):
    device = torch.device("cuda")
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    assert ops.adamw_.on(device) is cuda.adamw_
    monkeypatch.setenv("DS_QUANT_KERNELS", "triton")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        with caplog.at_level("WARNING", logger="ds_quant"):
            assert [ops.adamw_.on(device) for _ in range(2)] == [cuda.adamw_] * 2
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == "DS_QUANT_KERNELS=triton: a parameter takes another kernel, because triton is not installed"
    pytest.importorskip("triton", reason=NO_TRITON)
    registry._serving.cache_clear()
    registry._is_ready.cache_clear()
    assert ops.adamw_.implementation(device) == "cuda: ds_quant.kernels.adamw.triton"
    assert ops.adamw_.after("triton", device) is cuda.adamw_


def test_what_triton_does_not_take_goes_on(rng, monkeypatch, caplog):
    pytest.importorskip("triton", reason=NO_TRITON)
    from ds_quant.kernels.adamw import triton

    taken, left = [], []
    monkeypatch.setattr(triton.triton_batches, "adamw_", taken.extend)  # of 1500 elements: a small one
    monkeypatch.setattr(ops.adamw_, "after", lambda backend, device: left.extend)
    triton._warn_once.cache_clear()
    first, *others = (make_work(rng, 1500, FORMATS[name]) for name in ("m4v8", "linear by channel", "dynamic"))
    with caplog.at_level("WARNING", logger="ds_quant"):
        for _ in range(2):
            triton.adamw_([*others, first])
    assert [id(work) for work in taken] == [id(first)] * 2
    assert [id(work) for work in left] == [id(work) for work in others] * 2
    by_blocks, by_map = (record.getMessage() for record in caplog.records)
    assert by_blocks.startswith("DS_QUANT_KERNELS=triton: a parameter takes another kernel, because ")
    assert "blocks of 75" in by_blocks
    assert "dynamic" in by_map


@pytest.mark.parametrize("name", FORMATS)
def test_compiles_once_for_a_format(name, rng, counters):
    """Five steps of two parameters with new lr, betas, keys and gradients: one compilation, the reference's bits."""
    layouts = FORMATS[name]
    keys = [KEY if number and layout else None for number, layout in enumerate(layouts)]
    # 6 and 12 scales in blocks of 256: as many as there are scalars.
    lengths = (1500, 3000) if name != "linear by tensor" else (1500, 1500)
    works = [make_work(rng, length, layouts, keys=keys) for length in lengths]
    # Parts of larger tensors, as partitions are.
    works = [w._replace(param=torch.cat((w.param, values(rng, 5 * i)))[: len(w.param)]) for i, w in enumerate(works)]
    for step in range(1, 6):
        betas = (0.9 - 0.01 * step, 0.99)
        scalars = adamw_scalars(10.0 ** rng.uniform(-4, -1), betas, 1e-8, 0.1 / step, step)
        key = tuple(fold_key(1, step=step).tolist())
        works = [
            work._replace(grad=values(rng, length), scalars=scalars, exp_avg_sq_key=work.exp_avg_sq_key and key)
            for work, length in zip(works, lengths, strict=True)
        ]
        expected = [reference(work) for work in works]
        cuda.adamw_(works)
        for work, result in zip(works, expected, strict=True):
            assert_same(work, result)
    assert [counter.frame_count for counter in counters.values()] == [1]


def test_dynamic_moments_decay_and_spread_what_is_not_finite(rng, counters):
    """As the reference has it, not as bitsandbytes' kernel: bf16 parameters decay, Inf and NaN are not skipped."""
    work = make_work(rng, 1500, DYNAMIC, dtype=torch.bfloat16, keys=(None, KEY))
    work = work._replace(scalars=adamw_scalars(1e-1, (0.9, 0.99), 1e-8, 0.5, 3), grad=torch.zeros_like(work.grad))
    work.grad[7], work.grad[1000] = torch.inf, torch.nan
    undecayed = clone(work)._replace(scalars=work.scalars._replace(decay=1.0))
    expected = reference(work)
    cuda.adamw_([work])
    cuda.adamw_([undecayed])
    torch.testing.assert_close(work.param, expected[0], rtol=0, atol=0, equal_nan=True)
    for got, moment in ((work.exp_avg, expected[1]), (work.exp_avg_sq, expected[2])):
        torch.testing.assert_close(got.scale, moment.scale, rtol=0, atol=0, equal_nan=True)
        assert got.scale.isnan().nonzero().flatten().tolist() == [0, 1000 // 256]
        assert torch.equal(got.codes, moment.codes)
    assert work.param.isnan().nonzero().flatten().tolist() == [7, 1000]
    assert (work.param != undecayed.param).sum() > 1400


def test_kinds_of_lengths_and_dtypes(rng, counters):
    """All of them fit below torch's limit of compilations, which `fullgraph` makes an error."""
    dtypes = list(itertools.product((torch.float32, torch.bfloat16), repeat=2))
    for length in (0, 1, 2, 127, 128, 129, 256, 1157):
        for dtype, grad_dtype in dtypes if length in (2, 1157) else dtypes[:1]:
            work = make_work(rng, length, FORMATS["m4v8"], dtype=dtype, grad_dtype=grad_dtype, keys=(KEY, KEY))
            expected = reference(work)
            cuda.adamw_([work])
            assert_same(work, expected)
    (counter,) = counters.values()
    assert counter.frame_count <= 20


def test_shapes_are_free(rng, counters):
    work = make_work(rng, 1200, FORMATS["m4v8"])
    expected = reference(work)
    param = torch.nn.Parameter(work.param.clone().reshape(30, 40))
    blocks = work.exp_avg_sq._replace(codes=work.exp_avg_sq.codes.reshape(30, 40))
    cuda.adamw_([work._replace(param=param, grad=work.grad.reshape(30, 40), exp_avg_sq=blocks)])
    assert_same(work._replace(param=param.detach().reshape(-1)), expected)


def test_compiled_by_inductor(rng):
    work = make_work(rng, 4101, FORMATS["m4v8"], keys=(None, KEY))
    for step in range(1, 4):
        work = work._replace(scalars=adamw_scalars(1e-2 / step, (0.9, 0.99), 1e-8, 0.1, step), grad=values(rng, 4101))
        expected = reference(work)
        cuda.adamw_([work])
        assert_close(work, expected)
    # Simplifications must not lose the product with 0 that shows an Inf.
    grad = values(rng, 4101)
    grad[7], grad[1000], grad[3000], grad[4100] = 3e38, -1e20, torch.inf, torch.nan
    work = work._replace(grad=grad)
    param, *moments = reference(work)
    cuda.adamw_([work])
    torch.testing.assert_close(work.param, param, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert work.param.isnan().nonzero().reshape(-1).tolist() == [3000, 4100]
    for got, expected in zip((work.exp_avg, work.exp_avg_sq), moments, strict=True):
        torch.testing.assert_close(got.scale, expected.scale, rtol=1e-5, atol=0, equal_nan=True)
        assert got.scale.isnan().sum() == 2


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("kernels", ["", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name, dtype, kernels, rng, monkeypatch):
    monkeypatch.setenv("DS_QUANT_KERNELS", kernels)
    layouts = FORMATS[name]
    keys = [KEY if layout else None for layout in layouts]
    make = functools.partial(make_work, rng, layouts=layouts, dtype=dtype, keys=keys, device="cuda")
    for length in (1500,) if name == "linear by tensor" else (75, 1500, 75 * 1000):
        work = make(length)
        for step in range(1, 4):
            grad = values(rng, length).to("cuda", dtype)
            work = work._replace(grad=grad, scalars=adamw_scalars(1e-2, (0.9, 0.99), 1e-8, 0.1, step))
            expected = reference(work)
            ops.adamw_([work])
            assert_close(work, expected, same=0.98)


@needs_gpu
def test_triton_matches_on_a_gpu_bit_for_bit(rng, monkeypatch):
    """More than is promised: a failure here says to promise closeness only."""
    monkeypatch.setenv("DS_QUANT_KERNELS", "triton")
    for name in ("8/8", "4/4", "m4v8"):
        work = make_work(rng, 75 * 1000, FORMATS[name], keys=(None, KEY), device="cuda")
        assert ops.adamw_.implementation("cuda").endswith("triton")
        expected = reference(work)
        ops.adamw_([work])
        assert_same(work, expected)
