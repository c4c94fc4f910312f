"""Training with weights gathered in few bits and without, side by side.

    deepspeed weights.py OUTPUT CASE ...

A CASE is MODEL:BACKEND:BITS:STAGE:DTYPE and more settings of zero_optimization as `name=value`, with colons between;
the dtype `masters` is bf16 with masters of 24 bits, and `hierarchical=value` one of communication.weight.
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
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import ds_quant
from ds_quant.comm import backend
from ds_quant.linear import QuantizedModule, int8, modules, operands

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


class Reader(Odd):
    """Reads the weight of a layer by itself, before the layer does."""

    def forward(self, input_ids, labels):
        size = self.last.weight.detach().float().square().mean()
        output = super().forward(input_ids, labels)
        output.loss = output.loss * (1 + size)
        return output


def model_of(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(tiny_llama_config())
    if name == "gpt2":
        sizes = {"n_embd": 36, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return Reader() if name == "reader" else Odd()


def config_of(case, gathered):
    _, backend_name, bits, stage, dtype, *more = case.split(":")
    quantized = {"linear": {"weight": {"bits": int(bits)}, "activation": {"bits": 8}, "backend": backend_name}}
    quantized["linear"]["gradient"] = {"bits": 8, "rounding": "stochastic"}
    quantized["communication"] = {"gradient": {"bits": 8}}
    if case.startswith(("odd", "reader")):
        quantized["linear"]["exclude"] = []
    if gathered:
        quantized["communication"]["weight"] = {"mode": "codes"} if gathered is True else gathered
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True},
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
        if name != "hierarchical":
            config["zero_optimization"][name] = json.loads(value)
        elif gathered:
            quantized["communication"]["weight"] = {**quantized["communication"]["weight"], name: json.loads(value)}
    for name in ("offload_optimizer", "offload_param"):
        if name in config["zero_optimization"]:
            config["zero_optimization"][name] = {"device": "cpu"}
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


def is_stage3(engine):
    return engine.zero_optimization_partition_weights()


def masters_of(engine):
    optimizer = engine.optimizer
    return optimizer.fp32_partitioned_groups_flat if is_stage3(engine) else optimizer.single_partition_of_fp32_groups


def trained_parts(engine, flats):
    """What a rank has of `flats`, without what stage 3 pads every parameter with and never sets."""
    if not is_stage3(engine):
        yield from flats
        return
    for flat, parameters in zip(flats, engine.optimizer.fp16_groups, strict=True):
        sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            yield part[: max(0, parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.ds_numel)]


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
        masters = masters_of(engine)
        states = engine.basic_optimizer.state
        flats = {name: [states[master][name] for master in masters] for name in ("exp_avg", "exp_avg_sq")}
        moments = [part for name in flats for part in trained_parts(engine, flats[name])]
        norm = float(engine.get_global_grad_norm())
        found.append([losses, digest(trained_parts(engine, masters)), digest(moments), norm])
    return found


def layout_of(part, engine):
    """Bytes of a step, as the layouts have them; of stage 3 those of a fetch of every weight, without whole ones."""
    if not is_stage3(engine):
        return [gather.sent_bytes for gather in part._gathers]
    others = dist.get_world_size() - 1
    return [others * weight.slot_bytes for weight in part._coded.values()]


class Watch:
    """Bytes that this rank sends to gather weights, counted at the collectives; not those within a node."""

    def __init__(self):
        self.node_size = 1
        self.sent = self.shared = self.whole = 0
        self._gather, self._reduce, self._fetch = backend.all_gather_uneven, backend.all_reduce_max, backend.all_gather
        backend.all_gather_uneven, backend.all_reduce_max = self._counted_gather, self._counted_reduce
        backend.all_gather = self._counted_fetch
        self._of_deepspeed, self._of_all = partition_parameters._dist_allgather_fn, dist.all_gather_into_tensor
        partition_parameters._dist_allgather_fn, dist.all_gather_into_tensor = self._counted_whole, self._counted_all

    def watch(self, case):
        """Count for a case from now on."""
        _, _, size = case.partition("hierarchical=")
        self.node_size = int(size or 1)
        self.take()

    def _leaves_node(self, group):
        ranks = torch.distributed.get_process_group_ranks(group)
        return ranks[0] // self.node_size != ranks[-1] // self.node_size

    def _counted_whole(self, part, output, group=None):
        self.whole += output.nbytes - part.nbytes
        return self._of_deepspeed(part, output, group)

    def _counted_all(self, output, part, *args, **kwargs):
        self.whole += output.nbytes - part.nbytes
        return self._of_all(output, part, *args, **kwargs)

    def _counted_fetch(self, output, message, group):
        self.sent += self._leaves_node(group) * (output.nbytes - message.nbytes)
        return self._fetch(output, message, group)

    def _counted_gather(self, slots, message, group):
        assert message.dtype == torch.uint8
        self.sent += self._leaves_node(group) * message.numel() * (len(slots) - 1)
        return self._gather(slots, message, group)

    def _counted_reduce(self, values, group):
        ranks = torch.distributed.get_world_size(group)
        self.shared += self._leaves_node(group) * 2 * values.nbytes * (ranks - 1) // ranks
        return self._reduce(values, group)

    def take(self):
        found = self.sent, self.shared, self.whole
        self.sent = self.shared = self.whole = 0
        return found


class Quantizations:
    """Weights that int8 layers have quantized."""

    def __init__(self):
        self.count = 0
        self._quantize = operands.quantize_weight
        modules.quantize_weight = int8.quantize_weight = self._counted

    def _counted(self, *args, **kwargs):
        self.count += 1
        return self._quantize(*args, **kwargs)

    def take(self):
        found, self.count = self.count, 0
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
    names = ["model.bin"] if is_stage3(engine) else ["whole/mp_rank_00_model_states.pt", "model.bin"]
    for name in names:
        state = torch.load(Path(folder) / name, map_location="cpu", weights_only=False)
        state = state.get("module", state)
        found[name] = digest(state[key] for key in sorted(state))
    if is_stage3(engine):  # whose checkpoints hold masters alone
        state = get_fp32_state_dict_from_zero_checkpoint(folder, tag="whole")
        found["fp32"] = digest(state[key] for key in sorted(state))
    return found


def parameters_of(engine):
    return digest(engine.module.parameters())


def evaluated(engine):
    engine.eval()
    with torch.no_grad():
        loss = forward(engine, 1000, ROWS).item()
    engine.train()
    return loss


def run(case, gathered, watch, quantizations):
    engine = build(case, gathered)
    folder = shared_folder()
    watch.watch(case)
    report = {"early": train(engine, 0, EARLY - 1)}
    quantizations.take()
    report["early"] += train(engine, EARLY - 1, EARLY)
    report |= {"quantized": quantizations.take(), "wire": watch.take(), "evaluated": evaluated(engine)}
    report["layers"] = sum(isinstance(module, QuantizedModule) for module in engine.module.modules())
    part = getattr(engine, "ds_quant_weight_communication", None)
    if part is not None:
        report["counted"] = part.total.sent_bytes
        report["layout"] = layout_of(part, engine)
        if watch.node_size > 1:
            sizes = (watch.node_size, 1)
            layouts = [gather.layout for gather in part._gathers]
            report["levels"] = [sum(layout.sent_bytes(dist.get_rank(), size) for layout in layouts) for size in sizes]
        report["coarse"] = parameters_of(engine)
        model = engine.module
        layer = next(module for module in model.modules() if isinstance(module, QuantizedModule))
        actions = [model.state_dict, layer.state_dict, lambda: copy.deepcopy(model)]
        if is_stage3(engine) and not part.held_in_codes():
            actions = []
        if actions and dist.get_world_size() > 1:  # one rank could, and would take the weights away from this engine
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
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=is_stage3(engine)):
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
    watch, quantizations, report = Watch(), Quantizations(), {}
    for case in cases:
        say(f"rank {dist.get_rank()}: {case}")
        report[case] = {how: run(case, how == "codes", watch, quantizations) for how in ("none", "codes")}
        gc.collect()
    write_reports(output, report)
    leave()


if __name__ == "__main__":
    main()
