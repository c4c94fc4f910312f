"""How far parameters go whose gradients have ended or turned, under Lion, SGD and AdEMAMix: a table of
docs/results/2026-11-29-optimizer-states.md.

    python tests/convergence/optimizer_endings.py     about three minutes

Under Lion every element moves by the learning rate as long as its moment has a sign, with exact moments too. What few
bits can add is a moment that keeps its sign against the gradient: `turned` rows have gradients of the other sign, and
of a thousandth of the size, from the ending on.
"""

import torch
from convergence.moment_endings import AFTER, BEFORE, VICTIMS

from ds_quant import QuantAdEMAMix, QuantLion, QuantSGD

LR, SHAPE = 1e-3, (8, 64)
TURNED = 1500
"""Steps after the turn: gradients of a thousandth overcome an exact moment of Lion after 917, when 0.99^k is 1e-4."""
FORMATS = {
    "8": {"bits": 8},
    "4": {"bits": 4},
    "8 power": {"bits": 8, "map": "power"},
    "8 linear": {"bits": 8, "map": "linear"},
    "8 dynamic": {"bits": 8, "map": "dynamic"},
    "4 linear": {"bits": 4, "map": "linear"},
    "4 dynamic": {"bits": 4, "map": "dynamic"},
}
OPTIMIZERS = {
    "Lion": lambda params, stored: QuantLion(params, lr=LR, betas=(0.9, 0.99), exp_avg=stored),
    "SGD": lambda params, stored: QuantSGD(params, lr=LR, momentum=0.9, momentum_buffer=stored),
    "AdEMAMix": lambda params, stored: QuantAdEMAMix(
        params, lr=LR, betas=(0.9, 0.999, 0.99), weight_decay=0.0, **dict.fromkeys(QuantAdEMAMix.STATES, stored)
    ),
}
MIX_FORMATS = {"8": {"bits": 8}, "8 power": {"bits": 8, "map": "power"}}
"""Of AdEMAMix, whose slow moment takes 8 bits; a map with a zero is not for its second moment."""


def turned(step, gradient):
    """Every fourth row has a mean of 1 first, and of -0.001 from the ending on, with a tenth of that as noise."""
    gradient[::4] = 1 + 0.1 * gradient[::4] if step < 0 else -1e-3 * (1 + 0.1 * gradient[::4])
    return gradient


def ways(name, case, formats, *, shape=SHAPE, before=BEFORE, after=AFTER, nearest=False, seed=0):
    """Mean (absolute, signed) way of the victims after the ending, by format and "exact", in learning rates.

    nearest: round to nearest, past the check that refuses it.
    """
    draws = torch.Generator().manual_seed(seed)
    start = 0.02 * torch.randn(shape, generator=draws)
    params = {key: torch.nn.Parameter(start.clone()) for key in ("exact", *formats)}
    optimizers = {key: OPTIMIZERS[name]([param], formats.get(key)) for key, param in params.items()}
    for key in formats if nearest else ():
        (group,) = optimizers[key].param_groups
        for state in optimizers[key].STATES:
            group[state]["rounding"] = "nearest"
    for step in range(before + after):
        if step == before:
            at_ending = {key: param.detach().clone() for key, param in params.items()}
        gradient = case(step - before, torch.randn(start.shape, generator=draws))
        for key, optimizer in optimizers.items():
            params[key].grad = gradient.clone()
            optimizer.step()
    victims = VICTIMS.get(case, lambda moved: moved[::4])
    moved = {key: victims((param.detach() - at_ending[key]) / LR) for key, param in params.items()}
    return {key: (way.abs().mean().item(), way.mean().item()) for key, way in moved.items()}


def main():
    """Print the table."""
    torch.set_num_threads(1)
    for name in OPTIMIZERS:
        for case in (*VICTIMS, turned):
            for nearest in (True, False):
                formats = MIX_FORMATS if name == "AdEMAMix" else FORMATS
                found = ways(name, case, formats, after=TURNED if case is turned else AFTER, nearest=nearest)
                for key, (way, signed) in found.items():
                    rounding = "nearest" if nearest else "stochastic"
                    print(f"{name:5} {case.__name__:12} {rounding:10} {key:10} {way:12.4g} {signed:12.4g}")


if __name__ == "__main__":
    main()
