import itertools

import numpy as np
import pytest
import torch
from numerics import oracle, wire_oracle

from ds_quant.numerics import rotation, wire
from ds_quant.numerics.wire import Parts, Residuals, WireFormat

FORMATS = [WireFormat(*fields) for fields in itertools.product((8, 4), (32, 128), ("none", "hadamard"))]
FORMATS += [
    WireFormat(4, 64, "none", "fp4_e2m1"),
    WireFormat(4, 32, "none", "mxfp4", "up"),
    WireFormat(4, 32, "hadamard", "mxfp4"),
    WireFormat(4, 16, "none", "nvfp4"),
    WireFormat(4, 16, "none", "nvfp4", "four_six"),
    WireFormat(4, 16, "hadamard", "nvint4"),
]
NUMELS = (1, 2, 31, 32, 33, 100, 128, 257)
KEY = (0x12345678, 0x9ABCDEF0)


def assert_same(got, expected):
    np.testing.assert_array_equal(oracle.bits_of(got), oracle.bits_of(expected))


def bf16(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float32)).bfloat16()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
def test_quantize_and_dequantize(rng, fmt, key):
    parts, size = wire_oracle.lay_out(rng, NUMELS, fmt)
    x = wire_oracle.gradient(rng, sum(NUMELS))
    before = torch.from_numpy(rng.integers(256, size=size).astype(np.uint8))
    message = before.clone()
    read = [None if n == 31 else bf16(rng.normal(size=n)) for n in NUMELS]
    write = [None if n == 32 else torch.full((n,), 7.0, dtype=torch.bfloat16) for n in NUMELS]
    errors = np.array([1.0, 2.0])
    residuals = Residuals(read, write, 0.3, 1 / 0.3)
    wire.quantize([torch.from_numpy(x)], parts, message, fmt, key=key, residuals=residuals, errors=errors)
    back = torch.full((sum(NUMELS),), 5.0)
    wire.dequantize(message, parts, [back], fmt)

    expected, sums = before.numpy().copy(), [1.0, 2.0]
    with np.errstate(all="ignore"):
        for i, (_, start, n, scale_at, codes_at, stream) in enumerate(zip(*map(np.ndarray.tolist, parts), strict=True)):
            t = x[start : start + n]
            if read[i] is not None:
                t = t + read[i].float().numpy() * np.float32(0.3)
            y = wire_oracle.rotate(t, fmt)
            codes, stored, value = wire_oracle.encode(y, fmt, key, stream)
            expected[scale_at : scale_at + len(stored)] = stored
            packed = wire_oracle.pack(codes, fmt)
            expected[codes_at : codes_at + len(packed)] = packed
            assert_same(back[start : start + n], wire_oracle.unrotate(value, fmt))
            lost = y - value
            is_finite = np.isfinite(lost)
            sums[0] += np.square(lost[is_finite].astype(np.float64)).sum()
            sums[1] += np.square(y[is_finite].astype(np.float64)).sum()
            if write[i] is not None:
                kept = bf16(wire_oracle.unrotate(lost, fmt) * np.float32(1 / 0.3))
                kept[~kept.isfinite()] = 0.0
                assert_same(write[i].float(), kept.float())
    np.testing.assert_array_equal(message.numpy(), expected)
    np.testing.assert_allclose(errors, sums, rtol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_reduce(rng, fmt):
    parts, size = wire_oracle.lay_out(rng, NUMELS, fmt)
    for world_size, own_rank in ((1, 0), (2, 1), (3, 0), (4, 2)):
        x = wire_oracle.gradient(rng, sum(NUMELS))
        received = torch.zeros(world_size - 1, size, dtype=torch.uint8)
        for row in received:
            wire.quantize([torch.from_numpy(wire_oracle.gradient(rng, len(x)))], parts, row, fmt)
        read = [bf16(rng.normal(size=n)) for n in NUMELS]
        write = [torch.full((n,), 7.0, dtype=torch.bfloat16) for n in NUMELS]
        errors = np.zeros(2)
        residuals = Residuals(read, write, 2.0, 0.5)
        output, message = torch.full((len(x),), 3.0), torch.zeros(size, dtype=torch.uint8)
        arguments = ([torch.from_numpy(x)], parts, received, own_rank, fmt)
        wire.reduce(*arguments, factor=1 / 3, output=output, residuals=residuals, errors=errors)
        assert errors.tolist() == [0, 0]
        assert all((tensor == 7.0).all() for tensor in write)
        wire.reduce(*arguments, factor=1 / 3, message=message, key=KEY, residuals=residuals, errors=errors)

        expected, sums = np.zeros(size, dtype=np.uint8), [0.0, 0.0]
        with np.errstate(all="ignore"):
            for i, (_, start, n, scale_at, codes_at, stream) in enumerate(
                zip(*map(np.ndarray.tolist, parts), strict=True)
            ):
                own = wire_oracle.rotate(x[start : start + n] + read[i].float().numpy() * np.float32(2), fmt)
                addends = [wire_oracle.decode(row.numpy().tobytes(), scale_at, codes_at, n, fmt) for row in received]
                addends.insert(own_rank, own)
                total = np.zeros(n, dtype=np.float32)
                for addend in addends:
                    total = total + addend
                total = total * np.float32(1 / 3)
                assert_same(output[start : start + n], wire_oracle.unrotate(total, fmt))
                codes, stored, value = wire_oracle.encode(total, fmt, KEY, stream)
                expected[scale_at : scale_at + len(stored)] = stored
                packed = wire_oracle.pack(codes, fmt)
                expected[codes_at : codes_at + len(packed)] = packed
                kept = bf16(wire_oracle.unrotate(total - value, fmt) * np.float32(0.5))
                kept[~kept.isfinite()] = 0.0
                assert_same(write[i].float(), kept.float())
                is_finite = np.isfinite(value)
                sums[0] += np.square((total - value)[is_finite].astype(np.float64)).sum()
                sums[1] += np.square(total[is_finite].astype(np.float64)).sum()
        np.testing.assert_array_equal(message.numpy(), expected)
        np.testing.assert_allclose(errors, sums, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_read_as_fp32_and_rounded_once(rng, dtype):
    fmt = WireFormat(8, 32, "hadamard")
    parts, size = wire_oracle.lay_out(rng, NUMELS, fmt)
    x = torch.from_numpy(rng.normal(size=sum(NUMELS))).to(dtype)
    messages = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    for tensor, message in zip((x, x.float()), messages, strict=True):
        wire.quantize([tensor], parts, message, fmt)
    assert torch.equal(*messages)
    backs = [torch.zeros(len(x), dtype=kind) for kind in (dtype, torch.float32)]
    for back in backs:
        wire.dequantize(messages[0], parts, [back], fmt)
    assert torch.equal(backs[0], backs[1].to(dtype))


def test_pieces_of_several_tensors(rng):
    fmt = WireFormat(8, 32)
    lengths = (50, 1, 300)
    parts, size = wire_oracle.lay_out(rng, [1] * 20, fmt, lengths=lengths)
    tensors = [torch.from_numpy(rng.normal(size=n).astype(np.float32)) for n in lengths]
    message = torch.zeros(size, dtype=torch.uint8)
    wire.quantize(tensors, parts, message, fmt)
    backs = [torch.zeros(n) for n in lengths]
    wire.dequantize(message, parts, backs, fmt)
    chosen = set(zip(parts.source.tolist(), parts.start.tolist(), strict=True))
    for number, (tensor, back) in enumerate(zip(tensors, backs, strict=True)):
        for i in range(len(tensor)):
            # The only element of its block comes back almost exactly.
            assert back[i].item() == pytest.approx(tensor[i].item() if (number, i) in chosen else 0.0, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 13, 31, 32, 64, 77, 256])
def test_rotation_keeps_lengths_and_comes_back(rng, length):
    t = torch.from_numpy(rng.normal(size=length).astype(np.float32))
    y = rotation.rotate(t, 64)
    assert_same(y, wire_oracle.rotate(t.numpy(), WireFormat(8, 64, "hadamard")))
    torch.testing.assert_close(y.norm(), t.norm())
    torch.testing.assert_close(rotation.unrotate(y, 64), t)


def test_rotation_spreads_an_outlier():
    t = torch.zeros(256)
    t[17] = -3.0
    assert rotation.rotate(t, 256).abs().unique().tolist() == [3.0 / 16]
    signs = rotation.signs_of(8192, 4096)
    assert torch.equal(signs[:4096], signs[4096:])
    assert abs(signs.sum().item()) < 6 * 8192**0.5
    assert signs[:5].tolist() == [-1 if oracle.bits(rotation.SIGN_KEY, i) >= 2**31 else 1 for i in range(5)]


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_is_unbiased_and_independent_between_pieces(rng, bits):
    fmt = WireFormat(bits, 64)
    x = torch.from_numpy(rng.normal(size=64).astype(np.float32))
    count = 500
    same = np.zeros(count, dtype=np.int64)
    sizes = 4 * wire.num_blocks(64, fmt), wire.code_bytes(64, fmt)
    at = np.arange(count) * (sum(sizes))
    parts = Parts(same, same, same + 64, at, at + sizes[0], np.arange(count, dtype=np.uint64))
    message = torch.zeros(count * sum(sizes), dtype=torch.uint8)
    wire.quantize([x], parts, message, fmt, key=KEY)
    back = [torch.zeros(64 * count)]
    wire.dequantize(message, parts._replace(start=np.arange(count) * 64), back, fmt)
    values = back[0].view(count, 64).double()
    step = x.abs().max().item() / (127 if fmt.bits == 8 else 7)
    assert ((values.mean(dim=0) - x).abs() < 6 * step / count**0.5).all()
    assert len(values.unique(dim=0)) > count / 2


def test_sizes():
    for bits, numel, expected in ((8, 1, 1), (8, 300, 300), (4, 1, 1), (4, 300, 150), (4, 33, 17), (4, 65, 33)):
        assert wire.code_bytes(numel, WireFormat(bits, 32)) == expected
    assert [wire.num_blocks(n, WireFormat(8, 32)) for n in (1, 32, 33)] == [1, 1, 2]
    for fmt in FORMATS:
        for numel in (1, 15, 16, 17, 300):
            assert wire.scale_bytes(numel, fmt) == wire_oracle.bytes_of_scales(numel, fmt)
