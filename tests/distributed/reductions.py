"""Gradients as DeepSpeed reduces them, quantized and not, in many of its modes.

    deepspeed reductions.py OUTPUT MODES

MODES is a file with one mode a line: `key=value,key=value`. Keys are stage; dtype (fp32, bf16, autocast); accumulation;
experts (the ep_size of a mixture of experts); sequence (ranks a sequence: last of all, since it stays); those of
DeepSpeed's top level in TOP_LEVEL; those of communication.gradient after `gradient.`; others are those of
zero_optimization. For each mode, two engines with the same weights see the same batches: DeepSpeed's own and ours.
Reported are the largest errors of the gradients, in units of the bound that quantization allows; what crossed the wire,
counted at the collectives; and whether the ranks end with the same weights.
"""

import copy
import gc
import hashlib
import json
import sys
from pathlib import Path

import deepspeed
import torch
from common import leave, say, write_report
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups, safe_get_full_grad

import ds_quant
from ds_quant.comm import backend

LEVELS = {8: 127, 4: 7}
TOP_LEVEL = (
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "communication_data_type",
    "zero_force_ds_cpu_optimizer",
)
ROWS = 4
SMALL = 64
"""Elements of a collective that is no gradient's: norms, flags, sizes."""
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_fn")


class Model(torch.nn.Module):
    """Odd sizes, a parameter of one element, and one without a gradient."""

    def __init__(self, with_unused):
        super().__init__()
        self.first = torch.nn.Linear(13, 37)
        self.second = torch.nn.Linear(37, 37, bias=False)
        self.third = torch.nn.Linear(37, 5)
        self.scale = torch.nn.Parameter(torch.ones(1))
        if with_unused:
            self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return (self.third(hidden) * self.scale).float().square().mean()


class Experts(torch.nn.Module):
    """A mixture of four experts; with an ep_size of 2, each rank holds two of them."""

    def __init__(self, ep_size):
        super().__init__()
        self.first = torch.nn.Linear(13, 30)
        self.moe = MoE(30, torch.nn.Linear(30, 30), 4, ep_size, use_rts=False, capacity_factor=4.0)
        self.last = torch.nn.Linear(30, 5)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = hidden + self.moe(hidden)[0]
        return self.last(hidden).float().square().mean()


class Watch:
    """What goes over the wire, counted where it leaves this package and where it reaches DeepSpeed's collectives."""

    def __init__(self):
        self.inside = None
        """Ranks a node, where a hierarchy keeps some messages inside of it."""
        self.begin()
        self.is_on = False
        for name in ("all_to_all", "all_gather"):
            setattr(backend, name, self._counted(name, getattr(backend, name)))
        for name in REDUCTIONS:
            setattr(dist, name, self._noted(name, getattr(dist, name)))

    def begin(self):
        self.sent, self.unquantized, self.is_on = 0, [], True

    def _counted(self, name, original):
        def collective(output, message, *arguments):
            ranks = torch.distributed.get_process_group_ranks(arguments[-1])
            assert message.dtype == torch.uint8
            if not self.inside or ranks[0] // self.inside != ranks[-1] // self.inside:
                copies = 1 if name == "all_to_all" else len(ranks) - 1
                self.sent += message.numel() * copies
            return original(output, message, *arguments)

        return collective

    def _noted(self, name, original):
        def collective(tensor, *arguments, **options):
            if self.is_on and tensor.numel() > SMALL and tensor.is_floating_point():
                self.unquantized.append([name, tensor.numel()])
            return original(tensor, *arguments, **options)

        return collective


def parse(mode):
    settings = {}
    for part in mode.split(","):
        key, _, value = part.partition("=")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value  # a word
    return settings


def config_of(settings):
    settings = dict(settings)
    dtype, stage = settings.pop("dtype", "fp32"), settings.pop("stage")
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": settings.pop("accumulation", 1),
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    for key in ("experts", "sequence"):
        settings.pop(key, None)
    gradient = {"bits": 8, "block_size": 32}
    for key, value in settings.items():
        if key.startswith("gradient."):
            gradient[key.removeprefix("gradient.")] = value
        elif key == "grad_accum_dtype":
            config["data_types"] = {key: value}
        elif key == "check_grad_overflow":
            config["bf16"][key] = value
        elif key in TOP_LEVEL:
            config[key] = value
        else:
            config["zero_optimization"][key] = value
    return config, gradient


def inputs(step, rank, world_size):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS * world_size, 13, generator=generator)[rank::world_size]


def build(settings, quantized):
    config, gradient = config_of(settings)
    ep_size = settings.get("experts")
    torch.manual_seed(dist.get_rank() if ep_size and ep_size > 1 else 0)
    # DeepSpeed's safe_get_full_grad, which bf16 needs here, fails on parameters without a gradient.
    model = Experts(ep_size) if ep_size else Model(settings.get("dtype", "fp32") == "fp32")
    if ep_size and ep_size > 1:
        for name, parameter in model.named_parameters():
            if "expert" not in name:
                dist.broadcast(parameter.data, 0)
    if quantized:
        config["ds_quant"] = {"communication": {"gradient": gradient}}
        config["zero_optimization"]["ds_quant_required"] = True
    mpu = sequence_parallel(settings["sequence"]) if "sequence" in settings else None
    engine, *_ = ds_quant.initialize(
        model=model, model_parameters=model.parameters(), config=copy.deepcopy(config), mpu=mpu
    )
    return engine, gradient


def sequence_parallel(size):
    """DeepSpeed's groups of ranks that share a sequence."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(size)
    return parallel_state_sp


def group_of(parameter):
    """The ranks that reduce a parameter's gradient."""
    if getattr(parameter, "allreduce", True) is False:
        return groups._get_expert_data_parallel_group(parameter.group_name)
    return dist.get_world_group()


def weights_of(engine):
    """fp32 copies by name."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def gradients_of(engine):
    found = {}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter) if engine.zero_optimization_stage() else parameter.grad
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found[name] = torch.zeros(shape) if gradient is None else gradient.float().clone()
    return found


def norms_hooked(engine, norm):
    """Fills in, by name, the norms of this rank's own gradients, summed over the micro steps."""
    found = {name: 0.0 for name, _ in engine.module.named_parameters()}

    def note(name, gradient):
        found[name] += torch.linalg.vector_norm(gradient.float(), norm).item()

    for name, parameter in engine.module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: note(name, gradient))
    return found


def everywhere(value):
    """`value` of every rank."""
    found = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def run_engine(engine, settings, watch, rank, world_size):
    """The reduced gradients of a step by name."""
    # The difference of the weights is the gradient, with SGD and a learning rate of 1. It tells most, where bf16 does
    # not hide it.
    by_weights = settings.get("dtype", "fp32") == "fp32"
    dtype = torch.bfloat16 if settings.get("dtype") == "bf16" else torch.float32
    accumulation = settings.get("accumulation", 1)
    before = weights_of(engine) if by_weights else None
    watch.begin()
    for micro in range(accumulation):
        engine.backward(engine(inputs(micro, rank, world_size).to(dtype)))
        if micro == accumulation - 1 and not by_weights:
            watch.is_on = False
            found = gradients_of(engine)
            watch.is_on = True
        engine.step()
    watch.is_on = False
    if by_weights:
        after = weights_of(engine)
        found = {name: before[name] - after[name] for name in before}
    return found


def bound_of(gradient, settings, group_size, is_all_reduce):
    """How far a quantized mean may be from the full-precision one, for each 1 of the gradients' norm.

    Each rank but the owner sends codes of its share: off by a half of a step, which is the largest of a block divided
    by LEVELS; a whole one where rounding is stochastic. What is gathered of an all-reduce is rounded once more, and its
    largest exceeds the largest share by such an error at most. Residuals add as much to what micro steps send.
    A rotation keeps the euclidean norm of blocks and of their errors, so these norms are compared: the largest of a
    rotated block is at most its norm, and errors of half a step in each of B elements have a norm of sqrt(B) halves.
    """
    if group_size == 1:
        return 0.0
    step = 1.0 / LEVELS[gradient["bits"]] * (1.0 if gradient.get("rounding") == "stochastic" else 0.5)
    if gradient.get("rotation", "none") != "none":
        step *= gradient["block_size"] ** 0.5
    bound = step * (group_size - 1) / group_size
    if is_all_reduce:
        bound += step * (1 + bound)
    if gradient.get("error_feedback") and settings.get("accumulation", 1) > 1:
        bound *= 1 + step
    return bound


def is_all_reduce(engine):
    """Whether the result crosses the wire as well."""
    wrapper = engine.optimizer
    if not hasattr(wrapper, "ipg_buckets"):
        return True  # stage 0 and BF16_Optimizer
    return not wrapper.reduce_scatter or (engine.zero_optimization_stage() < 3 and not wrapper.contiguous_gradients)


def run(mode, watch, rank, world_size):
    settings = parse(mode)
    plain, _ = build(settings, False)
    ours, gradient = build(settings, True)
    watch.inside = gradient.get("hierarchical")
    norm = float("inf") if gradient.get("rotation", "none") == "none" else 2.0
    norms = norms_hooked(plain, norm)
    theirs = run_engine(plain, settings, watch, rank, world_size)
    norms, stock = everywhere(norms), watch.unquantized
    mine = run_engine(ours, settings, watch, rank, world_size)
    traffic = ours.ds_quant_gradients.last_step
    report = {
        "class": type(ours.optimizer).__name__,
        "stock": sum(numel for _, numel in stock),
        "bytes": traffic.sent_bytes,
        "counted": watch.sent,
        "unquantized": watch.unquantized,
        "compression": traffic.compression,
        "relative_error": traffic.relative_error,
        "errors": {},
        "same_weights": True,
    }
    # Two roundings of DeepSpeed's to bf16 where it divides and hands on, and one for each addition.
    is_bf16 = settings.get("dtype", "fp32") != "fp32" or settings.get("communication_data_type") == "bf16"
    rounding = (2 + world_size) * 2.0**-8 if is_bf16 else 1e-5
    divisor = 1 if settings.get("gradient_allreduce_op") == "sum" else world_size
    divisor /= settings.get("sequence", 1)
    weights = weights_of(ours)
    for name, parameter in ours.module.named_parameters():
        members = torch.distributed.get_process_group_ranks(group_of(parameter))
        bound = bound_of(gradient, settings, len(members), is_all_reduce(ours)) + rounding
        size = max(norms[member][name] for member in members) * len(members) / divisor
        error = torch.linalg.vector_norm(theirs[name] - mine[name], norm).item()
        report["errors"][name] = error / (bound * size) if size else float(error > 0) * 1e9
        digests = everywhere(hashlib.sha256(weights[name].contiguous().numpy().tobytes()).hexdigest())
        report["same_weights"] &= len({digests[member] for member in members}) == 1
    for engine in (plain, ours):
        engine.destroy()
    del plain, ours
    gc.collect()
    return report


def main(output, path):
    modes = Path(path).read_text().split()
    deepspeed.init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    watch, report = Watch(), {}
    for mode in modes:
        say(f"rank {rank}: {mode}")
        report[mode] = run(mode, watch, rank, world_size)
    write_report(output, everywhere(report))
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
