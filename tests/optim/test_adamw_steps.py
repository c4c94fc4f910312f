"""What a step of QuantAdamW computes, and which random bits it draws."""

import copy
import itertools

import pytest
import torch
from adamw_cases import FORMATS, NONE, assert_same, moments, parameters, run, set_grads, stored, tensor, twins
from torch import nn

from ds_quant.numerics import fold_key, quantize_blockwise
from ds_quant.numerics.adam import adamw_scalars, adamw_step
from ds_quant.numerics.random import derive_key
from ds_quant.optim import MOMENTS, QuantAdamW
from ds_quant.optim.state import QuantizedState

ULP = 2.0**-23


# ---- what a step computes


@pytest.mark.parametrize("options", [{}, {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}])
def test_32_bit_moments_step_as_torch_does(options, rng):
    ours = parameters(rng)
    theirs = twins(ours)
    optimizer = QuantAdamW(ours, **options, **NONE)
    reference = torch.optim.AdamW(theirs, **options, foreach=False, fused=False)
    lr = options.get("lr", 1e-3)
    for step in range(1, 11):
        set_grads(rng, ours, theirs)
        optimizer.step()
        reference.step()
        for left, right in zip(ours, theirs, strict=True):
            # A parameter is rounded a few times a step; an update, of lr or so, about ten times.
            tolerance = step * (3 * ULP * right.abs() + 40 * ULP * lr)
            assert ((left - right).abs() <= tolerance).all()
            for name in MOMENTS:
                moment, expected = optimizer.state[left][name], reference.state[right][name]
                assert moment.dtype == torch.float32
                assert (moment - expected).abs().max() <= 4 * ULP * (1 + expected.abs().max())
            assert optimizer.state[left]["step"] == step


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_is_the_definition(dtype, name, rng):
    """Values, granularity, rounding, keys and streams, on the whole way from the group's options to the codes."""
    params = parameters(rng, dtype=dtype)
    seed, rank = int(rng.integers(2**63)), int(rng.integers(100))
    optimizer = QuantAdamW(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, seed=seed, **moments(name))
    optimizer.rank = rank
    stochastic = [
        moment is not None and moment.get("rounding", "stochastic") == "stochastic" for moment in FORMATS[name]
    ]
    for step in range(1, 4):
        set_grads(rng, params)
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p]) if step > 1 else None) for p in params]
        optimizer.step()
        for stream, (param, (old, state)) in enumerate(zip(params, before, strict=True)):
            now = [optimizer.state[param][key] for key in MOMENTS]
            blocks = [m.blocks if isinstance(m, QuantizedState) else m.reshape(-1) for m in now]
            last = []
            for key, moment in zip(MOMENTS, blocks, strict=True):
                if state is None:
                    value = torch.zeros(param.numel())
                    if not isinstance(moment, torch.Tensor):
                        value = quantize_blockwise(value, moment.code_map, block_size=moment.block_size)
                else:
                    value = state[key].blocks if isinstance(state[key], QuantizedState) else state[key].reshape(-1)
                last.append(value)
            keys = [
                derive_key(fold_key(seed, step, rank=rank), 2 * stream + i) if stochastic[i] else None for i in (0, 1)
            ]
            scalars = adamw_scalars(1e-2, (0.9, 0.99), 1e-8, 0.1, step)
            expected = adamw_step(old.reshape(-1), param.grad.reshape(-1), *last, scalars, *keys)
            # A parameter does not feed back into moments: kernels may be off by roundings there.
            ulp = torch.finfo(dtype).eps
            assert torch.allclose(param.detach().reshape(-1), expected[0], rtol=2 * ulp, atol=1e-2 * ulp)
            for got, want in zip(blocks, expected[1:], strict=True):
                if isinstance(want, torch.Tensor):
                    assert torch.equal(got, want)
                else:
                    assert torch.equal(got.codes, want.codes)
                    assert torch.equal(got.scale, want.scale)


def test_granularities_say_how_many_scales_there_are(rng):
    shapes = ((7, 33), (300,), (), (4, 3, 5))
    for granularity, counts in (("tensor", (1, 1, 1, 1)), ("channel", (7, 1, 1, 4))):
        params = parameters(rng, shapes)
        optimizer = QuantAdamW(
            params, exp_avg={"bits": 8, "map": "linear", "granularity": granularity}, exp_avg_sq=None
        )
        set_grads(rng, params)
        optimizer.step()
        for param, count in zip(params, counts, strict=True):
            assert optimizer.state[param]["exp_avg"].blocks.scale.shape == (count,)
            assert optimizer.state[param]["exp_avg"].shape == param.shape


def regression(rng):
    inputs, true = tensor(rng, 256, 16), tensor(rng, 16, 8)
    targets = inputs @ true + 0.1 * tensor(rng, 256, 8)

    def losses(make, steps=150):
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        optimizer = make(model.parameters())
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    return losses


def test_8_and_4_bits_train_as_adamw_does(rng):
    losses = regression(rng)
    betas = (0.9, 0.99)
    exact = losses(lambda params: torch.optim.AdamW(params, lr=3e-2, betas=betas))
    # The yardstick: the same problem with a learning rate 20% lower.
    slower = losses(lambda params: torch.optim.AdamW(params, lr=2.4e-2, betas=betas))
    allowed = max(abs(a - b) for a, b in zip(exact, slower, strict=True))
    for name in ("8/8", "4/8", "4/4", "dynamic", "power"):
        got = losses(lambda params, name=name: QuantAdamW(params, lr=3e-2, betas=betas, **moments(name)))
        assert 0 < max(abs(a - b) for a, b in zip(exact, got, strict=True)) < allowed, name


def test_a_second_moment_that_moves_less_than_half_a_code_a_step_is_followed_only_by_stochastic_rounding():
    """v falls from 1 towards 0.01 times its block's largest by 1% a step, where codes lie 6% to 12% apart."""
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(torch.zeros(256))
        second = {"bits": 8, "rounding": rounding}
        optimizer = QuantAdamW([param], lr=0.0, betas=(0.9, 0.99), exp_avg=None, exp_avg_sq=second)
        target = torch.full((256,), 0.01)
        target[0] = 1.0
        param.grad = torch.ones(256)
        optimizer.step()
        optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        param.grad = target.sqrt()
        for _ in range(300):
            optimizer.step()
        left = optimizer.state[param]["exp_avg_sq"].dequantize()[1:].mean()
        exact = 0.01 + 0.99 * 0.99**300
        assert left > 0.9 if rounding == "nearest" else abs(left / exact - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_32_bit_moments_of_half_precision_parameters_are_fp32_and_stay_so(dtype, rng):
    params = parameters(rng, dtype=dtype)
    optimizer = QuantAdamW(params, **NONE)
    set_grads(rng, params)
    optimizer.step()
    again = QuantAdamW(twins(params), **NONE)
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        for state in one.state.values():
            assert {state[name].dtype for name in MOMENTS} == {torch.float32}
    assert_same(optimizer, again)


# ---- random bits


def test_replicas_draw_the_same_bits_and_partitions_do_not(rng):
    start = parameters(rng)
    grads = [[tensor(rng, *p.shape) for p in start] for _ in range(3)]
    optimizers = {}
    for name, seed, rank in (("one", 0, 0), ("replica", 0, 0), ("partition", 0, 1), ("seed", 1, 0)):
        params = twins(start)
        optimizers[name] = QuantAdamW(params, seed=seed, **moments("8/8"))
        optimizers[name].rank = rank
        run(optimizers[name], params, grads)
    assert_same(optimizers["one"], optimizers["replica"])
    for name in ("partition", "seed"):
        pairs = zip(stored(optimizers["one"]), stored(optimizers[name]), strict=True)
        # The 0-d parameter is its block's largest value, which is exact.
        assert [torch.equal(a[4], b[4]) for a, b in pairs] == [False, False, True, False]


def test_equal_parameters_draw_different_bits_and_each_step_others(rng):
    value, grad = tensor(rng, 300), tensor(rng, 300)
    params = [nn.Parameter(value.clone()) for _ in range(3)]
    stochastic = {"bits": 8, "rounding": "stochastic"}
    optimizer = QuantAdamW(params, exp_avg=stochastic, exp_avg_sq=stochastic)
    for param in params:
        param.grad = grad
    optimizer.step()
    first = [optimizer.state[p] for p in params]
    for a, b in itertools.combinations(first, 2):
        for key in MOMENTS:
            assert not torch.equal(a[key].blocks.codes, b[key].blocks.codes)
            assert torch.equal(a[key].blocks.scale, b[key].blocks.scale)


def test_thousands_of_small_parameters_equal_each_stepped_alone(rng):
    numel, count = 64, 2000
    values, grads = tensor(rng, count, numel), tensor(rng, 2, count, numel)
    params = [nn.Parameter(row.clone()) for row in values]
    optimizer = QuantAdamW(params, lr=1e-2, **moments("4/8"))
    alone = [nn.Parameter(row.clone()) for row in values]
    single = QuantAdamW(alone, lr=1e-2, **moments("4/8"))
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    # Stepped one by one in the same order, the streams are the same.
    for step in grads:
        for param, grad in zip(alone[:40], step, strict=False):
            param.grad = grad
            single.step()
            param.grad = None
    for left, right in zip(params[:40], alone, strict=False):
        assert torch.equal(left, right)
        for key in MOMENTS:
            a, b = optimizer.state[left][key], single.state[right][key]
            assert a.stream == b.stream
            assert torch.equal(a.blocks.codes, b.blocks.codes)
            assert torch.equal(a.blocks.scale, b.blocks.scale)
