"""Train with Muon in every stage of ZeRO, beside DeepSpeed's own; save, and load in fresh engines.

deepspeed muon_jobs.py OUTPUT FOLDER
"""

import sys
from dataclasses import dataclass, field

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from moment_jobs import MORE, TRAINED, digest, each, finish, gathered, refusal, tiny, train, trained, write_json
from optimizer_jobs import EIGHT, FOUR, OptimizerJob

import ds_quant
from ds_quant.engine.checkpoints import stepped_tensors
from ds_quant.numerics.blockwise import dequantize_blockwise, quantize_blockwise
from ds_quant.numerics.codes import code_map
from ds_quant.numerics.random import derive_words, fold_words

MUON = {
    "type": "Muon",
    "params": {"muon_lr": 0.05, "adam_lr": 2e-2, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-8},
}
MATRICES = ("inner.weight", "head.weight")
MOMENTUM_STREAM = 1 << 60


@dataclass
class MuonJob(OptimizerJob):
    """A job with Muon. `plain`: of stock DeepSpeed. `only_matrices`: what AdamW would step is frozen."""

    optimizer: dict = field(default_factory=lambda: MUON)
    plain: bool = False
    only_matrices: bool = False
    master: int = 0
    wire: bool = False

    def config(self, world_size):
        config = super().config(world_size)
        config["gradient_clipping"] = 0.0  # by the norm of the update, which Muon makes some hundred times as long
        del config["scheduler"]
        config["zero_optimization"]["sub_group_size"] = 1000  # each matrix is one, at stage 3
        if self.stage == 3:
            config["zero_optimization"]["reduce_scatter"] = False
        if self.master:
            config["ds_quant"]["optimizer"]["master"] = {"bits": self.master}
        if self.wire:
            config["ds_quant"]["communication"] = {"gradient": {"bits": 8}}
        if self.plain:
            del config["ds_quant"], config["zero_optimization"]["ds_quant_required"]
        return config

    def start(self, **arguments):
        model = tiny()
        for name, param in model.named_parameters():
            param.requires_grad = not self.only_matrices or name in MATRICES
        initialize = deepspeed.initialize if self.plain else ds_quant.initialize
        params = [param for param in model.parameters() if param.requires_grad]
        config = self.config(dist.get_world_size())
        return initialize(model=model, config=config, model_parameters=params, **arguments)[0]


def momentum(bits, *arguments, **options):
    states = {"momentum_buffer": {"bits": bits}} if bits else {"exp_avg": EIGHT}
    return MuonJob(*arguments, states=states, only_matrices=True, **options)


SAME = {
    "1": momentum(8, 1),
    "2 bf16 4 bits": momentum(4, 2, "bf16"),
    "3 bf16": momentum(8, 3, "bf16"),
    "1 bf16, fp32 gradients": momentum(8, 1, "bf16", fp32_accumulation=True),
    "2 offload 4 bits": momentum(4, 2, offload=True),
    "3 offload": momentum(8, 3, offload=True),
    "1 bf16, momentum not quantized": momentum(None, 1, "bf16"),
}
"""Compared bit for bit with DeepSpeed's Muon."""

ALL = {"momentum_buffer": EIGHT, "exp_avg": EIGHT, "exp_avg_sq": EIGHT}
RESUMED = {
    "1": MuonJob(1, states=ALL),
    "2 bf16 4 bits exclude": MuonJob(
        2, "bf16", states={**ALL, "momentum_buffer": FOUR, "exp_avg": FOUR}, exclude=["norm.*", "inner.weight"]
    ),
    "3 bf16": MuonJob(3, "bf16", states=ALL),
    "2 bf16 master wire": MuonJob(2, "bf16", states=ALL, master=24, wire=True),
    "2 offload": MuonJob(2, states=ALL, offload=True),
}
REFUSED = {
    "stage 0": MuonJob(0, states=ALL),
    "universal": MuonJob(1, states=ALL, universal=True),
    "nesterov": MuonJob(1, states=ALL, optimizer={"type": "Muon", "params": {"lr": 0.01, "nesterov": False}}),
    "momentum": MuonJob(1, states=ALL, optimizer={"type": "Muon", "params": {"momentum": 1.0}}),
    "ns_method": MuonJob(1, states=ALL, optimizer={"type": "Muon", "params": {"ns_method": "qr"}}),
    "state": MuonJob(1, states={"exp_avg_slow": EIGHT}),
}


def quantize_momentums(engine, bits, step):
    """Put DeepSpeed's momentums through codes by the functions that define them, as after step number `step`."""
    stepped = [param for param in trained(engine) if "momentum_buffer" in engine.basic_optimizer.state[param]]
    for stream, param in enumerate(stepped):
        state = engine.basic_optimizer.state[param]
        values = state["momentum_buffer"]
        words = derive_words(fold_words(0, step, rank=1 + dist.get_rank()), MOMENTUM_STREAM + stream)
        blocks = quantize_blockwise(
            values.float(),
            code_map({8: "float", 4: "power"}[bits], bits, signed=True),
            block_size={8: 256, 4: 128}[bits],
            rounding="stochastic",
            key=torch.tensor(words, dtype=torch.int64),
        )
        state["momentum_buffer"].copy_(dequantize_blockwise(blocks))


def momentums(engine):
    """The momentums of this rank as fp32 numbers in gradients' dtype."""
    found = []
    for param in trained(engine):
        value = engine.basic_optimizer.state[param]["momentum_buffer"]
        value = value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "blocks") else value
        found.append(value.float())
    return torch.cat(found)


def weights(engine):
    """Of what this rank steps: masters without the padding of partitions, which nobody initializes at stage 3."""
    if engine.zero_optimization_stage() == 3:
        whole = (safe_get_full_fp32_param(param) for param in engine.module.parameters() if param.requires_grad)
        return torch.cat([param.flatten() for param in whole])
    return torch.cat([param.detach().float().view(-1) for param in trained(engine)])


def compare(folder):
    """{case: our run beside DeepSpeed's}."""
    return each(chosen(SAME), lambda name, job: compare_one(name, job, folder))


def chosen(cases):
    """All of them on several ranks, two on one."""
    return cases if dist.get_world_size() > 1 else {name: cases[name] for name in ("1", "3 bf16")}


def compare_one(name, job, folder):
    """Our run and DeepSpeed's, whose momentum goes through codes after each step."""
    ours = job.start()
    losses = train(ours, 0, TRAINED)
    kept = [type(ours.basic_optimizer.state[param]["momentum_buffer"]).__name__ for param in trained(ours)]
    mine = weights(ours), momentums(ours)
    pending = sum(staged.numel() for staged, _ in getattr(ours.optimizer, "_muon_pending_momentum", {}).values())
    ours.destroy()
    stock = MuonJob(**{**vars(job), "plain": True}).start()
    began, theirs = weights(stock), []
    for step in range(TRAINED):
        theirs += train(stock, step, step + 1)
        before = momentums(stock)
        if "momentum_buffer" in job.states:
            quantize_momentums(stock, job.states["momentum_buffer"]["bits"], step + 1)
    error = (momentums(stock) - before).norm() / before.norm()
    moved = (weights(stock) - began).norm()
    same = torch.equal(weights(stock), mine[0]), torch.equal(momentums(stock).bfloat16(), mine[1].bfloat16())
    report = {"losses": losses, "stock": theirs, "kept": kept, "pending": pending, "moved": moved.item()}
    if name == "1":
        stock.save_checkpoint(f"{folder}/stock")
        report["more"] = train(stock, TRAINED, TRAINED + MORE)
    stock.destroy()
    return report | {"same": gathered(same), "error": error.item()}


def resume(folder):
    """A run that is saved and goes on, and fresh engines that go on from the checkpoint."""

    def run(name, job):
        engine = job.start()
        report = {"losses": train(engine, 0, TRAINED), "stored": gathered(stored_states(engine))}
        report["digest"] = digest(engine)
        engine.save_checkpoint(f"{folder}/{name}")
        report["more"], report["after"] = train(engine, TRAINED, TRAINED + MORE), digest(engine)
        engine.destroy()
        report["resumed"] = go_on(job, f"{folder}/{name}")
        saved = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}", lazy_mode=False)
        report["zero_to_fp32"] = sorted(saved)
        return report

    found = each(chosen(RESUMED), run)
    found["stock"] = go_on(SAME["1"], f"{folder}/stock")
    found["other bits"] = go_on(MuonJob(1, states={**ALL, "momentum_buffer": FOUR}), f"{folder}/1")
    found["unquantized"] = go_on(MuonJob(1, states={"exp_avg": EIGHT, "exp_avg_sq": EIGHT}), f"{folder}/1")
    return found


def go_on(job, folder):
    engine = job.start()
    engine.load_checkpoint(folder)
    report = {"stored": gathered(stored_states(engine)), "digest": digest(engine)}
    report["more"], report["after"] = train(engine, TRAINED, TRAINED + MORE), digest(engine)
    engine.destroy()
    return report


def stored_states(engine):
    """{state: [class, elements]} of each tensor that this rank steps."""
    return [
        {
            name: [type(value).__name__, value.numel()]
            for name, value in engine.basic_optimizer.state[param].items()
            if name != "step"
        }
        for _, param in stepped_tensors(engine)
    ]


if __name__ == "__main__":
    output, folder = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    # DeepSpeed compiles updates, which takes minutes.
    torch.compiler.set_stance("force_eager")
    deepspeed.init_distributed()
    report = {"same": compare(folder), "resumed": resume(folder)}
    report["refused"] = {name: refusal(job.start) for name, job in REFUSED.items()}
    write_json(output, report)
    finish()
