"""What few bits cost each state of AdEMAMix: a table of docs/results/2026-11-29-optimizer-states.md.

    python tests/convergence/ademamix_states.py     about two minutes

Normal gradients with log-normal row and column scales, with a mean of a tenth of their size (drift) or of 0 (noise).
Printed are relative L2 errors against exact states: of the last update, of the slow moment, and of the whole path.
"""

import torch

from ds_quant import QuantAdEMAMix

EIGHT, FOUR = {"bits": 8}, {"bits": 4}
FORMATS = {
    "8, 32, 8": (EIGHT, None, EIGHT),
    "4, 32, 8": (FOUR, None, EIGHT),
    "32, 8, 32": (None, EIGHT, None),
    "8, 8, 8": (EIGHT, EIGHT, EIGHT),
    "8, 8 power, 8": (EIGHT, {"bits": 8, "map": "power"}, EIGHT),
    "32, 4, 32": (None, FOUR, None),
}
"""exp_avg_fast, exp_avg_slow and exp_avg_sq."""


def errors(drift, beta3, formats=FORMATS, *, steps=3000, shape=(32, 64), seed=0):
    """{format: relative errors of update, slow moment and path}."""
    draws = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(shape[0], 1, generator=draws) + torch.randn(1, shape[1], generator=draws))
    mean = drift * scale * torch.randn(shape, generator=draws)
    exact = (None, None, None)
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name in ("exact", *formats)}
    optimizers = {
        name: made([param], beta3, dict(zip(QuantAdEMAMix.STATES, formats.get(name, exact), strict=True)))
        for name, param in params.items()
    }
    for _ in range(steps):
        grad = mean + scale * torch.randn(shape, generator=draws)
        for name, param in params.items():
            param.grad = grad.clone()
            optimizers[name].step()
    found = {name: results(optimizers[name], param) for name, param in params.items()}
    wanted = found.pop("exact")
    return {
        name: [((value - want).norm() / want.norm()).item() for value, want in zip(got, wanted, strict=True)]
        for name, got in found.items()
    }


def made(params, beta3, states):
    """An optimizer at small rates, whose states can be in any bits: past the check that refuses some."""
    slow = states["exp_avg_slow"]
    allowed = {**states, "exp_avg_slow": slow and {**slow, "bits": 8}}
    optimizer = QuantAdEMAMix(params, lr=1e-3, betas=(0.9, 0.999, beta3), weight_decay=0.0, **allowed)
    if slow and slow["bits"] == 4:
        optimizer.param_groups[0]["exp_avg_slow"] |= {"bits": 4, "map": "power", "block_size": 128}
    return optimizer


def results(optimizer, param):
    """The last update, the slow moment, and the path."""
    fast, slow, square = (
        state if type(state) is torch.Tensor else state.dequantize()
        for state in (optimizer.state[param][name] for name in optimizer.STATES)
    )
    return (fast + 5 * slow) / (square.sqrt() + 1e-8), slow, param.detach()


def main():
    """Print the table."""
    torch.set_num_threads(1)
    for drift in (0.1, 0.0):
        for beta3 in (0.999, 0.9999):
            for name, (update, slow, path) in errors(drift, beta3).items():
                print(f"drift {drift}  beta3 {beta3}  {name:14} {update:6.3f} {slow:6.3f} {path:6.3f}", flush=True)


if __name__ == "__main__":
    main()
