"""Quantized gradients in DistributedDataParallel, on real ranks over gloo.

    torchrun ddp.py OUTPUT              torch's DDP
    torchrun ddp.py OUTPUT accelerate   accelerate's

Writes what each rank found, as JSON, to OUTPUT.RANK; the test looks at it.
"""

import copy
import gc
import io
import json
import os
import sys
from pathlib import Path

import torch
from collectives_definition import LEVELS, bound
from counted_wire import CountedWire
from expectations import same_on_all
from torch import distributed as dist
from torch import nn

from ds_quant.base.errors import ConfigError
from ds_quant.comm import DDPState, ddp_hook

ROWS = 4
STEPS = 24
ULP = 2.0**-8  # of bf16


class Failing(torch.autograd.Function):
    """The identity, until its backward is told to fail."""

    fails = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Failing.fails:
            raise ArithmeticError("told to")
        return gradient


class Model(nn.Module):
    """Layers are used in another order than they are registered in, so that DDP's second buckets are not its first."""

    def __init__(self, with_unused=False):
        super().__init__()
        self.first = nn.Linear(13, 50)
        self.last = nn.Linear(50, 7)
        self.third = nn.Linear(50, 50)
        self.second = nn.Linear(50, 50, bias=False)
        if with_unused:
            self.unused = nn.Linear(50, 20)

    def forward(self, x):
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.third(Failing.apply(hidden)))).float().square().mean()


class Reports:
    def __init__(self):
        self.report = {"checked": 0, "wrong": []}

    def __call__(self, condition, *what):
        self.report["checked"] += 1
        if not condition:
            self.report["wrong"].append(" ".join(map(str, what)))


def inputs(step, rank, dtype=torch.float32):
    return torch.randn(ROWS, 13, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def new_model(**options):
    torch.manual_seed(0)
    return Model(**options)


def wrapped(model, settings, **options):
    """(DDP with several buckets, its state, the parameters' names of every bucket that was reduced)."""
    ddp = nn.parallel.DistributedDataParallel(model, **{"bucket_cap_mb": 0.002, **options})
    state = DDPState(ddp, **settings)
    buckets, reduce = [], state.reduce
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def recorded(bucket):
        buckets.append([names[id(parameter)] for parameter in bucket.parameters()])
        return reduce(bucket)

    state.reduce = recorded
    ddp.register_comm_hook(state, ddp_hook)
    return ddp, state, buckets


def gradients(model):
    return {
        name: parameter.grad.double().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def alone(model, batches):
    """What one rank's gradients are without DDP: the sum over batches."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for batch in batches:
        model(batch).backward()
    return gradients(model)


def check_average(expect, model, of_ranks, settings, *what, ulps=0.0):
    """Within half a step of each share and of the result, for each parameter by itself; blocks mix no parameters."""
    world_size = len(of_ranks)
    found = gradients(model)
    expect(set(of_ranks[0]) <= set(found), "names", *what)
    for name, gradient in found.items():
        shares = [of_rank.get(name, torch.zeros_like(gradient)) for of_rank in of_ranks]
        exact = sum(shares) / world_size
        limit = bound(shares, settings["bits"], settings.get("block_size", 256), True, settings.get("rotation"))
        limit = limit / world_size + ulps * float(sum(share.abs().max() for share in shares))
        error = float((gradient - exact).abs().max())
        expect(error <= limit, "average", name, *what, error, limit)
        if exact.any():
            expect(error > 0, "nothing was quantized", name, *what)


def check_averages(expect, rank, world_size):
    """Averages, equal weights, accumulation, in several modes of DDP."""
    modes = {
        "plain": ({"bits": 8}, {}, {}),
        "4 bits": ({"bits": 4, "block_size": 32}, {}, {}),
        "rotated": ({"bits": 4, "block_size": 64, "rotation": "hadamard"}, {}, {}),
        "stochastic": ({"bits": 8, "rounding": "stochastic"}, {}, {}),
        "unused": ({"bits": 8}, {"find_unused_parameters": True}, {"with_unused": True}),
        "views": ({"bits": 8}, {"gradient_as_bucket_view": True}, {}),
        "one bucket": ({"bits": 8}, {"bucket_cap_mb": 25}, {}),
        "bf16": ({"bits": 8}, {}, {}),
    }
    if world_size == 4:
        modes["two nodes"] = ({"bits": 8, "hierarchical": 2}, {}, {})
    LEVELS[7] = 63
    for mode, (settings, options, of_model) in modes.items():
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        ddp, state, buckets = wrapped(new_model(**of_model).to(dtype), settings, **options)
        # A stochastic step is a whole one: what half a step of 7 bits is at most. bf16 rounds shares, sums and results.
        wide = {**settings, "bits": 7 if mode == "stochastic" else settings["bits"]}
        ulps = 4 * ULP if dtype == torch.bfloat16 else 1e-5
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        for step in range(3):
            batches = [[inputs(10 * step + micro, other, dtype) for micro in range(2)] for other in range(world_size)]
            of_ranks = [alone(ddp.module, some) for some in batches]
            optimizer.zero_grad()
            with ddp.no_sync():
                ddp(batches[rank][0]).backward()
            expect(len(buckets) == 0, "no_sync reduces nothing", mode)
            nodes = state._reducer.nodes
            with CountedWire(nodes and nodes.inside) as wire_:
                ddp(batches[rank][1]).backward()
            traffic = state.traffic()
            expect(traffic.sent_bytes == wire_.bytes > 0, "bytes", mode, traffic, wire_.bytes)
            expect(0 < traffic.relative_error < 0.5 and traffic.compression > 1, "traffic", mode, traffic)
            check_average(expect, ddp.module, of_ranks, wide, mode, step, ulps=ulps)
            # DDP begins with one bucket, unless parameters may stay unused.
            if step and mode != "one bucket":
                expect(len(buckets) >= 3, "buckets", mode, len(buckets))
            elif mode != "unused":
                expect(len(buckets) == 1, "buckets", mode, len(buckets))
            optimizer.step()
            buckets.clear()
            for name, parameter in ddp.module.named_parameters():
                expect(same_on_all(parameter.detach()), "weights differ", mode, name)


def check_feedback(expect, rank, world_size):
    """The same gradient in every step, under another loss scale in each; DDP cuts its buckets anew after the first."""
    loss_scale = [1.0]
    totals = {}
    for error_feedback in (True, False):
        settings = {"bits": 4, "block_size": 32, "error_feedback": error_feedback}
        ddp, state, buckets = wrapped(new_model(), {**settings, "loss_scale": lambda: loss_scale[0]})
        of_ranks = [alone(ddp.module, [inputs(0, other)]) for other in range(world_size)]
        total = {name: torch.zeros_like(value) for name, value in of_ranks[0].items()}
        cuts = []
        for step in range(STEPS):
            loss_scale[0] = float(2 ** (step % 5))
            ddp.zero_grad()
            (ddp(inputs(0, rank)) * loss_scale[0]).backward()
            for name, value in gradients(ddp.module).items():
                total[name] += value / loss_scale[0]
            cuts.append(list(buckets))
            buckets.clear()
        expect(cuts[0] != cuts[1] == cuts[-1], "buckets were not rebuilt", cuts[0], cuts[1])
        errors = {}
        for name, value in total.items():
            shares = [of_rank[name] for of_rank in of_ranks]
            # What is owed in the end: half a step of each share and of the result, as for a single reduction of values
            # that are up to a step larger; and roundings of residuals to bf16, 2^-9 of them in each step.
            limit = bound(shares, 4, 32, True, "none") / world_size * (1 + 2 / LEVELS[4]) * (1 + STEPS * 2**-9)
            errors[name] = float((value - STEPS * sum(shares) / world_size).abs().max()) / limit
        totals[error_feedback] = errors
        if not error_feedback:
            continue
        expect(max(errors.values()) <= 1, "what was owed is lost", errors)
        # An overflow arrives everywhere, and is not owed.
        ddp.zero_grad()
        ddp(inputs(0, rank) * (float("inf") if rank == 1 else 1.0)).backward()
        expect(not ddp.module.first.weight.grad.isfinite().all(), "an overflow is lost")
        residuals = state.state_dict()["residuals"]
        expect(all(residual.isfinite().all() for residual in residuals.values()), "residuals overflow")
        numel = sum(parameter.numel() for parameter in ddp.parameters())
        expect(sum(residual.numel() for residual in residuals.values()) == numel, "residuals of old buckets stay")
    worst = {error_feedback: max(errors.values()) for error_feedback, errors in totals.items()}
    expect(worst[False] > 4 * worst[True], "without error feedback it is as good", worst)


def check_resume(expect, rank):
    """A run that is interrupted, and resumed from files, ends with the same bits. DDP keeps its buckets here
    (find_unused_parameters): other buckets are other pieces, which draw other bits."""
    settings = {"bits": 4, "rounding": "stochastic", "error_feedback": True}

    def train(ddp, steps):
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in steps:
            optimizer.zero_grad()
            ddp(inputs(step, rank)).backward()
            optimizer.step()
        return torch.cat([parameter.detach().reshape(-1) for parameter in ddp.parameters()])

    options = {"find_unused_parameters": True}
    ddp, state, _ = wrapped(new_model(), settings, **options)
    train(ddp, range(3))
    file = io.BytesIO()
    torch.save({"state": state.state_dict(), "model": ddp.module.state_dict()}, file)
    undisturbed = train(ddp, range(3, 6))
    saved = torch.load(io.BytesIO(file.getvalue()))
    expect(saved["state"]["step"] == 3, "step", saved["state"]["step"])
    expect(any(residual.any() for residual in saved["state"]["residuals"].values()), "nothing is owed")
    ends = {}
    for part in ("all", "no residuals", "no step"):
        ddp, state, _ = wrapped(new_model(), settings, **options)
        ddp.module.load_state_dict(saved["model"])
        content = dict(saved["state"])
        content |= {"all": {}, "no residuals": {"residuals": {}}, "no step": {"step": 0}}[part]
        state.load_state_dict(content)
        ends[part] = train(ddp, range(3, 6))
    expect(torch.equal(ends["all"], undisturbed), "resumed", float((ends["all"] - undisturbed).abs().max()))
    for part in ("no residuals", "no step"):
        expect(not torch.equal(ends[part], undisturbed), "the test would not see it", part)
    try:
        state.load_state_dict({**saved["state"], "world_size": 3})
        expect(False, "another number of ranks is not refused")
    except ConfigError as error:
        expect("got the state of one of 3 ranks" in str(error), "message", error)


def check_refusals(expect, rank, world_size):
    """All ranks are told, by the error of the backward, that ranks differ or that the model is another."""

    def refused(settings, expected, model=None, options=None, dtype=torch.float32):
        ddp = nn.parallel.DistributedDataParallel(new_model().to(dtype), **(options or {}))
        try:
            ddp.register_comm_hook(DDPState(model or ddp, **settings), ddp_hook)
            ddp(inputs(0, rank, dtype)).backward()
            expect(False, "not refused", expected)
        except (ConfigError, ValueError) as error:
            expect(expected in str(error), "message", expected, error)
            expect(isinstance(error, ConfigError) or dtype == torch.float64, "type", type(error))

    different = [{"bits": 8 if rank else 4}, {"bits": 8, "block_size": 64 if rank else 128}]
    different += [
        {"bits": 8, "error_feedback": rank == 0},
        {"bits": 8, "rounding": ["nearest", "stochastic"][rank % 2]},
    ]
    if world_size == 4:
        different.append({"bits": 8, "hierarchical": 2 if rank == 1 else False})
    for settings in different:
        refused(settings, "allowed: the same on all ranks")
    refused({"bits": 8}, "fix: DDPState(ddp_model, ...)", model=new_model())
    refused({"bits": 8}, "got gradients in torch.float64", dtype=torch.float64)


def check_failed_backward(expect, rank, world_size):
    """A backward that ends between buckets leaves nothing behind. DDP itself must be made anew after it."""
    settings = {"bits": 8}
    model = new_model()
    ddp, state, buckets = wrapped(model, settings)
    for _ in range(2):  # the first has one bucket
        buckets.clear()
        ddp(inputs(0, rank)).backward()
    whole = len(buckets)
    buckets.clear()
    Failing.fails = True
    try:
        ddp(inputs(1, rank)).backward()
        expect(False, "did not fail")
    except ArithmeticError:
        pass
    Failing.fails = False
    expect(0 < len(buckets) < whole, "it failed between buckets", len(buckets), whole)
    expect(len(state._sent) + len(state._reduced) > 0, "some were under way")
    del ddp  # its hooks go with it
    gc.collect()
    again = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.002)
    again.register_comm_hook(state, ddp_hook)
    for step in range(2, 4):
        again.zero_grad()
        buckets.clear()
        with CountedWire() as wire_:
            again(inputs(step, rank)).backward()
        expect(wire_.calls == 2 * len(buckets), "old buckets go on", wire_.calls, len(buckets))
        of_ranks = [alone(model, [inputs(step, other)]) for other in range(world_size)]
        check_average(expect, model, of_ranks, settings, "after a failed backward", step, ulps=1e-5)
    expect(not state._sent and not state._reduced, "all are through")


def check_accelerate(expect):
    """ddp_kwargs reaches DDP through Accelerator, and its hook is what reduces."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ds_quant.comm import accelerate_ddp, ddp_kwargs

    states = []

    class Recorded(DDPState):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            states.append(self)

    accelerate_ddp.DDPState = Recorded
    try:
        ddp_kwargs({"bits": 3})
        expect(False, "3 bits are not refused")
    except ConfigError as error:
        expect("bits: got 3; allowed: " in str(error), "message", error)
    handlers = [ddp_kwargs({"bits": 8}, find_unused_parameters=True), InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp, optimizer = accelerator.prepare(model, optimizer)
    expect(isinstance(ddp, nn.parallel.DistributedDataParallel), type(ddp))
    expect(ddp.find_unused_parameters, "options")
    expect(len(states) == 1, "states", len(states))
    losses = []
    for step in range(8):
        batches = [inputs(step % 2, other) for other in range(world_size)]
        of_ranks = [alone(ddp.module, [batch]) for batch in batches]
        optimizer.zero_grad()
        with CountedWire() as wire_:
            loss = ddp(batches[rank])
            accelerator.backward(loss)
        traffic = states[0].traffic()
        expect(traffic.sent_bytes == wire_.bytes > 0, "bytes", traffic, wire_.bytes)
        # 9 parameters, the least of 7 elements: scales and padding beside a byte an element.
        expect(traffic.compression > 3.3, "compression", traffic)
        check_average(expect, ddp.module, of_ranks, {"bits": 8}, "accelerate", step, ulps=1e-5)
        optimizer.step()
        losses.append(loss.item())
        for name, parameter in ddp.module.named_parameters():
            expect(same_on_all(parameter.detach()), "weights differ", name)
    expect(losses[-1] < 0.8 * losses[1], "it does not learn", losses)
    return rank


def main(output, mode="torch"):
    expect = Reports()
    if mode == "accelerate":
        rank = check_accelerate(expect)
    else:
        dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        check_averages(expect, rank, world_size)
        check_feedback(expect, rank, world_size)
        check_resume(expect, rank)
        check_failed_backward(expect, rank, world_size)
        check_refusals(expect, rank, world_size)
    Path(f"{output}.{rank}").write_text(json.dumps(expect.report))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group


if __name__ == "__main__":
    main(*sys.argv[1:])
