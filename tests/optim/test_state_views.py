"""Views of a quantized state are windows on its codes."""

import pytest
import torch
from quantized_states import ALL, BLOCK_SIZE, SOME, make, plain, quantize, values_of

from ds_quant.numerics import dequantize_blockwise, quantize_blockwise
from ds_quant.numerics.codes import BITS
from ds_quant.optim.state import QuantizedState

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
    untouched = (blocks == 0).repeat_interleave(moment.blocks.code_map.scales)
    assert torch.equal(moment.blocks.scale[untouched], scale[untouched])


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
