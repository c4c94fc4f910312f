"""Train with gradients released in the backward and without, go on from a checkpoint, and do what is refused.

release.py OUTPUT FOLDER
"""

import sys

import torch
from common import batch, digest, leave, say, tiny_llama_config, write_reports
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.optim import master
from ds_quant.planning.job import Job, run_job
from ds_quant.planning.ledger import ROLES, Ledger, plain

W8A8 = {"weight": {"bits": 8, "granularity": "channel"}, "activation": {"bits": 8, "granularity": "token"}}
CASES = {
    "AdamW": {
        "type": "AdamW",
        "section": {"exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 8}},
        "bits": 24,
        "zero": {"overlap_comm": True},
        "linear": {**W8A8, "backend": "simulated", "forward_full_precision_from": 3},
    },
    "Lion": {
        "type": "Lion",
        "section": {"exp_avg": {"bits": 8}},
        "bits": 16,
        "checkpointing": True,
        "zero": {"reduce_scatter": False},
    },
    "wire": {
        "type": "AdamW",
        "section": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
        "bits": 24,
        "linear": {**W8A8, "backend": "int8"},
        "wire": {"gradient": {"bits": 8, "error_feedback": True}, "weight": {"mode": "codes"}},
    },
}
STEPS = 2
PART = 1024
"""Elements of a part of the masters, so that this model has many."""
BUCKET = 3000
"""Of DeepSpeed: smaller than some of the parameters, larger than others."""
MEMORY_PART = 1 << 12
"""Of the model whose memory is measured."""
LARGEST = 64 * 128
"""Elements of its largest parameter."""
NAME = "model.layers.0.mlp.up_proj.weight"


def start(case, released, folder=None):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=True))
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(700)))
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1 and parameter.requires_grad]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = {**case["section"], "master": {"bits": case["bits"]}, "release_gradients": released}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "optimizer": {"type": case["type"], "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 8}},
        "zero_optimization": {
            "stage": 2,
            "ds_quant_required": True,
            "reduce_bucket_size": BUCKET,
            **case.get("zero", {}),
        },
        "ds_quant": {"optimizer": optimizer},
    }
    for key, part in (("linear", "linear"), ("wire", "communication")):
        if key in case:
            config["ds_quant"][part] = case[key]
    engine = ds_quant.initialize(model=model, model_parameters=groups, config=config)[0]
    if folder:
        engine.load_checkpoint(folder)
    return engine


def loss_of(engine, index):
    ids = batch(2 * index + dist.get_rank(), 2)
    return engine(input_ids=ids, labels=ids).loss


def train(engine, first, last):
    losses, norms = [], []
    for index in range(first, last):
        loss = loss_of(engine, index)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def state_of(engine):
    """Digests of all that a step writes, bit for bit."""
    optimizer = engine.basic_optimizer
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param] for param in masters]
    return {
        "weights": digest(engine.module.parameters()),
        "masters": digest(part for param in masters for part in plain(param)),
        "states": digest(part for state in states for name in optimizer.STATES for part in plain(state[name])),
        "steps": [state["step"].item() for state in states],
    }


def compare(case, folder):
    """Of a run with gradients released: what differs from one without, and from one that is resumed half-way."""
    expected = start(case, released=False)
    losses, norms = train(expected, 0, 2 * STEPS)
    engine = start(case, released=True)
    half = train(engine, 0, STEPS)
    engine.save_checkpoint(folder)
    rest = train(engine, STEPS, 2 * STEPS)
    resumed = start(case, released=True, folder=folder)
    again = train(resumed, STEPS, 2 * STEPS)
    return {
        "losses": [losses, half[0] + rest[0]],
        "norms": [norms, half[1] + rest[1]],
        "state": [state_of(expected), state_of(engine)],
        "resumed losses": [rest[0], again[0]],
        "resumed state": [state_of(engine), state_of(resumed)],
    }


def not_a_number():
    """States after a step with a NaN in one gradient of one rank, and a step after it; messages about two backwards."""
    found, messages = [], []
    for released in (False, True):
        engine = start(CASES["AdamW"], released)
        train(engine, 0, 1)
        parameter = dict(engine.module.named_parameters())[NAME]
        hook = parameter.register_hook(lambda grad: grad * float("nan") if dist.get_rank() == 0 else grad)
        train(engine, 1, 2)
        hook.remove()
        train(engine, 2, 3)
        found.append((engine.skipped_steps, safe_get_full_fp32_param(parameter).isnan().all().item(), state_of(engine)))
    loss = loss_of(engine, 0)
    engine.backward(loss, retain_graph=True)
    messages.append(error_of(lambda: engine.backward(loss), (RuntimeError, ConfigError)))
    messages.append(error_of(lambda: engine.backward(parameter.float().sum())))
    messages.append(error_of(engine.step))
    return found, messages


def memory_job(world_size, rank):
    """Of many weights, so that no single one is much of the model."""
    optimizer = {"master": {"bits": 24}, "exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 4, "map": "log"}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2, "ds_quant_required": True, "reduce_bucket_size": MEMORY_PART},
        "ds_quant": {"optimizer": {**optimizer, "release_gradients": True}},
    }
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16}
    model = {**tiny_llama_config(**sizes).to_dict(), "model_type": "llama"}
    return Job(config, model, 1, 8, world_size, rank)


def measured():
    """Bytes at the peak of a whole step, of all but activations and with them."""
    ledger = Ledger()
    with ledger:
        outcome = run_job(memory_job(dist.get_world_size(), dist.get_rank()), ledger)
    peak = ledger.peak("begin", "end", [role for role in ROLES if role != "activations"])
    return {
        "parameters": outcome.num_parameters,
        "parts": peak.parts,
        "phase": peak.phase,
        "all bytes": outcome.peak_bytes,
    }


def error_of(action, kind=ConfigError):
    try:
        action()
    except kind as error:
        return str(error)
    return ""


def refused(folder):
    """Messages of what cannot be done between a backward and its step, and after a backward that fails."""
    engine, found = start(CASES["AdamW"], released=True, folder=folder), {}
    parameter = dict(engine.module.named_parameters())[NAME]
    found["step first"] = error_of(engine.step)
    loss = loss_of(engine, STEPS)
    engine.backward(loss, retain_graph=True)
    found["forward"] = error_of(lambda: loss_of(engine, 0))
    found["save"] = error_of(lambda: engine.save_checkpoint(f"{folder}-not"))
    found["gradient"] = error_of(lambda: safe_get_full_grad(parameter))
    group = engine.basic_optimizer.param_groups[0]
    rate, group["lr"] = group["lr"], 1.0
    found["rate"] = error_of(engine.step)
    group["lr"] = rate
    engine.step()  # after all of these, as if nothing had been
    found["after"] = train(engine, STEPS + 1, 2 * STEPS)[0], state_of(engine)

    engine.backward(loss_of(engine, 0))
    engine.load_checkpoint(folder)  # in place of a step
    found["reloaded"] = train(engine, STEPS, 2 * STEPS)[0], state_of(engine)

    def fail(grad):
        raise RuntimeError("out of memory, say")

    # The first layer's gradients are the last to come.
    dict(engine.module.named_parameters())["model.layers.0.input_layernorm.weight"].register_hook(fail)
    loss = loss_of(engine, 0)
    try:
        engine.backward(loss)
    except RuntimeError as error:
        found["failed"] = str(error)
    found["after failure"] = [
        error_of(action)
        for action in (
            engine.step,
            lambda: loss_of(engine, 0),
            lambda: engine.save_checkpoint(f"{folder}-not"),
            lambda: engine.load_checkpoint(folder),
        )
    ]
    return found


def main(output, folder):
    torch.use_deterministic_algorithms(True, warn_only=True)
    master.PART_ELEMENTS = PART
    reports = {}
    for name, case in CASES.items():
        say(name)
        reports[name] = compare(case, f"{folder}/{name}")
    reports["NaN"], reports["twice"] = not_a_number()
    reports["refused"] = refused(f"{folder}/AdamW")
    master.PART_ELEMENTS = MEMORY_PART
    reports["memory"] = measured()
    write_reports(output, reports)
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
