"""Training with weights gathered in few bits and without, side by side.

    deepspeed weights.py OUTPUT CASE ...

A CASE is MODEL:BACKEND:BITS:STAGE:DTYPE and more settings of zero_optimization as `name=value`, with colons between;
the dtype `masters` is bf16 with masters of 24 bits.
Reported are digests of what each of two engines shows after each step, one of DeepSpeed's own gathers and one of ours;
what crossed the wire, counted at the collectives; and what leaves the job of either.
"""

import copy
import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch
from common import digest, forward, leave, remove, say, shared_folder, tiny_llama_config, write_reports
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import ds_quant
from ds_quant.comm import backend
from ds_quant.linear import QuantizedModule

STEPS, ACCUMULATION, ROWS = 4, 2, 3
EARLY = 2
"""Steps before the checkpoint."""


class Odd(torch.nn.Module):
    """Odd sizes, a layer that is shared, one whose weight an embedding has as well, one that is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(96, 13)
        self.first = torch.nn.Linear(13, 37)
        self.again = torch.nn.Linear(37, 37, bias=False)
        self.tied = torch.nn.Linear(37, 37, bias=False)
        self.tied.weight = self.again.weight
        self.frozen = torch.nn.Linear(37, 7)
        self.last = torch.nn.Linear(7, 13)
        self.head = torch.nn.Linear(13, 96, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.frozen.parameters():
            parameter.requires_grad = False

    def forward(self, input_ids, labels):
        hidden = torch.tanh(self.first(self.embedding(input_ids)))
        hidden = torch.tanh(self.again(hidden) + self.tied(hidden))
        logits = self.head(self.last(torch.tanh(self.frozen(hidden))))
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss})


def model_of(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(tiny_llama_config())
    if name == "gpt2":
        sizes = {"n_embd": 36, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return Odd()


def config_of(case, gathered):
    _, backend_name, bits, stage, dtype, *more = case.split(":")
    quantized = {"linear": {"weight": {"bits": int(bits)}, "activation": {"bits": 8}, "backend": backend_name}}
    quantized["linear"]["gradient"] = {"bits": 8, "rounding": "stochastic"}
    quantized["communication"] = {"gradient": {"bits": 8}}
    if case.startswith("odd"):
        quantized["linear"]["exclude"] = []
    if gathered:
        quantized["communication"]["weight"] = {"mode": "codes"} if gathered is True else gathered
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": int(stage)},
        "ds_quant": quantized,
    }
    if dtype in ("bf16", "masters"):
        config["bf16"] = {"enabled": True}
    if dtype == "masters":
        quantized["optimizer"] = {"master": {"bits": 24}}
    if dtype == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    for setting in more:
        name, _, value = setting.partition("=")
        config["zero_optimization"][name] = json.loads(value)
    if "offload_optimizer" in config["zero_optimization"]:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def build(case, gathered):
    model = model_of(case.partition(":")[0])
    # Two groups of parameters, as trainers make them.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    engine, *_ = ds_quant.initialize(model=model, model_parameters=groups, config=config_of(case, gathered))
    return engine


def train(engine, first, last):
    """Of every step what it shows: losses, masters, moments, the norm of the gradients."""
    found = []
    for step in range(first, last):
        losses = []
        for micro in range(ACCUMULATION):
            loss = forward(engine, step * ACCUMULATION + micro, ROWS)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        masters = engine.optimizer.single_partition_of_fp32_groups
        states = engine.basic_optimizer.state
        moments = [states[master][name] for master in masters for name in ("exp_avg", "exp_avg_sq") if states[master]]
        found.append([losses, digest(masters), digest(moments), float(engine.get_global_grad_norm())])
    return found


class Watch:
    """Bytes that this rank sends to gather weights, counted at the collectives."""

    def __init__(self):
        self.sent = self.shared = 0
        self._gather, self._reduce = backend.all_gather_uneven, backend.all_reduce_max
        backend.all_gather_uneven, backend.all_reduce_max = self._counted_gather, self._counted_reduce

    def _counted_gather(self, slots, message, group):
        assert message.dtype == torch.uint8
        self.sent += message.numel() * (len(slots) - 1)
        return self._gather(slots, message, group)

    def _counted_reduce(self, values, group):
        ranks = torch.distributed.get_world_size(group)
        self.shared += 2 * values.nbytes * (ranks - 1) // ranks
        return self._reduce(values, group)

    def take(self):
        found, self.sent, self.shared = (self.sent, self.shared), 0, 0
        return found


def refusal(action):
    """The error of what needs whole weights."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return None


def saved_weights(engine, folder):
    """Digests of what leaves the job, by each way that all ranks go together."""
    engine.save_checkpoint(folder, tag="whole")
    engine.save_16bit_model(folder, "model.bin")
    dist.barrier()
    found = {}
    for name in ("whole/mp_rank_00_model_states.pt", "model.bin"):
        state = torch.load(Path(folder) / name, map_location="cpu", weights_only=False)
        state = state.get("module", state)
        found[name] = digest(state[key] for key in sorted(state))
    return found


def parameters_of(engine):
    return digest(engine.module.parameters())


def evaluated(engine):
    engine.eval()
    with torch.no_grad():
        loss = forward(engine, 1000, ROWS).item()
    engine.train()
    return loss


def run(case, gathered, watch):
    engine = build(case, gathered)
    folder = shared_folder()
    watch.take()
    report = {"early": train(engine, 0, EARLY), "wire": watch.take(), "evaluated": evaluated(engine)}
    part = getattr(engine, "ds_quant_weight_communication", None)
    if part is not None:
        flats = engine.optimizer.bit16_groups_flat
        report["counted"] = part.total.sent_bytes
        report["layout"] = [gather.layout.sent_bytes(dist.get_rank()) for gather in part._gathers]
        report["numel"] = [flat.numel() for flat in flats]
        report["coarse"] = parameters_of(engine)
        model = engine.module
        layer = next(module for module in model.modules() if isinstance(module, QuantizedModule))
        actions = [model.state_dict, layer.state_dict, lambda: copy.deepcopy(model)]
        if dist.get_world_size() > 1:  # one rank could, and would take the weights away from this engine
            actions.append(lambda: ds_quant.initialize(model=model, config=config_of(case, gathered)))
        report["refusals"] = [refusal(action) for action in actions]
    names = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    report["full"] = digest(safe_get_full_fp32_param(parameter) for parameter in names.values())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        report["whole"] = parameters_of(engine)
    engine.module.state_dict()
    report["middle"] = train(engine, EARLY, EARLY + 1)
    report["saved"] = saved_weights(engine, folder)
    engine.gather_weights()
    report["state_dict"] = digest(engine.module.state_dict().values())
    report["late"] = train(engine, EARLY + 1, STEPS)
    dist.barrier()
    fresh = build(case, gathered)
    train(fresh, 0, 1)
    fresh.load_checkpoint(folder, tag="whole")
    report["resumed"] = train(fresh, EARLY + 1, STEPS)
    report["saved again"] = saved_weights(fresh, folder)
    remove(folder)
    return report


def main():
    output, *cases = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    watch, report = Watch(), {}
    for case in cases:
        say(f"rank {dist.get_rank()}: {case}")
        report[case] = {how: run(case, how == "codes", watch) for how in ("none", "codes")}
        gc.collect()
    write_reports(output, report)
    leave()


if __name__ == "__main__":
    main()
