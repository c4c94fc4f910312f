import numpy as np
import pytest
import torch

from ds_quant.numerics import code_map, dequantize_blockwise, fold_key, quantize_blockwise
from ds_quant.numerics.adam import adamw_scalars, adamw_step

FORMATS = [None, ("float", 8), ("power", 8), ("power", 4), ("linear", 4), ("dynamic", 8)]
ULP = 2.0**-23


def normal(rng, numel, dtype=torch.float32):
    return torch.from_numpy(rng.normal(size=numel).astype(np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "weight_decay"),
    [(1e-2, (0.9, 0.999), 1e-8, 0.1), (3e-4, (0.95, 0.7), 1e-3, 0.0), (0.1, (0.0, 0.0), 1e-6, 1.0)],
)
def test_32_bit_moments_step_as_torch_does(dtype, lr, betas, eps, weight_decay, rng):
    numel, steps = 300, 6
    ours = normal(rng, numel, dtype)
    exp_avg, exp_avg_sq = torch.zeros(numel), torch.zeros(numel)
    # torch keeps a bf16 parameter's moments in bf16: the comparison is with an fp32 copy, rounded after each step.
    master = torch.nn.Parameter(ours.float())
    theirs = torch.optim.AdamW(
        [master], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=False, foreach=False
    )
    largest_update = 0.0
    for step in range(1, steps + 1):
        grad = normal(rng, numel, dtype)
        before = master.detach().clone()
        ours, exp_avg, exp_avg_sq = adamw_step(
            ours, grad, exp_avg, exp_avg_sq, adamw_scalars(lr, betas, eps, weight_decay, step)
        )
        master.grad = grad.float()
        theirs.step()
        update = (master - before).abs() + lr * weight_decay * before.abs()
        largest_update = max(largest_update, update.max().item())
        # Each moment: three roundings a step, of terms of the moment's size or of (1 - beta) * grad (cancellation in
        # exp_avg leaves an error of the larger terms). The update: about eight more. The parameter: two.
        state = theirs.state[master]
        for got, expected in ((exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"])):
            assert (got - expected).abs().max() <= 4 * ULP * max(1.0, expected.abs().max())
        tolerance = 16 * ULP * largest_update * steps + 2 * ULP * before.abs()
        if dtype != torch.float32:
            tolerance = tolerance + torch.finfo(dtype).eps * before.abs()  # a tie rounded the other way
        assert ours.dtype == dtype
        assert ((ours.float() - master).abs() <= tolerance + torch.finfo(dtype).eps / 2 * master.abs()).all()
        master.data = ours.float()
    assert largest_update > lr / 2


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_moments_are_quantized_after_the_update_has_used_them(first, second, rng):
    numel = 150
    key, sq_key = fold_key(int(rng.integers(2**63))), fold_key(3)
    param, grad = normal(rng, numel), normal(rng, numel)
    values = normal(rng, numel), normal(rng, numel).square()
    stored = [
        value if form is None else quantize_blockwise(value, code_map(*form, signed=signed), block_size=64)
        for value, form, signed in zip(values, (first, second), (True, False), strict=True)
    ]
    plain = [value if form is None else dequantize_blockwise(value) for value, form in zip(stored, (first, second))]  # noqa: B905
    scalars = adamw_scalars(1e-2, (0.9, 0.99), 1e-8, 0.1, 7)
    inputs = [
        param,
        grad,
        *plain,
        *(part for moment in stored if not isinstance(moment, torch.Tensor) for part in moment[:2]),
    ]
    before = [tensor.clone() for tensor in inputs]

    expected_param, *exact = adamw_step(param, grad, *plain, scalars)
    keys = (None, key), (sq_key, None)
    for exp_avg_key, exp_avg_sq_key in keys:
        got_param, *moments = adamw_step(param, grad, *stored, scalars, exp_avg_key, exp_avg_sq_key)
        assert torch.equal(got_param, expected_param)
        for got, value, like, used in zip(moments, exact, stored, (exp_avg_key, exp_avg_sq_key), strict=True):
            if isinstance(like, torch.Tensor):
                assert torch.equal(got, value)
                continue
            rounding = "nearest" if used is None else "stochastic"
            expected = quantize_blockwise(value, like.code_map, block_size=64, rounding=rounding, key=used)
            assert torch.equal(got.codes, expected.codes)
            assert torch.equal(got.scale, expected.scale)
            assert got[2:] == like[2:]
            assert not torch.equal(got.scale, like.scale)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


def test_scalars_by_hand():
    scalars = adamw_scalars(0.1, (0.5, 0.75), 1e-6, 0.25, 2)
    assert scalars.decay == 1 - 0.1 * 0.25
    assert scalars.step_size == pytest.approx(0.1 / 0.75, rel=1e-15)
    assert scalars.correction == pytest.approx((1 - 0.75**2) ** -0.5, rel=1e-15)
    assert scalars[:3] == (0.5, 0.75, 1e-6)


def test_the_first_step_goes_against_the_sign_of_the_gradient(rng):
    """Bias correction cancels at step 1: the update is lr * grad / (|grad| + eps)."""
    param, grad = torch.zeros(100), normal(rng, 100)
    zero = torch.zeros(100)
    got, *_ = adamw_step(param, grad, zero, zero, adamw_scalars(0.5, (0.9, 0.999), 0.0, 0.3, 1))
    assert torch.allclose(got, -0.5 * grad.sign(), rtol=8 * ULP, atol=0)


HUGE = [1e18, 2.0**63, 1e19, 1e20, 3e38, torch.finfo(torch.float32).max]


@pytest.mark.parametrize("form", FORMATS)
def test_huge_finite_gradients_leave_everything_finite(form, rng):
    """Repeated until exp_avg_sq is what the squares add up to; neighbours step as if they were not there."""
    numel, lr, betas = 128, 1e-2, (0.9, 0.95)
    grad = normal(rng, numel)
    grad[3 : 3 + 2 * len(HUGE)] = torch.tensor([sign * value for value in HUGE for sign in (1, -1)])
    is_huge = grad.abs() > 1e17
    start = normal(rng, numel)
    param, ordinary = start, start
    moments = [torch.zeros(numel), torch.zeros(numel)]
    if form is not None:
        moments = [
            quantize_blockwise(zero, code_map(*form, signed=signed), block_size=64)
            for zero, signed in zip(moments, (True, False), strict=True)
        ]
    key = fold_key(5)
    for step in range(1, 101):
        scalars = adamw_scalars(lr, betas, 1e-8, 0.0, step)
        param, *moments = adamw_step(param, grad, *moments, scalars, key, key)
        for moment in moments:
            assert (moment if form is None else dequantize_blockwise(moment)).isfinite().all()
        if step == 1:
            zeros = torch.zeros(numel), torch.zeros(numel)
            ordinary, *_ = adamw_step(start, torch.where(is_huge, 0.0, grad), *zeros, scalars)
            assert torch.equal(param[~is_huge], ordinary[~is_huge])
    # A constant gradient moves by lr a step. Both moments of the largest are at the top code, which is exact; the
    # dynamic map has no -1.
    moved = (start - param)[grad >= 2.0**63] / (100 * lr)
    assert ((moved - 1).abs() < 100 * 8 * ULP).all(), moved


def test_gradients_up_to_9e18_are_not_touched(rng):
    """As without the limit: each moment is one product, correctly rounded, of the gradient or its square."""
    grad = torch.tensor([2.0**63, -(2.0**63), 1e18, -0.0, 0.0, 1e-45, -1e-39, 3.0])
    zero = torch.full_like(grad, -0.0)
    _, first, second = adamw_step(grad, grad, zero, zero, adamw_scalars(0.1, (0.9, 0.95), 1e-8, 0.0, 1))
    assert torch.equal(first.view(torch.int32), (grad * (1 - 0.9)).view(torch.int32))
    assert torch.equal(second, grad * grad * (1 - 0.95))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_stay_visible_in_their_blocks_alone(form, value, rng):
    numel = 192
    param, grad = normal(rng, numel), normal(rng, numel)
    grad[70], grad[5] = value, 1e30
    moments = [torch.zeros(numel), torch.zeros(numel)]
    if form is not None:
        moments = [
            quantize_blockwise(zero, code_map(*form, signed=signed), block_size=64)
            for zero, signed in zip(moments, (True, False), strict=True)
        ]
    scalars = adamw_scalars(1e-2, (0.9, 0.95), 1e-8, 0.0, 1)
    got, *moments = adamw_step(param, grad, *moments, scalars)
    assert got.isnan().nonzero().tolist() == [[70]]
    for moment in moments:
        lost = moment.isnan() if form is None else dequantize_blockwise(moment).isnan()
        assert lost.nonzero().reshape(-1).tolist() == ([70] if form is None else list(range(64, 128)))
