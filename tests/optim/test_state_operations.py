"""Operations on a quantized state, in place and out of place."""

import numpy as np
import pytest
import torch
from quantized_states import BLOCK_SIZE, make, plain

from ds_quant.numerics import quantize_blockwise
from ds_quant.optim.state import QuantizedState

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
