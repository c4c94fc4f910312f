"""Optimizers that are not the JSON's, and mixtures of experts.

deepspeed moment_clients.py OUTPUT FOLDER
"""

import sys
import tempfile

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from moment_jobs import (
    LR,
    MORE,
    ROWS,
    TRAINED,
    VOCABULARY,
    WIDTH,
    Job,
    digest,
    each,
    finish,
    observe,
    tiny,
    tokens,
    train,
    write_json,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ds_quant


def schedule(step):
    return 0.5**step


def watched(engine):
    """The learning rates of the basic optimizer's groups inside each step, as they come."""
    seen = []

    def note(optimizer, *_):
        seen.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    engine.basic_optimizer.register_step_pre_hook(note)
    return seen


def groups(model, **options):
    named = dict(model.named_parameters())
    kept = [param for name, param in named.items() if name.startswith("norm")]
    others = [param for name, param in named.items() if not name.startswith("norm")]
    return [{"params": others, **options}, {"params": kept, "weight_decay": 0.0}]


def clients(folder):
    """Every way to pass an optimizer to initialize."""
    cases = {
        "0 object": (Job(0), {}),
        "0 bf16 object": (Job(0, "bf16"), {}),
        "1 object": (Job(1), {}),
        "2 object offload": (Job(2, offload=True), {}),
        "3 object offload": (Job(3, offload=True), {}),
        "3 object exclude": (Job(3, exclude=["norm.*"]), {}),
        "1 callable": (Job(1), {"callable": True}),
        "2 callable offload": (Job(2, offload=True), {"callable": True}),
        "1 object accumulated": (Job(1, "bf16", fp32_accumulation=True), {}),
    }

    def run(name, case):
        job, how = case
        config = job.config(dist.get_world_size())
        del config["optimizer"], config["scheduler"]
        model = tiny()
        if how.get("callable"):
            engine = job.start(model=model, config=config, optimizer=lambda params: torch.optim.AdamW(params, lr=LR))
            seen = watched(engine)
        else:
            optimizer = torch.optim.AdamW(groups(model), lr=LR)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
            engine = job.start(model=model, config=config, optimizer=optimizer, lr_scheduler=scheduler)
            assert engine.basic_optimizer is optimizer, "the scheduler is bound to another object"
            seen = watched(engine)
        report = {"losses": train(engine, 0, TRAINED), "rates": seen} | observe(engine)
        engine.save_checkpoint(f"{folder}/{name}")
        report["more"] = train(engine, TRAINED, TRAINED + MORE)
        engine.destroy()
        return report

    return each(cases, run)


def accelerated(folder):
    """A loop of one's own: torch's AdamW, a torch scheduler, a JSON that names neither."""
    cases = {f"{stage} {dtype}": Job(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")}

    def run(name, job):
        config = job.config(dist.get_world_size())
        for section in ("optimizer", "scheduler", "train_batch_size"):
            del config[section]
        config["gradient_accumulation_steps"] = 1
        # Without an accelerator, accelerate 1.15 takes each rank for the only one unless it is told the backend.
        handlers = [] if torch.accelerator.is_available() else [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=handlers)
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        data = DataLoader([tokens(index, 1)[0] for index in range(24)], batch_size=ROWS // dist.get_world_size())
        model, wrapped, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
        engine = accelerator.deepspeed_engine_wrapped.engine
        seen, losses = watched(engine), []
        for rows in data:
            with accelerator.accumulate(model):
                loss = model(rows)
                accelerator.backward(loss)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
            losses.append(accelerator.gather(loss.detach().float()[None]).mean().item())
        report = {"losses": losses, "rates": seen, "same": engine.basic_optimizer is optimizer} | observe(engine)
        AcceleratorState._reset_state(reset_partial_state=False)
        return report

    return each(cases, run)


class Counting(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        row = tokens(index, 1)[0]
        return {"input_ids": row, "labels": row}


def trainer(folder):
    """Hugging Face's Trainer with an AdamW and a scheduler of its own."""
    from common import tiny_llama_config
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def run(name, job):
        config = job.config(dist.get_world_size())
        for section in ("optimizer", "scheduler"):
            del config[section]
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            deepspeed=config,
            max_steps=4,
            per_device_train_batch_size=ROWS // dist.get_world_size(),
            gradient_accumulation_steps=config["gradient_accumulation_steps"],
            max_grad_norm=config["gradient_clipping"],
            learning_rate=LR,
            lr_scheduler_type="linear",
            warmup_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_llama_config())
        held = Trainer(model=model, args=arguments, train_dataset=Counting())
        rates = []

        class Watch(type(held.callback_handler.callbacks[0])):
            def on_step_begin(self, args, state, control, **kwargs):
                if not rates:
                    rates.append(watched(held.deepspeed))

        held.add_callback(Watch())
        held.train()
        losses = [entry["loss"] for entry in held.state.log_history if "loss" in entry]
        AcceleratorState._reset_state(reset_partial_state=False)
        return {"losses": losses, "rates": rates[0]} | observe(held.deepspeed)

    return each({"1": Job(1), "3": Job(3)}, run)


class Experts(nn.Module):
    """A mixture of four tiny experts between an embedding and a head."""

    def __init__(self, ep_size):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.moe = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), 4, ep_size, use_rts=False, capacity_factor=4.0)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, rows):
        hidden = self.embedding(rows[:, :-1])
        hidden = hidden + self.moe(hidden)[0]
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())


def experts(ep_size):
    def make():
        torch.manual_seed(dist.get_rank() if ep_size > 1 else 0)
        return Experts(ep_size)

    return make


def mixtures(folder):
    cases = {
        f"{stage} {dtype} ep {size} {recipe}": Job(stage, dtype, recipe, model=experts(size))
        for stage, dtype, size, recipe in (
            (1, "bf16", 1, "plain"),
            (1, "bf16", 2, "plain"),
            (2, "bf16", 2, "plain"),
            (0, "bf16", 2, "m4v8"),
            (1, "bf16", 1, "adam8"),
            (1, "bf16", 2, "adam8"),
            (2, "bf16", 1, "adam8"),
            (2, "bf16", 2, "m4v8"),
        )
    }
    for case in ("1 bf16 ep 2 adam8", "2 bf16 ep 1 adam8"):
        job = cases[case]
        excluded = ["embedding.weight", "*expert*.bias"]
        cases[f"{case} exclude"] = Job(job.stage, job.dtype, job.recipe, excluded, model=job.model)

    def run(name, job):
        engine = job.start()
        try:
            report = {"losses": train(engine, 0, TRAINED)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        report |= observe(engine)
        report["groups"] = [
            [group.get("name"), bool(group.get("moe")), group.get("exp_avg") is not None]
            for group in engine.basic_optimizer.param_groups
        ]
        engine.save_checkpoint(f"{folder}/moe {name}")
        report["more"], report["digest_after"] = train(engine, TRAINED, TRAINED + MORE), digest(engine)
        again = job.start()
        again.load_checkpoint(f"{folder}/moe {name}")
        report["digest_loaded"] = digest(again)
        report["resumed"], report["digest_resumed"] = train(again, TRAINED, TRAINED + MORE), digest(again)
        return report

    return each(cases, run)


if __name__ == "__main__":
    output, folder = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    ds_quant.enable()
    parts = (clients, mixtures, accelerated, trainer)
    write_json(output, {part.__name__: part(folder) for part in parts})
    finish()
