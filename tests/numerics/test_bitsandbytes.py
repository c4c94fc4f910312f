"""States of bitsandbytes: moved here and back."""

import pytest
import torch
from numerics.block_inputs import make_input, spread

from ds_quant.numerics import (
    CodeMap,
    code_map,
    dequantize_blockwise,
    fold_key,
    from_bitsandbytes,
    quantize_blockwise,
    random_bits,
    to_bitsandbytes,
)


def bitsandbytes_optimizer(rng, shape):
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.from_numpy(rng.normal(size=shape)).float())
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3)
    for _ in range(3):
        parameter.grad = torch.from_numpy(rng.normal(size=shape) * 1e-3).float()
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("shape", [(64, 64), (5003,)])
def test_a_bitsandbytes_state_moves_here_and_back(shape, rng):
    from bitsandbytes.functional import dequantize_blockwise as reference

    parameter, optimizer = bitsandbytes_optimizer(rng, shape)
    state = optimizer.state[parameter]
    moments = from_bitsandbytes(state)
    for number, moment in enumerate(moments, start=1):
        expected = reference(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        assert expected.abs().max() > 0
        assert torch.allclose(dequantize_blockwise(moment), expected.reshape(-1), rtol=1e-6, atol=0)
    back = to_bitsandbytes(*moments, parameter.shape)
    for name, tensor in back.items():
        assert tensor.dtype == state[name].dtype
        assert tensor.shape == state[name].shape
        assert torch.allclose(tensor.float(), state[name].float(), rtol=3e-7, atol=0)


def test_bitsandbytes_goes_on_from_our_moments(rng):
    parameter, optimizer = bitsandbytes_optimizer(rng, (4096,))
    twin, other = bitsandbytes_optimizer(rng, (4096,))
    twin.data.copy_(parameter.data)
    state = optimizer.state[parameter]
    ours = [moment._replace(codes=moment.codes.clone()) for moment in from_bitsandbytes(state)]
    other.state[twin].update({name: tensor.clone() for name, tensor in to_bitsandbytes(*ours, twin.shape).items()})
    grad = torch.from_numpy(rng.normal(size=4096) * 1e-3).float()
    for p, o in ((parameter, optimizer), (twin, other)):
        p.grad = grad.clone()
        o.step()
    assert torch.allclose(parameter, twin, rtol=0, atol=1e-6)


def test_our_quantizer_is_close_to_that_of_bitsandbytes(rng):
    import bitsandbytes.functional as bnb

    for signed in (True, False):
        x = make_input(rng, spread, 8192, signed)
        m = code_map("dynamic", 8, signed=signed)
        ours = quantize_blockwise(x, m, block_size=256)
        theirs, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed), blocksize=256)
        assert torch.equal(ours.scale, state.absmax)
        # bitsandbytes on a CPU does not always take the nearest code.
        assert (ours.codes == theirs).float().mean() > 0.4
        difference = dequantize_blockwise(ours) - dequantize_blockwise(ours._replace(codes=theirs))
        assert difference.norm() < 0.02 * x.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state1": torch.zeros(4096)}, r"\(state1\): got torch.float32; allowed: torch.uint8; "),
        ({"qmap2": torch.linspace(0, 1, 256)}, r"\(qmap2\): got another map"),
        ({"qmap1": torch.zeros(16)}, r"\(qmap1\): got another map"),
        ({"absmax2": torch.zeros(17)}, r"\(absmax2\): got shape \(17,\); allowed: \(16,\) "),
    ],
)
def test_a_state_of_another_layout_is_refused(change, message, rng):
    parameter, optimizer = bitsandbytes_optimizer(rng, (4096,))
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes({**optimizer.state[parameter], **change})


def test_only_blocks_of_256_with_the_dynamic_map_go_to_bitsandbytes():
    x = torch.rand(512)
    m, v = (quantize_blockwise(x, code_map("dynamic", 8, signed=signed), block_size=256) for signed in (True, False))
    power = quantize_blockwise(x, code_map("power", 8, signed=False), block_size=256)
    short = quantize_blockwise(x, code_map("dynamic", 8, signed=True), block_size=128)
    with pytest.raises(ValueError, match=r"\(exp_avg_sq\): got CodeMap\(name='power'"):
        to_bitsandbytes(m, power, (512,))
    with pytest.raises(ValueError, match=r"\(exp_avg\): got .* in blocks of 128; allowed: .* in blocks of 256; "):
        to_bitsandbytes(short, v, (512,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, r"\(x\): got torch.float64; allowed: float32, bfloat16, float16; "),
        ({"x": torch.ones(3, 3)}, r"\(x\): got 2 dimensions; allowed: 1; "),
        ({"block_size": 48}, r"\(block_size\): got 48 for 100 elements; allowed: powers of two, and divisors "),
        ({"block_size": 0}, r"\(block_size\): got 0 "),
        ({"block_size": -2}, r"\(block_size\): got -2 "),
        ({"block_size": 64.0}, r"\(block_size\): got 64.0 "),
        ({"block_size": True}, r"\(block_size\): got True "),
        ({"rounding": "up"}, r"\(rounding\): got 'up'; allowed: nearest, stochastic; "),
        ({"rounding": "stochastic"}, r"\(key\): got None; allowed: a key with rounding 'stochastic'; "),
        ({"key": fold_key(0)}, r"\(key\): got a key; allowed: none with rounding 'nearest'"),
        ({"rounding": "stochastic", "key": torch.ones(2)}, r"\(key\): got torch.float32 of shape \(2,\); allowed: "),
        ({"rounding": "stochastic", "key": random_bits(fold_key(0), 3)}, r"\(key\): got torch.int64 of shape \(3,\); "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    arguments = {"x": torch.ones(100), "block_size": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(arguments.pop("x"), CodeMap("power", 8, True, 127, 0, 4), **arguments)
