"""How far parameters go whose gradients have ended: the table of docs/results/2026-11-28-moment-endings.md.

    python tests/convergence/moment_endings.py     rows of zeros beside active ones, some five minutes

A moment that cannot fall below its smallest code, because its neighbours keep the block's scale up, moves its parameter
on for ever. The measure is the way from the ending on, in units of the learning rate, beside that of torch's AdamW.
"""

import torch

from ds_quant import QuantAdamW

LR, BEFORE, AFTER = 1e-3, 100, 400
FORMATS = {
    "8/8": ({"bits": 8}, {"bits": 8}),
    "8/32": ({"bits": 8}, None),
    "4/8": ({"bits": 4}, {"bits": 8}),
    "4/4": ({"bits": 4}, {"bits": 4}),
    "power": ({"bits": 8, "map": "power"}, {"bits": 8, "map": "power"}),
    "linear/32": ({"bits": 8, "map": "linear"}, None),
    "linear 4/8": ({"bits": 4, "map": "linear"}, {"bits": 8}),
    "dynamic/8": ({"bits": 8, "map": "dynamic"}, {"bits": 8}),
    "dynamic": ({"bits": 8, "map": "dynamic"}, {"bits": 8, "map": "dynamic"}),
    "dynamic 4/8": ({"bits": 4, "map": "dynamic"}, {"bits": 8}),
}


def dying_rows(step, gradient):
    """Every fourth row, which shares its block with three others."""
    if step >= 0:
        gradient[::4] = 0.0
    return gradient


def silent_half(step, gradient):
    """The first half of each block of 256."""
    if step >= 0:
        gradient.view(-1, 256)[:, :128] = 0.0
    return gradient


def rare_rows(step, gradient):
    """An embedding: a row is hit every 1 to 8 steps, and those of its second half never again."""
    hit = step % (torch.arange(len(gradient)) % 8 + 1) == 0
    if step >= 0:
        hit[len(gradient) // 2 :] = False
    return gradient * hit[:, None]


def spike(step, gradient):
    """One row leaps by 1e4 in one step; the victims are the rows beside it."""
    if step == 0:
        gradient[1::4] *= 1e4
    return gradient


VICTIMS = {
    dying_rows: lambda moved: moved[::4],
    silent_half: lambda moved: moved.view(-1, 256)[:, :128],
    rare_rows: lambda moved: moved[len(moved) // 2 :],
    spike: lambda moved: moved.view(-1, 4, moved.shape[1])[:, [0, 2, 3]],
}


def ways(case, betas, formats, *, shape=(32, 64), before=BEFORE, after=AFTER, nearest=False, seed=0):
    """Mean way of the victims after the ending, by format and "torch", in learning rates; and the optimizers.

    nearest: round exp_avg to nearest, past the check that refuses it.
    """
    draws = torch.Generator().manual_seed(seed)
    start = 0.02 * torch.randn(shape, generator=draws)
    params = {name: torch.nn.Parameter(start.clone()) for name in ("torch", *formats)}
    options = {"lr": LR, "betas": betas, "weight_decay": 0.0}
    optimizers = {
        name: QuantAdamW([params[name]], **options, exp_avg=first, exp_avg_sq=second)
        for name, (first, second) in formats.items()
    }
    for optimizer in optimizers.values():
        if nearest:
            optimizer.param_groups[0]["exp_avg"]["rounding"] = "nearest"
    optimizers["torch"] = torch.optim.AdamW([params["torch"]], **options)
    for step in range(before + after):
        if step == before:
            at_ending = {name: param.detach().clone() for name, param in params.items()}
        gradient = case(step - before, torch.randn(start.shape, generator=draws))
        for name, optimizer in optimizers.items():
            params[name].grad = gradient.clone()
            optimizer.step()
    moved = {name: (param.detach() - at_ending[name]).abs() / LR for name, param in params.items()}
    return {name: VICTIMS[case](way).mean().item() for name, way in moved.items()}, optimizers


def main():
    """Print the table."""
    torch.set_num_threads(1)
    for beta2 in (0.95, 0.999):
        for nearest in (True, False):
            found, _ = ways(dying_rows, (0.9, beta2), FORMATS, shape=(64, 64), before=200, after=2800, nearest=nearest)
            for name, way in found.items():
                print(f"beta2 {beta2}  exp_avg {'nearest' if nearest else 'stochastic':10}  {name:12} {way:12.4g}")


if __name__ == "__main__":
    main()
