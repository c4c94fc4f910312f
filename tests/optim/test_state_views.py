import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from ds_quant.numerics import code_map, dequantize_blockwise, fold_key, quantize_blockwise
from ds_quant.numerics.codes import BITS, MAPS
from ds_quant.optim.state import QuantizedState

ALL = [case for case in itertools.product(MAPS, BITS, (True, False)) if case[:2] != ("float", 4)]
SOME = [("float", 8, True), ("power", 8, False), ("power", 4, True), ("dynamic", 4, False), ("linear", 8, True)]
"""Cases that get codes and scales back from what was dequantized: see moment.py on the signed dynamic map."""
BLOCK_SIZE = 32


def values_of(rng, shape, signed):
    values = torch.from_numpy(np.asarray(rng.normal(scale=1e-3, size=shape))).float()
    return values if signed else values.square()


def make(rng, shape, case=("power", 4, True), block_size=BLOCK_SIZE, stream=5):
    name, bits, signed = case
    values = values_of(rng, shape, signed)
    return QuantizedState.quantize(values, code_map(name, bits, signed=signed), block_size, stream=stream)


def plain(moment):
    """What the codes stand for, without the class under test."""
    return dequantize_blockwise(moment.blocks)


def assert_same_bits(got, expected):
    assert type(got) is QuantizedState
    assert got.shape == expected.shape
    assert got.blocks[2:] == expected.blocks[2:]
    assert got.stream == expected.stream
    for left, right in zip(got.blocks[:2], expected.blocks[:2], strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
        assert left.data_ptr() != right.data_ptr() or not left.numel()


def quantize(values, like):
    """`values` to nearest, as `like` is stored."""
    return quantize_blockwise(values.reshape(-1), like.blocks.code_map, block_size=like.blocks.block_size)


def is_plain(tensor):
    return type(tensor) is torch.Tensor and tensor.dtype == torch.float32


def through_torch_save(moment):
    buffer = io.BytesIO()
    torch.save({"exp_avg": moment}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["exp_avg"]


COPIES = {
    "clone": torch.clone,
    "to(device, copy)": lambda moment: moment.to("cpu", copy=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda moment: pickle.loads(pickle.dumps(moment)),
    "torch.save": through_torch_save,
}

VIEWS = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "view": lambda x: x.view(-1),
    "view_as": lambda x: x.view(7, 30),
    "reshape": lambda x: x.reshape(2, 3, 35),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "slice": lambda x: x[1:5],
    "narrow of the flat": lambda x: x.view(-1).narrow(0, 37, 101),
    "narrow of a narrow": lambda x: x.view(-1)[11:][:60].narrow(0, 3, 50),
    "select": lambda x: x[-2],
    "an element": lambda x: x[3, 4],
    "split": lambda x: x.view(-1).split([50, 61, 99])[1],
    "chunk": lambda x: x.chunk(3)[2],
    "unbind": lambda x: x.unbind()[1],
    "columns": lambda x: x[:, 3:9],
    "a column": lambda x: x[:, 0],
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.t(),
    "part of the transposed": lambda x: x.t()[5:7, 1:],
    "diagonal": lambda x: x.diagonal(),
    "nothing": lambda x: x[2:2],
}


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_windows_on_the_same_codes(name, case, rng):
    moment = make(rng, (6, 35), case)
    reference = plain(moment).reshape(6, 35)
    window, expected = VIEWS[name](moment), VIEWS[name](reference)
    assert type(window) is QuantizedState
    assert (window.shape, window.stride()) == (expected.shape, expected.stride())
    assert window.storage_offset() == expected.storage_offset()
    assert window.dtype == torch.float32
    assert window.blocks.codes.data_ptr() == moment.blocks.codes.data_ptr()
    assert torch.equal(window.dequantize(), expected)
    assert window.whole == (expected.numel() == 210 and expected.is_contiguous())

    # Blocks that the window does not touch keep their codes; in the others the rest is only rounded again.
    touched = torch.zeros(210)
    VIEWS[name](touched.view(6, 35)).fill_(1.0)
    blocks = torch.nn.functional.pad(touched, (0, 14)).reshape(-1, BLOCK_SIZE).amax(dim=1)
    scale = moment.blocks.scale.clone()
    window.mul_(0.5)
    expected.mul_(0.5)
    rounded = quantize_blockwise(reference.reshape(-1), moment.blocks.code_map, block_size=BLOCK_SIZE)
    assert torch.equal(moment.blocks.codes, rounded.codes)
    assert torch.equal(moment.blocks.scale, rounded.scale)
    assert torch.equal(moment.blocks.scale[blocks == 0], scale[blocks == 0])


@pytest.mark.parametrize("case", ALL)
def test_windows_at_odd_offsets_reach_the_codes(case, rng):
    for numel in (1, 31, 33, 95, 97, 128):
        moment = make(rng, (numel,), case)
        m = moment.blocks.code_map
        for _ in range(6):
            first = int(rng.integers(0, numel))
            count = int(rng.integers(0, numel - first + 1))
            new = values_of(rng, (count,), m.signed)
            expected = plain(moment)
            expected[first : first + count] = new
            rounded = dequantize_blockwise(quantize(expected, moment))
            first_block, end = first // BLOCK_SIZE * BLOCK_SIZE, -(-(first + count) // BLOCK_SIZE) * BLOCK_SIZE
            if count:  # blocks that are not touched stay as they are
                expected[first_block:end] = rounded[first_block:end]
            moment[first : first + count].copy_(new)
            assert torch.equal(plain(moment), expected)


@pytest.mark.parametrize("block_size", [1, 5, 7, 35, 210])
@pytest.mark.parametrize("bits", BITS)
def test_blocks_of_any_length_have_windows(bits, block_size, rng):
    moment = make(rng, (210,), ("linear", bits, True), block_size)
    for first, count in ((0, 1), (4, 9), (34, 2), (101, 109), (209, 1)):
        expected = plain(moment)
        expected[first : first + count] *= -0.25
        moment.narrow(0, first, count).mul_(-0.25)
        assert torch.equal(
            plain(moment),
            dequantize_blockwise(quantize_blockwise(expected, moment.blocks.code_map, block_size=block_size)),
        )


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_whole_moments_keep_the_bits(name, case, rng):
    for shape in ((6, 35), (97,), (), (0, 3)):
        moment = make(rng, shape, case)
        assert_same_bits(COPIES[name](moment), moment)
        # A view of all elements is whole too.
        assert_same_bits(COPIES[name](moment.view(-1)), moment.view(-1))


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_windows_are_plain(name, rng):
    moment = make(rng, (6, 35))
    for window in (moment[1:4], moment[:, 2], moment.t()):
        got = COPIES[name](window)
        assert is_plain(got)
        assert torch.equal(got, window.dequantize())
        got.zero_()
        assert plain(moment).abs().max() > 0
    # Not the block around it, of 16 KiB.
    assert len(pickle.dumps(make(rng, (8192,), block_size=4096)[40:43])) < 4096


def test_a_copy_is_not_written_through(rng):
    moment = make(rng, (70,))
    before = plain(moment)
    for name, duplicate in COPIES.items():
        duplicate(moment).zero_()
        assert torch.equal(plain(moment), before), name
    twice = [moment, moment]
    left, right = copy.deepcopy(twice)
    assert left is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_gives_plain_values(dtype, rng):
    moment = make(rng, (70,))
    expected = plain(moment).to(dtype)
    other = torch.empty(0, dtype=dtype)
    for got in (
        moment.to(dtype),
        moment.to(dtype=dtype),
        moment.to("cpu", dtype),
        moment.to(other),
        moment.to(tensor=other),
    ):
        assert type(got) is torch.Tensor
        assert got.dtype == dtype
        assert torch.equal(got, expected)
    assert moment.to("cpu") is moment
    if dtype != torch.float32:
        assert torch.equal(moment.type(dtype), expected)


def test_fresh_tensors_are_plain(rng):
    moment = make(rng, (6, 35))
    for got in (
        torch.zeros_like(moment),
        torch.empty_like(moment),
        torch.zeros_like(moment, memory_format=torch.preserve_format),
        torch.ones_like(moment),
        torch.rand_like(moment),
        moment.new_zeros(6, 35),
    ):
        assert is_plain(got)
        assert got.shape == (6, 35)
    assert not torch.zeros_like(moment).any()
    assert torch.zeros_like(moment, dtype=torch.int8).dtype == torch.int8
    assert torch.zeros_like(moment[1:3]).shape == (2, 35)
    assert not moment.is_pinned()


def test_data_takes_over_codes_or_quantizes(rng):
    moment, other = make(rng, (70,)), make(rng, (70,), ("float", 8, True), 64, stream=9)
    moment.data = other
    assert moment.blocks is other.blocks
    assert (moment.stream, moment.whole) == (9, True)
    values = values_of(rng, (70,), True)
    window = moment[3:9]
    moment.data = values
    expected = quantize_blockwise(values, other.blocks.code_map, block_size=64)
    assert torch.equal(moment.blocks.codes, expected.codes)
    assert torch.equal(moment.blocks.scale, expected.scale)
    assert moment.stream == 9
    assert window.blocks is other.blocks  # as in torch, a view stays with the old storage
    moment.data = other[:70].to("cpu", copy=True)
    assert_same_bits(moment, other)
    with pytest.raises(ValueError, match=r"got shape \(3,\); allowed: \(70,\); fix: make a new moment"):
        moment.data = values[:3]


@pytest.mark.parametrize("case", SOME)
def test_copy_between_formats(case, rng):
    source = make(rng, (6, 35), case)
    same = QuantizedState.zeros((6, 35), source.blocks.code_map, BLOCK_SIZE, source.device, stream=5)
    assert not same.any()
    assert same.copy_(source) is same
    assert_same_bits(same, source)

    signed = case[2]
    for m, size in ((code_map("power", 8, signed=signed), 32), (source.blocks.code_map, 64)):
        other = QuantizedState.zeros((6, 35), m, size, source.device)
        other.copy_(source)
        expected = quantize_blockwise(plain(source), m, block_size=size)
        assert torch.equal(other.blocks.codes, expected.codes)
        assert torch.equal(other.blocks.scale, expected.scale)

    fp32 = torch.zeros(6, 35)
    fp32.copy_(source)
    assert torch.equal(fp32.reshape(-1), plain(source))
    same.copy_(fp32.to(torch.float64) * 2)
    assert torch.equal(plain(same), plain(source) * 2)
    same.copy_(torch.tensor(0.5))
    assert torch.equal(plain(same), torch.full((210,), 0.5))
    expected = plain(same).view(6, 35)
    expected[2:4] = source[0:2].dequantize()
    same[2:4].copy_(source[0:2])
    assert torch.equal(same.blocks.codes, quantize(expected, same).codes)
    # Within one moment, overlapping.
    moment = make(rng, (90,), case)
    expected = plain(moment)
    expected[:60] = expected[20:80].clone()
    moment[:60].copy_(moment[20:80])
    assert torch.equal(
        plain(moment), dequantize_blockwise(quantize_blockwise(expected, moment.blocks.code_map, block_size=32))
    )


def test_a_copy_between_whole_moments_of_one_format_does_not_round(rng):
    """Seen with the signed dynamic map, which does not get its scale back where the largest value is negative."""
    source = QuantizedState.quantize(torch.linspace(-1, 0.5, 70), code_map("dynamic", 8, signed=True), BLOCK_SIZE)
    target = QuantizedState.zeros((70,), source.blocks.code_map, BLOCK_SIZE, source.device)
    assert_same_bits(target.copy_(source), source)
    assert target.copy_(source.dequantize()).blocks.scale[0] < source.blocks.scale[0]


IN_PLACE = {
    "mul_": lambda x: x.mul_(0.3),
    "add_": lambda x: x.add_(torch.linspace(0, 1e-3, 105).view(3, 35)),
    "operator": lambda x: x.__imul__(3.0),
    "lerp_": lambda x: x.lerp_(torch.ones(3, 35), 0.01),
    "addcmul_": lambda x: x.addcmul_(torch.ones(3, 35), torch.ones(3, 35), value=1e-4),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(0.25),
    "clamp_": lambda x: x.clamp_(max=1e-4),
    "foreach": lambda x: torch._foreach_mul_([x], 0.5),
    "foreach lists": lambda x: torch._foreach_add_([x[0], x[2]], [torch.ones(35), torch.zeros(35)]),
    "index put": lambda x: x.__setitem__((torch.tensor([0, 2]), torch.tensor([1, 34])), 1e-2),
    "a part": lambda x: x.__setitem__((slice(None), slice(3, 5)), 1e-2),
    "an element": lambda x: x.__setitem__((1, 1), 1e-2),
    "masked fill": lambda x: x.masked_fill_(torch.arange(105).view(3, 35) % 3 == 0, 2e-3),
    "boolean mask": lambda x: x.__setitem__(torch.arange(105).view(3, 35) % 4 == 0, 2e-3),
    "index_copy_": lambda x: x.index_copy_(0, torch.tensor([1]), torch.full((1, 35), 1e-3)),
    "out": lambda x: torch.add(torch.full((3, 35), 1e-3), 1e-3, out=x),
    "through views": lambda x: x.t().unsqueeze(0)[:, 2:30].mul_(0.1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations_reach_the_codes(name, rng):
    for case in (("float", 8, True), ("power", 4, True)):
        moment = make(rng, (3, 35), case)
        before = moment.blocks.codes.clone()
        expected = plain(moment).view(3, 35)
        IN_PLACE[name](expected)
        IN_PLACE[name](moment)
        rounded = quantize_blockwise(expected.reshape(-1), moment.blocks.code_map, block_size=BLOCK_SIZE)
        assert torch.equal(moment.blocks.codes, rounded.codes)
        assert torch.equal(moment.blocks.scale, rounded.scale)
        changed = not torch.equal(moment.blocks.codes, before)
        assert changed or name in ("mul_", "operator", "foreach")  # only scales change


def test_in_place_operations_return_the_moment(rng):
    moment = make(rng, (70,))
    assert moment.mul_(2) is moment
    assert moment.zero_() is moment
    window = moment[3:5]
    assert window.fill_(1.0) is window
    moment *= 2
    assert type(moment) is QuantizedState


def test_windows_of_one_block_changed_by_one_call_all_count(rng):
    moment = make(rng, (64,), ("linear", 8, True))
    torch._foreach_add_([moment[0:3], moment[5:9], moment[30:40]], 1.0)
    inside = torch.zeros(64, dtype=torch.bool)
    inside[0:3] = inside[5:9] = inside[30:40] = True
    assert ((plain(moment) > 0.9) == inside).all()


def test_operations_that_change_the_shape_in_place_are_refused(rng):
    moment = make(rng, (4, 4))
    before = plain(moment)
    for operation in (lambda x: x.t_(), lambda x: x.unsqueeze_(0), lambda x: x.resize_(3)):
        with pytest.raises(NotImplementedError, match="changes the shape in place; allowed: other operations; fix: "):
            operation(moment)
        assert torch.equal(plain(moment), before)
        assert moment.shape == (4, 4)


OUT_OF_PLACE = {
    "add": lambda x: x + 1,
    "radd": lambda x: torch.ones(6, 35) - x,
    "both": lambda x: x * x.t().t(),
    "matmul": lambda x: x @ torch.ones(35, 2),
    "norm": lambda x: torch.linalg.vector_norm(x),
    "sqrt": lambda x: x.abs().sqrt(),
    "cat": lambda x: torch.cat([x[0], x[1:3].reshape(-1), torch.ones(3)]),
    "stack": lambda x: torch.stack([x, x]),
    "foreach": lambda x: torch.stack(torch._foreach_norm([x, x[1:]])),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "index": lambda x: x[torch.tensor([1, 3])],
    "mask": lambda x: x[x > 0],
    "contiguous": lambda x: x.t().contiguous(),
    "reshape": lambda x: x.t().reshape(-1),
    "flatten of all": lambda x: torch._utils._flatten_dense_tensors([x, x]),
    "float": lambda x: x.double(),
    "isnan": lambda x: x.isnan(),
    "bits": lambda x: x.view(torch.int32),
    "sum": lambda x: x.sum(dim=0),
    "nonzero": lambda x: x.count_nonzero(),
}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_other_operations_compute_on_the_values(name, rng):
    moment = make(rng, (6, 35))
    expected = OUT_OF_PLACE[name](plain(moment).view(6, 35))
    got = OUT_OF_PLACE[name](moment)
    assert type(got) is torch.Tensor
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_values_leave_the_tensor(rng):
    moment = make(rng, (5,))
    assert moment.tolist() == plain(moment).tolist()
    assert moment[2].item() == plain(moment)[2]
    assert np.array_equal(moment.numpy(), plain(moment).numpy())
    assert np.array_equal(np.asarray(moment), plain(moment).numpy())
    assert torch.equal(moment, plain(moment))
    assert torch.equal(plain(moment), moment)
    assert not torch.equal(moment, plain(moment) + 1)
    assert torch.equal(moment, moment.clone())
    assert torch.allclose(moment, plain(moment))


def blocks_of_any_kind(rng, signed):
    """Rows of 32: usual ones, zeros, one value, many magnitudes, and the whole range of scales that stays normal."""
    rows = [rng.normal(size=32) * 10.0 ** rng.uniform(-6, 30) for _ in range(6)]
    rows += [np.zeros(32), np.full(32, rng.normal()), np.exp(4 * rng.normal(size=32)) * rng.choice([-1, 1], 32)]
    rows += [np.where(rng.random(32) < 0.8, 0.0, rng.normal(size=32)), rng.normal(size=32) * 2.0**-40]
    rows.append(rng.normal(size=19))
    values = torch.from_numpy(np.concatenate(rows).astype(np.float32))
    return values if signed else values.abs()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("case", ALL)
def test_what_was_dequantized_gets_its_codes_and_scales_back(case, rounding, rng):
    name, bits, signed = case
    m = code_map(name, bits, signed=signed)
    for _ in range(4):
        values = blocks_of_any_kind(rng, signed)
        key = fold_key(int(rng.integers(2**63))) if rounding == "stochastic" else None
        q = quantize_blockwise(values, m, block_size=BLOCK_SIZE, rounding=rounding, key=key)
        once = dequantize_blockwise(q)
        kept = torch.stack([part.abs().max() for part in once.split(BLOCK_SIZE)]) == q.scale
        if name == "dynamic" and signed:  # it has 1, but not -1
            kept = kept | (torch.stack([part.min() for part in values.split(BLOCK_SIZE)]) != -q.scale)
        elif name == "float" and rounding == "stochastic":  # may move even the largest value, once in 2^16 blocks
            assert kept.sum() >= len(kept) - 1
        else:
            assert kept.all()
        again = quantize_blockwise(once, m, block_size=BLOCK_SIZE)
        assert torch.equal(again.scale[kept], q.scale[kept])
        width = BLOCK_SIZE * bits // 8
        for block, codes in enumerate(q.codes.split(width)):
            assert not kept[block] or torch.equal(again.codes[block * width :][:width], codes)
        moment = QuantizedState(q, (len(values),))
        window = moment[3 : len(values) - 1]
        window.copy_(window.dequantize())
        assert torch.equal(moment.blocks.codes, again.codes)


@pytest.mark.parametrize("case", [case for case in ALL if case[::2] != ("dynamic", True)])
def test_denormal_values_come_back_as_near_as_fp32_has_them(case, rng):
    name, bits, signed = case
    m = code_map(name, bits, signed=signed)
    values = torch.from_numpy((rng.normal(size=320) * 2.0 ** rng.uniform(-125, -60)).astype(np.float32))
    once = dequantize_blockwise(quantize_blockwise(values if signed else values.abs(), m, block_size=BLOCK_SIZE))
    twice = dequantize_blockwise(quantize_blockwise(once, m, block_size=BLOCK_SIZE))
    assert (once.double() - twice.double()).abs().max() <= 2.0**-149


@pytest.mark.parametrize("case", ALL)
def test_nan_blocks_stay_nan_and_alone(case, rng):
    name, bits, signed = case
    values = values_of(rng, (100,), signed).abs()
    values[40] = math.nan
    moment = QuantizedState.quantize(values, code_map(name, bits, signed=signed), BLOCK_SIZE)
    clean = plain(moment)
    assert clean.isnan().tolist() == [32 <= i < 64 for i in range(100)]
    moment.copy_(moment.dequantize())
    assert torch.equal(plain(moment).nan_to_num(7.0), clean.nan_to_num(7.0))
    moment[50:70].mul_(1.0)
    assert plain(moment).isnan().tolist() == [32 <= i < 64 for i in range(100)]
    moment[32:64] = 0.5
    assert torch.equal(plain(moment)[32:64], torch.full((32,), 0.5))
    moment[70] = math.inf
    assert plain(moment).isnan().tolist() == [64 <= i < 96 for i in range(100)]


@pytest.mark.parametrize("case", SOME)
def test_zeros(case, rng):
    name, bits, signed = case
    m = code_map(name, bits, signed=signed)
    for shape, block_size in itertools.product(((), (0,), (3, 0), (1,), (33,), (6, 35)), (32, 64)):
        moment = QuantizedState.zeros(shape, m, block_size, torch.device("cpu"), stream=3)
        like = quantize_blockwise(torch.zeros(shape).reshape(-1), m, block_size=block_size)
        assert moment.blocks.codes.shape == like.codes.shape
        assert moment.blocks.codes.dtype == like.codes.dtype
        assert moment.blocks.scale.shape == like.scale.shape
        assert moment.shape == shape
        assert moment.whole
        assert torch.equal(moment.dequantize(), torch.zeros(shape))
        assert moment.stored_bytes == like.codes.nbytes + like.scale.nbytes
        moment.add_(1.0)
        assert torch.equal(moment.dequantize(), torch.ones(shape))
        assert torch.equal(moment.view(-1)[:1].dequantize(), torch.ones(shape).view(-1)[:1])


def test_shapes_without_elements_or_dimensions(rng):
    scalar, empty = make(rng, ()), make(rng, (0, 3))
    assert scalar.item() == plain(scalar).item()
    assert scalar.view(1).shape == (1,)
    scalar.mul_(2)
    empty.mul_(2)
    assert empty.sum() == 0
    assert empty.view(-1).shape == (0,)
    assert empty[:, 1:].shape == (0, 2)
    assert empty.dequantize().shape == (0, 3)
    window = make(rng, (70,))[70:]
    assert window.mul_(2).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantize_takes_any_layout(dtype, rng):
    values = values_of(rng, (35, 6), True).to(dtype).t().requires_grad_()
    m = code_map("power", 8, signed=True)
    moment = QuantizedState.quantize(values, m, BLOCK_SIZE, stream=4)
    expected = quantize_blockwise(values.detach().float().reshape(-1), m, block_size=BLOCK_SIZE)
    assert torch.equal(moment.blocks.codes, expected.codes)
    assert (moment.shape, moment.stream, moment.requires_grad) == ((6, 35), 4, False)
    again = QuantizedState.quantize(moment, m, BLOCK_SIZE)
    assert torch.equal(again.blocks.codes, expected.codes)


def test_meta_moments_have_sizes_and_no_memory():
    m = code_map("power", 4, signed=True)
    moment = QuantizedState.zeros((10**5, 10**4), m, 128, torch.device("meta"))
    assert moment.stored_bytes == 10**9 // 2 + 10**9 // 128 * 4
    assert moment[3:5].dequantize().shape == (2, 10**4)
    assert moment.detach().clone().blocks.codes.device.type == "meta"


def test_repr_says_what_is_stored(rng):
    moment = make(rng, (6, 35))
    expected = "QuantizedState(shape=(6, 35), 4-bit power, block_size=32, device=cpu)"
    assert repr(moment) == str(moment) == expected
    assert (
        repr(moment[1]) == "QuantizedState(shape=(35,), 4-bit power, block_size=32, device=cpu, window from 35 of 210)"
    )
