"""What no longer has a gradient must come to rest, at most twice as far as with torch's AdamW (docs/moments.md)."""

import pytest
import torch
from convergence.moment_endings import FORMATS, LR, VICTIMS, dying_rows, spike, ways

from ds_quant import QuantAdamW
from ds_quant.optim import QuantizedState


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("case", VICTIMS)
def test_parameters_without_gradients_come_to_rest(case, beta2):
    formats = dict(FORMATS)
    if case is spike:
        del formats["dynamic"]  # bitsandbytes' map of exp_avg_sq has a zero, to which a spike sends its neighbours
    ours, _ = ways(case, (0.9, beta2), formats)
    torchs = ours.pop("torch")
    assert {name: way for name, way in ours.items() if way > 2 * torchs} == {}


def test_a_large_beta1_comes_to_rest_too():
    """0.95 c and 0.98 c are rounded back to c all over the map, not only at its smallest code."""
    for beta1 in (0.95, 0.98):
        ours, _ = ways(dying_rows, (beta1, 0.95), {"8/8": FORMATS["8/8"], "8/32": FORMATS["8/32"]})
        torchs = ours.pop("torch")
        assert {name: way for name, way in ours.items() if way > 2 * torchs} == {}


def test_rounding_to_nearest_does_not():
    """Why it is refused per block; the paper's rows, which have it, must not lose what shows it."""
    nearest = {"bits": 8, "map": "linear", "granularity": "tensor", "rounding": "nearest"}
    ours, _ = ways(dying_rows, (0.9, 0.95), {"nearest": (nearest, None)})
    assert ours["nearest"] > 1000 * ours["torch"]


def test_old_checkpoints_heal():
    """Moments that nearest rounding left at their smallest codes decay once they are loaded."""
    _, optimizers = ways(dying_rows, (0.9, 0.95), {"8/32": FORMATS["8/32"]})
    optimizer = optimizers["8/32"]
    (param,) = optimizer.param_groups[0]["params"]
    state = optimizer.state_dict()
    moment = state["state"][0]["exp_avg"]
    assert type(moment) is QuantizedState
    moment.blocks.codes.view(32, 64)[::4] = 1  # the smallest value above zero, where all of them stuck
    state["param_groups"][0]["exp_avg"]["rounding"] = "nearest"  # as an old group may say
    fresh = QuantAdamW([param], lr=LR, betas=(0.9, 0.95), weight_decay=0.0, exp_avg={"bits": 8}, exp_avg_sq=None)
    fresh.load_state_dict(state)
    for _ in range(200):
        param.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        param.grad[::4] = 0.0
        fresh.step()
    stuck = fresh.state[param]["exp_avg"].dequantize()[::4]
    # A code is left with probability 0.9 a step: of 512, none is after 200 steps (512 * 0.9^200 is 4e-7).
    assert (stuck == 0).all()
