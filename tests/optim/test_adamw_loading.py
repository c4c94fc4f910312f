"""QuantAdamW goes on from states of plain AdamW and of other formats, and gives them back."""

import copy
import logging

import pytest
import torch
from adamw_cases import FOUR, NONE, assert_same, moments, parameters, set_grads, through_torch_save, twins

from ds_quant.config import ConfigError
from ds_quant.numerics import dequantize_blockwise, quantize_blockwise
from ds_quant.optim import MOMENTS, QuantAdamW


def adamw_with_state(rng, params, steps=3, **options):
    optimizer = torch.optim.AdamW(params, lr=1e-2, **options)
    for _ in range(steps):
        set_grads(rng, params)
        optimizer.step()
    return optimizer


def fused_adam_state(state):
    """As DeepSpeed's FusedAdam has it: the steps are counted in the group."""
    state = copy.deepcopy(state)
    for one in state["state"].values():
        state["param_groups"][0]["step"] = int(one.pop("step"))
    state["param_groups"][0]["bias_correction"] = True
    return state


def int_steps(state):
    state = copy.deepcopy(state)
    for one in state["state"].values():
        one["step"] = int(one["step"])
    return state


ORIGINS = {
    "plain": ({"fused": False}, lambda state: state),
    "fused": ({"fused": True}, lambda state: state),
    "saved": ({}, through_torch_save),
    "python steps": ({}, int_steps),
    "FusedAdam": ({}, fused_adam_state),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_state_of_a_plain_adamw_is_gone_on_with(origin, rng):
    options, change = ORIGINS[origin]
    theirs = parameters(rng)
    reference = adamw_with_state(rng, theirs, **options)
    ours, quantized = twins(theirs), twins(theirs)
    exact = QuantAdamW(ours, **NONE)
    exact.load_state_dict(change(reference.state_dict()))
    eight = QuantAdamW(quantized, **moments("8/8"))
    eight.load_state_dict(change(reference.state_dict()))
    for param, own in zip(theirs, quantized, strict=True):
        state = eight.state[own]
        assert state["step"].dtype == torch.float32
        assert state["step"] == 3
        for key in MOMENTS:
            moment = state[key]
            expected = quantize_blockwise(
                reference.state[param][key].reshape(-1), moment.blocks.code_map, block_size=256
            )
            assert torch.equal(moment.blocks.codes, expected.codes)
    assert [eight.state[p]["exp_avg"].stream for p in quantized] == list(range(len(quantized)))
    assert eight.param_groups[0]["lr"] == 1e-2
    assert eight.param_groups[0]["exp_avg"]["bits"] == 8
    for step in range(1, 4):
        before = [p.detach().clone() for p in theirs]
        set_grads(rng, theirs, ours, quantized)
        for optimizer in (reference, exact, eight):
            optimizer.step()
        for param, old, left, right in zip(theirs, before, ours, quantized, strict=True):
            assert torch.allclose(param, left, rtol=1e-5, atol=1e-6)
            # A float code of three bits of mantissa is off by 6% at most: a moment's share of the update as well.
            update = (param - old).abs().max()
            assert (param - right).abs().max() < 0.5 * step * update + 1e-6


def test_bf16_moments_of_a_plain_adamw_become_fp32(rng):
    theirs = parameters(rng, dtype=torch.bfloat16)
    reference = adamw_with_state(rng, theirs)
    assert reference.state[theirs[0]]["exp_avg"].dtype == torch.bfloat16
    optimizer = QuantAdamW(twins(theirs), **NONE)
    optimizer.load_state_dict(reference.state_dict())
    for state, expected in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key in MOMENTS:
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], expected[key].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["8/8", "4/4"])
def test_a_plain_adamw_goes_on_with_our_state(name, dtype, rng):
    params = parameters(rng, dtype=dtype)
    optimizer = QuantAdamW(params, lr=1e-2, **moments(name))
    set_grads(rng, params)
    optimizer.step()
    plain = twins(params)
    other = torch.optim.AdamW(plain)
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    for ours, theirs in zip(params, plain, strict=True):
        for key in MOMENTS:
            moment = other.state[theirs][key]
            assert type(moment) is torch.Tensor
            assert moment.dtype == dtype
            assert torch.equal(moment, optimizer.state[ours][key].dequantize().to(dtype))
    set_grads(rng, plain)
    before = [p.detach().clone() for p in plain]
    other.step()
    assert not any(torch.equal(p, b) for p, b in zip(plain[:2], before, strict=False))
    assert other.state[plain[0]]["step"] == 2


def test_another_format_is_requantized_and_said_once(rng, caplog):
    params = parameters(rng)
    optimizer = QuantAdamW(params, lr=1e-2, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    other = QuantAdamW(twins(params), exp_avg=FOUR, exp_avg_sq={"bits": 8, "block_size": 64})
    with caplog.at_level(logging.INFO, logger="ds_quant"):
        other.load_state_dict(optimizer.state_dict())
    assert [r.message for r in caplog.records if "go on" in r.message] == [
        "exp_avg: the loaded moments (8-bit float) go on as 4-bit power"
    ]
    for state, old in zip(other.state.values(), optimizer.state.values(), strict=True):
        for key, size in zip(MOMENTS, (128, 64), strict=True):
            moment = state[key]
            expected = quantize_blockwise(
                dequantize_blockwise(old[key].blocks), moment.blocks.code_map, block_size=size
            )
            assert torch.equal(moment.blocks.codes, expected.codes)
            assert moment.stream == old[key].stream
    # With the same bits and blocks only the map tells.
    power = QuantAdamW(twins(params), **moments("power"))
    power.load_state_dict(optimizer.state_dict())
    assert {state[key].blocks.code_map.name for state in power.state.values() for key in MOMENTS} == {"power"}
    caplog.clear()
    plain = QuantAdamW(twins(params), **NONE)
    with caplog.at_level(logging.INFO, logger="ds_quant"):
        plain.load_state_dict(optimizer.state_dict())
    assert len([r for r in caplog.records if "go on as 32-bit" in r.message]) == 2
    assert all(type(state[key]) is torch.Tensor for state in plain.state.values() for key in MOMENTS)


def test_moments_of_a_plain_adamw_are_quantized_and_said_once(rng, caplog):
    theirs = parameters(rng)
    saved = adamw_with_state(rng, theirs).state_dict()
    optimizer = QuantAdamW(twins(theirs), exp_avg=FOUR, exp_avg_sq=None)
    with caplog.at_level(logging.INFO, logger="ds_quant"):
        for _ in range(2):
            optimizer.load_state_dict(saved)
        optimizer.load_state_dict(optimizer.state_dict())
    assert [r.message for r in caplog.records if "go on" in r.message] == [
        "exp_avg: the loaded 32-bit moments go on as 4-bit power"
    ]


def test_own_options_of_groups_stay_in_force(rng):
    a, b = parameters(rng, ((64,), (64,)))
    optimizer = QuantAdamW([{"params": [a]}, {"params": [b], **NONE}], **moments("8/8"))
    other = QuantAdamW([{"params": twins([a])}, {"params": twins([b]), "exp_avg": FOUR}], **moments("4/4"))
    set_grads(rng, [a, b])
    optimizer.step()
    own = [{name: group[name] for name in MOMENTS} for group in other.param_groups]
    other.load_state_dict(optimizer.state_dict())
    assert [{name: group[name] for name in MOMENTS} for group in other.param_groups] == own
    assert [state["exp_avg"].blocks.code_map.bits for state in other.state.values()] == [4, 4]


def test_streams_stay_apart_where_quantized_and_plain_states_are_loaded_together(rng):
    params = parameters(rng, ((64,),) * 4)
    optimizer = QuantAdamW(params, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    state = optimizer.state_dict()
    for number in (0, 2):
        state["state"][number] = {
            key: value.dequantize() if key in MOMENTS else value for key, value in state["state"][number].items()
        }
    other = QuantAdamW(twins(params), **moments("8/8"))
    other.load_state_dict(state)
    streams = [[one[key].stream for key in MOMENTS] for one in other.state.values()]
    assert streams == [[4, 4], [1, 1], [5, 5], [3, 3]]
    other.add_param_group({"params": parameters(rng, ((64,),))})
    for group in other.param_groups:
        set_grads(rng, group["params"])
    other.step()
    assert [one["exp_avg"].stream for one in other.state.values()] == [4, 1, 5, 3, 6]


def test_what_does_not_fit_is_refused_and_leaves_the_optimizer_as_it_was(rng):
    params = parameters(rng)
    optimizer = QuantAdamW(params, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    before = copy.deepcopy(optimizer)
    wrong = QuantAdamW(parameters(rng, ((7, 33), (299,), (), (4, 3, 5))), lr=0.7, **moments("8/8"))
    set_grads(rng, wrong.param_groups[0]["params"])
    wrong.step()
    broken = optimizer.state_dict()
    broken["state"][1] = {**broken["state"][1], "exp_avg": [1.0]}
    amsgrad = optimizer.state_dict()
    amsgrad["param_groups"][0]["amsgrad"] = True
    message = r"QuantAdamW.state\[exp_avg\]: got {}; allowed: a tensor of the parameter's 300 elements; fix: load "
    for state, got in ((wrong.state_dict(), message.format('"299 elements"')), (broken, message.format('"a list"'))):
        with pytest.raises(ConfigError, match=got):
            optimizer.load_state_dict(state)
        assert_same(optimizer, before)
        assert optimizer.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ConfigError, match=r"QuantAdamW.load_state_dict\(amsgrad\): got true; "):
        optimizer.load_state_dict(amsgrad)
    assert_same(optimizer, before)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(QuantAdamW(params[:2], **NONE).state_dict())
    assert_same(optimizer, before)


def test_a_moment_that_is_found_plain_is_quantized_before_the_step(rng):
    """Universal checkpoints and safe_set_full_optimizer_state leave plain tensors, on any device, of any shape."""
    params = parameters(rng, ((7, 33),))
    optimizer = QuantAdamW(params, **moments("8/8"))
    twin = copy.deepcopy(optimizer)
    set_grads(rng, params, twin.param_groups[0]["params"])
    optimizer.step()
    twin.step()
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].dequantize().reshape(-1)
    state["exp_avg_sq"] = state["exp_avg_sq"].dequantize().t().contiguous().t()
    state["step"] = 1
    optimizer.step()
    twin.step()
    assert_same(optimizer, twin)


def test_a_window_that_is_found_is_made_whole_before_the_step(rng):
    params = parameters(rng, ((8, 8),))
    optimizer = QuantAdamW(params, **moments("8/8"))
    set_grads(rng, params)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = params[0].grad.clone()
    for one, turn in ((optimizer, lambda m: m.t()), (twin, lambda m: m.dequantize().t())):
        state = next(iter(one.state.values()))
        state["exp_avg"] = turn(state["exp_avg"])
        one.step()
        assert state["exp_avg"].whole
    assert_same(optimizer, twin)


def test_a_32_bit_moment_of_another_layout_is_laid_out_as_the_parameter(rng):
    """A plain AdamW keeps the moments of channels_last parameters in that layout."""
    params = parameters(rng, ((6, 8),))
    optimizer = QuantAdamW(params, **NONE)
    set_grads(rng, params)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = params[0].grad.clone()
    state = optimizer.state[params[0]]
    state.update({key: state[key].t().contiguous().t() for key in MOMENTS})
    optimizer.step()
    twin.step()
    assert_same(optimizer, twin)
