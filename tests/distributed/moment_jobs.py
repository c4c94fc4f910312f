"""What the programs on quantized moments share: jobs on a tiny model of odd sizes, and what is read off an engine."""

import gc
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
from common import say
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import nn

import ds_quant
from ds_quant.base.errors import ConfigError
from ds_quant.optim import MOMENTS
from ds_quant.optim.state import QuantizedState

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
VOCABULARY, WIDTH, HIDDEN, LENGTH = 61, 30, 57, 8
ROWS, ACCUMULATION, LR, CLIPPING = 4, 2, 2e-2, 0.5
"""Rows of a micro batch, over all ranks."""
TRAINED, MORE = 4, 2
"""Steps before a checkpoint, and after it."""
EXCLUDED = ["norm.*", "embedding.weight"]
SUB_GROUP = 3000
"""Elements of a sub-group at stage 3: the model has several."""


class Tiny(nn.Module):
    """7249 elements: neither blocks nor ranks divide them."""

    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens):
        hidden = self.norm(nn.functional.gelu(self.inner(self.embedding(tokens[:, :-1]))))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())


def tiny():
    torch.manual_seed(0)
    return Tiny()


def wider():
    return Tiny(2 * HIDDEN)


def tokens(index, rows):
    """int64 [rows, LENGTH]: sequences that count on, so that there is something to learn."""
    first = torch.randint(0, VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(index))
    return (first + torch.arange(LENGTH)) % VOCABULARY


@dataclass
class Job:
    """One way to train: `recipe` names a file of ds_configs, or is "plain" for AdamW without ds_quant."""

    stage: int = 1
    dtype: str = "fp32"
    recipe: str = "adam8"
    exclude: list[str] = field(default_factory=list)
    offload: bool = False
    fp32_accumulation: bool = False  # BF16_Optimizer
    universal: bool = False
    model: object = tiny

    def config(self, world_size):
        config = ds_quant.resolve_auto(
            CONFIGS / f"{'adam8' if self.recipe == 'plain' else self.recipe}.json",
            world_size=world_size,
            train_micro_batch_size_per_gpu=ROWS // world_size,
            gradient_accumulation_steps=ACCUMULATION,
            gradient_clipping=CLIPPING,
            bf16=self.dtype == "bf16",
            lr=LR,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            warmup_num_steps=2,
            total_num_steps=100,
        )
        stage = config["zero_optimization"]
        stage |= {"stage": self.stage, "sub_group_size": SUB_GROUP}
        if self.offload:
            stage["offload_optimizer"] = {"device": "cpu"}
        if self.fp32_accumulation:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.universal:
            config["checkpoint"] = {"load_universal": True}
        if self.exclude:
            config["ds_quant"]["optimizer"]["exclude"] = self.exclude
        if self.recipe == "plain":
            del config["ds_quant"], stage["ds_quant_required"]
        return config

    def start(self, **arguments):
        """A fresh engine; of stock DeepSpeed where the job is a plain one."""
        model = arguments.pop("model", None) or self.model()
        config = arguments.pop("config", None) or self.config(dist.get_world_size())
        initialize = deepspeed.initialize if self.recipe == "plain" else ds_quant.initialize
        given = {"model_parameters": [param for param in model.parameters() if param.requires_grad], **arguments}
        return initialize(model=model, config=config, **given)[0]


def train(engine, first, last):
    """The mean loss over all ranks of each micro batch of steps `first` to `last` - 1."""
    rank, world_size, losses = dist.get_rank(), dist.get_world_size(), []
    for micro in range(first * ACCUMULATION, last * ACCUMULATION):
        loss = engine(tokens(micro, ROWS)[rank::world_size])
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def plain_step(model, optimizer, step):
    """What a job does in step number `step`, in one process without DeepSpeed; the losses of its micro steps."""
    losses = []
    optimizer.zero_grad()
    for micro in range(ACCUMULATION):
        loss = model(tokens(step * ACCUMULATION + micro, ROWS))
        (loss / ACCUMULATION).backward()
        losses.append(loss.item())
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
    optimizer.step()
    return losses


def gathered(value):
    """`value` of every rank."""
    found = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def shared_folder(make):
    """The folder that rank 0 makes, on all ranks."""
    folders = [str(make()) if dist.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folders)
    return folders[0]


def trained(engine):
    """The tensors that the basic optimizer steps."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is not None:
        return list(partitions)
    return [param for group in engine.basic_optimizer.param_groups for param in group["params"]]


def state_names(engine):
    """Names of the states of the basic optimizer."""
    return tuple(getattr(engine.basic_optimizer, "STATES", MOMENTS))


def digest(engine):
    """Hashes over fp32 weights, codes and scales, and steps, one a rank."""
    bits = hashlib.sha256()
    for param in trained(engine):
        bits.update(param.detach().float().contiguous().numpy().tobytes())
        state = engine.basic_optimizer.state[param]
        bits.update(f"{float(state['step'])}".encode())
        for moment in (state[name] for name in state_names(engine) if name in state):
            quantized = isinstance(moment, QuantizedState)
            for part in (moment.blocks.codes, moment.blocks.scale) if quantized else (moment,):
                bits.update(part.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for param in engine.module.parameters():
        held = getattr(param, "ds_tensor", param)
        bits.update(held.detach().float().contiguous().numpy().tobytes())
    return gathered(bits.hexdigest())


def stored(engine):
    """For each tensor stepped on this rank: its elements, and class and bytes of each moment."""
    rows = []
    for param in trained(engine):
        row = [param.numel()]
        for name in state_names(engine):
            moment = engine.basic_optimizer.state[param].get(name)
            row.append([type(moment).__name__, getattr(moment, "stored_bytes", None) or moment.nbytes])
        rows.append(row)
    return rows


def settable(param):
    # DeepSpeed's own set_full_optimizer_state fails at stage 3 where the ranks do not divide the elements.
    return not hasattr(param, "ds_numel") or param.ds_numel % dist.get_world_size() == 0


def safe_get(engine):
    """Whether DeepSpeed reads the moments as they are; that writing back what was read changes no bit."""
    before, wrong = digest(engine), []
    for name in state_names(engine):
        want = whole_moments(engine, name)
        for key, param in engine.module.named_parameters():
            got = safe_get_full_optimizer_state(param, name)
            if not torch.equal(got, want[key]) or not got.abs().max() > 0 or type(got) is not torch.Tensor:
                wrong.append(f"{key} {name}")
            if settable(param):
                safe_set_full_optimizer_state(param, got, name)
    return {"wrong": wrong, "unchanged": digest(engine) == before}


def refusal(action):
    """The message of the ConfigError that `action` raises; None where it raises none."""
    try:
        action()
    except ConfigError as error:
        return str(error)
    return None


def steps(engine):
    return sorted({float(state["step"]) for state in engine.basic_optimizer.state.values()})


def whole_moments(engine, name):
    """{parameter's name: its whole moment}, put together from all ranks' partitions without DeepSpeed's help."""
    wrapper, world_size = engine.optimizer, dist.get_world_size()
    names = {id(param): name for name, param in engine.module.named_parameters()}

    def everywhere(partition):
        flat = engine.basic_optimizer.state[partition][name]
        flat = flat.dequantize() if isinstance(flat, QuantizedState) else flat
        parts = [torch.empty_like(flat) for _ in range(world_size)]
        dist.all_gather(parts, flat.contiguous())
        return parts

    found = {}
    for number, partition in enumerate(trained(engine)):
        parts, offset = everywhere(partition), 0
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            for param in wrapper.fp16_groups[number]:
                size = -(-param.ds_numel // world_size)
                pieces = torch.cat([part[offset : offset + size] for part in parts])
                found[names[id(param)]] = pieces[: param.ds_numel].view(param.ds_shape)
                offset += size
        else:
            flat = torch.cat(parts)
            for param in (getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups)[number]:
                found[names[id(param)]] = flat[offset : offset + param.numel()].view(param.shape)
                offset += param.numel()
    return found


def observe(engine):
    return {
        "optimizer": type(engine.basic_optimizer).__name__,
        "wrapper": type(engine.optimizer).__name__,
        "ranks": gathered(getattr(engine.basic_optimizer, "rank", None)),
        "stored": gathered(stored(engine)),
        "steps": gathered(steps(engine)),
        "digest": digest(engine),
    }


def write_json(path, report):
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(report))


def each(cases, run):
    """{name: run(name, job)}, one engine after the other."""
    report = {}
    for name, job in cases.items():
        start = time.monotonic()
        report[name] = run(name, job)
        say(f"rank {dist.get_rank()}: {name} took {time.monotonic() - start:.1f} s")
        gc.collect()
    return report


def finish():
    dist.barrier()
    dist.destroy_process_group()
