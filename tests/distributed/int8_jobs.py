"""The int8 backend inside DeepSpeed's engine: what its layers keep of their weights, and for how long.

    deepspeed int8_jobs.py OUTPUT CONFIG

CONFIG is a JSON of W8A8G8; its backend becomes int8. Reported are, of every rank: training with kept codes of the
weights, without any, and with codes that nobody says are stale; edits of the weights in between; what is alive of the
weights at stage 3; gradient checkpointing; and a fresh engine that goes on from a checkpoint.
"""

import gc
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from common import digest, forward, leave, remove, say, shared_folder, tiny_llama_config, write_reports
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

import ds_quant
from ds_quant.engine import weights as zero_weights
from ds_quant.linear import QuantizedModule, int8, modules, weight_codes
from ds_quant.linear.weight_codes import WeightCodes

CASES = ["0:fp32", "0:bf16", "1:fp32", "1:bf16", "2:fp32", "2:bf16", "1:bf16_fp32", "1:offload"]
"""STAGE:DTYPE; bf16_fp32 accumulates the gradients of bf16 in fp32, offload keeps the moments of fp32 on the CPU."""
STAGE3 = ["3:fp32", "3:bf16"]
MEMORY = ["1:fp32", *STAGE3]
CHECKPOINTED = ["1:fp32", "1:bf16", *STAGE3]
ROWS, ACCUMULATION, LR = 5, 2, 1e-2
"""ROWS of 16 tokens: 80 of them, so that no activation has the shape or the size of a weight."""
STEPS, EARLY = 4, 2
"""Steps without an edit; those before the checkpoint."""
PROBE = 1000
"""A batch that no step trains on."""
EDITED = "model.layers.0.mlp.up_proj.weight"


def config_of(path, stage, dtype):
    config = ds_quant.resolve_auto(
        path,
        world_size=dist.get_world_size(),
        train_micro_batch_size_per_gpu=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clipping=1.0,
        bf16=dtype in ("bf16", "bf16_fp32"),
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        warmup_num_steps=2,
        total_num_steps=100,
    )
    del config["scheduler"]  # its first steps would leave the weights as they are
    config["ds_quant"]["linear"]["backend"] = "int8"
    # At stage 3, no layer's weights but its own: none is small enough to stay, or gathered before its turn.
    config["zero_optimization"] |= {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    if dtype == "bf16_fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def build(path, case, reentrant=None):
    """A new engine. `reentrant`: that of gradient checkpointing, or None for none of it."""
    stage, dtype = case.split(":")
    config = config_of(path, int(stage), dtype)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if int(stage) == 3:
        model = model.bfloat16() if dtype == "bf16" else model
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def quantized_layers(engine):
    return [module for module in engine.module.modules() if isinstance(module, QuantizedModule)]


class Counts:
    """Calls since the last `take`: weights quantized in the forward and in the backward, inputs, look-ups of codes."""

    def __init__(self):
        self._counts = {}
        for name, owner, attribute in (
            ("weights", modules, "quantize_weight"),
            ("weights in the backward", int8, "quantize_weight"),
            ("inputs", modules, "quantize_input"),
            ("looked up", WeightCodes, "get"),
        ):
            setattr(owner, attribute, self._counted(name, getattr(owner, attribute)))

    def _counted(self, name, function):
        self._counts[name] = 0

        def counted(*arguments, **options):
            self._counts[name] += 1
            return function(*arguments, **options)

        return counted

    def take(self):
        taken = dict(self._counts)
        self._counts.update(dict.fromkeys(self._counts, 0))
        return taken


def keeping(how):
    """A context: "kept" codes as they are, "none" at all, or "untold" that weights changed."""
    stack = ExitStack()
    if how == "none":
        stack.enter_context(mock.patch.object(WeightCodes, "may_keep", staticmethod(lambda weight: False)))
    if how == "untold":
        for module in (weight_codes, zero_weights):
            stack.enter_context(mock.patch.object(module, "weights_changed"))
    return stack


def weights_digest(engine):
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return digest(parameters)


def micro_batch(engine, index, factor=1.0):
    loss = forward(engine, index, ROWS)
    engine.backward(loss * factor)
    engine.step()
    return loss.item()


def train(engine, first, last):
    """The loss of every micro batch and the weights after every step."""
    losses, weights = [], []
    for step in range(first, last):
        losses += [micro_batch(engine, step * ACCUMULATION + micro) for micro in range(ACCUMULATION)]
        weights.append(weights_digest(engine))
    return {"losses": losses, "weights": weights}


def probe(engine):
    """The loss of a batch, by the module itself: no step, no gradients, but codes are kept as training keeps them."""
    with torch.no_grad():
        return forward(engine.module, PROBE, ROWS).item()


# Weights are edited alike on all ranks: below stage 3 each holds its own copy.


def _load_checkpoint(engine, start):
    engine.load_checkpoint(start["folder"])


def _load_module(engine, start):
    def load(src, dst):  # as DeepSpeed's own steps write, with no trace in a version
        for name, parameter in dst.named_parameters():
            parameter.data.copy_(src[name])

    engine.load_module_state_dict({"module": start["module"]}, custom_load_fn=load)


def _set_fp32(engine, start):
    parameter = engine.module.get_parameter(EDITED)
    value = safe_get_full_fp32_param(parameter)
    if value is None:
        return False  # stage 0 has no such copy, or not where DeepSpeed looks for it
    value = 3.0 * value
    safe_set_full_fp32_param(parameter, value)
    assert torch.equal(safe_get_full_fp32_param(parameter), value)
    return True


def _gathered(engine, start):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        engine.module.get_parameter(EDITED).data.mul_(3.0)


def _in_place(engine, start):
    with torch.no_grad():
        engine.module.get_parameter(EDITED).mul_(3.0)


def _evaluate(engine, start, swap, swap_back):
    """Losses of an evaluation before the swap, of other weights, and after it."""
    parameter = engine.module.get_parameter(EDITED)
    engine.eval()
    losses = [probe(engine)]
    own = swap(parameter)
    losses.append(probe(engine))
    swap_back(parameter, own)
    losses.append(probe(engine))
    engine.train()
    return losses


def _evaluate_copies(engine, start):
    def swap(parameter):
        own = parameter.data.clone()
        parameter.data.copy_(-own)
        return own

    return _evaluate(engine, start, swap, lambda parameter, own: parameter.data.copy_(own))


def _evaluate_others(engine, start):
    def swap(parameter):
        own, parameter.data = parameter.data, -parameter.data
        return own

    return _evaluate(engine, start, swap, lambda parameter, own: setattr(parameter, "data", own))


EDITS = {
    "load_checkpoint": _load_checkpoint,
    "load_module_state_dict": _load_module,
    "safe_set_full_fp32_param": _set_fp32,
    "GatheredParameters": _gathered,
    "in place": _in_place,
    "evaluation of copies": _evaluate_copies,
    "evaluation of others": _evaluate_others,
}


def edited(engine, name, start, counts):
    """One edit, after codes were made of the weights that it replaces. A checkpoint is loaded between two steps, all
    else happens between two micro batches of one."""
    index = 100 + 10 * list(EDITS).index(name)
    losses = []
    if name != "load_checkpoint":
        losses.append(micro_batch(engine, index))
    before, norm = probe(engine), engine.module.get_parameter(EDITED).detach().float().norm().item()
    counts.take()
    result = EDITS[name](engine, start)
    taken = counts.take()
    after = probe(engine)
    report = {"before": before, "after": after, "result": result, "counts": taken, "counts after": counts.take()}
    if name == "load_checkpoint":
        return report | train(engine, EARLY, STEPS)
    losses.append(micro_batch(engine, index + 1))
    weights = [weights_digest(engine)]
    report["norms"] = [norm, engine.module.get_parameter(EDITED).detach().float().norm().item()]
    more = train(engine, index + 2, index + 3)
    return report | {"losses": losses + more["losses"], "weights": weights + more["weights"]}


def skipped(engine):
    """A step that DeepSpeed skips, since a gradient is infinite."""
    before, weights = engine.skipped_steps, [weights_digest(engine)]
    losses = [micro_batch(engine, 500), micro_batch(engine, 501, factor=float("inf"))]
    weights.append(weights_digest(engine))
    report = {"skipped": engine.skipped_steps - before}
    more = train(engine, 251, 253)
    return report | {"losses": losses + more["losses"], "weights": weights + more["weights"]}


def run_case(path, case, how, counts):
    with keeping(how):
        engine = build(path, case)
        layers = quantized_layers(engine)
        folder = shared_folder()
        counts.take()
        versions = [layer.weight._version for layer in layers]
        early = train(engine, 0, EARLY)
        version_moved = [layer.weight._version != version for layer, version in zip(layers, versions, strict=True)]
        start = {"folder": folder}
        if how != "untold":
            engine.save_checkpoint(folder)
            start["module"] = {name: value.clone() for name, value in engine.module.state_dict().items()}
        late = train(engine, EARLY, STEPS)
        report = {
            "layers": len(layers),
            "optimizer": type(engine.optimizer).__name__,
            "counts": counts.take(),
            "version_moved": version_moved,
            "losses": early["losses"] + late["losses"],
            "weights": early["weights"] + late["weights"],
        }
        if how != "untold":
            report["edits"] = {name: edited(engine, name, start, counts) for name in EDITS}
            if "bf16" in case:
                report["edits"]["skipped step"] = skipped(engine)
        remove(folder)
        engine.destroy()
    return report


class Live(TorchDispatchMode):
    """The most elements alive at once: of codes of weights' shapes, of others of these shapes, and of `weights`."""

    def __init__(self, weights, shapes):
        super().__init__()
        self._weights, self._shapes = weights, shapes
        self.begin()

    def begin(self):
        self._storages = {"codes": set(), "others": set()}
        self._most = {"codes": 0, "others": 0, "gathered": 0}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self._shapes:
                storage = StorageWeakRef(tensor.untyped_storage())
                kind = "codes" if tensor.dtype == torch.int8 else "others"
                self._storages[kind].add((storage, tensor.numel()))
        for kind, storages in self._storages.items():
            storages -= {entry for entry in storages if entry[0].expired()}
            self._note(kind, sum(numel for _, numel in storages))
        self._note("gathered", sum(weight.numel() for weight in self._weights))
        return result

    def _note(self, kind, numel):
        self._most[kind] = max(self._most[kind], numel)

    def end(self):
        return self._most


def alive(shapes):
    """[shape, dtype] of each tensor of these shapes that was made since gc.freeze(), wherever it is."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors if tuple(tensor.shape) in shapes]


def held(loss, numels):
    """[what, dtype] of each tensor of these sizes that the graph of `loss` holds for its backward."""
    found, seen, nodes = [], set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        things = {name: getattr(node, name) for name in dir(node) if name.startswith("_saved")}
        things |= {"saved_tensors": getattr(node, "saved_tensors", ()), **getattr(node, "__dict__", {})}
        for name, thing in things.items():
            for tensor in tree_leaves(thing):
                if isinstance(tensor, torch.Tensor) and tensor.numel() in numels:
                    found.append([f"{node.name()}.{name}", str(tensor.dtype)])
    return found


def watch_memory(path, case):
    """What is alive of the weights during and after a forward."""
    engine = build(path, case)
    # Under ZeRO-3 a Parameter's own shape tells whether it is gathered.
    matrices = [parameter for parameter in engine.module.parameters() if len(_shape(parameter)) == 2]
    shapes = {shape for p in matrices for shape in (_shape(p), _shape(p)[::-1])}
    numels = {rows * columns for rows, columns in shapes}
    layers = quantized_layers(engine)
    # Looked up once: during a forward, DeepSpeed gathers what is looked up in a module.
    weights = {layer: layer.weight for layer in layers}
    report = {
        "largest": max(numels),
        "largest quantized": max(torch.Size(_shape(weight)).numel() for weight in weights.values()),
        "layers": [],
        "steps": [],
    }

    def look(layer, inputs, output):
        gathered = sum(parameter.numel() for parameter in matrices)
        report["layers"].append({"alive": alive(shapes), "weight": weights[layer].numel(), "gathered": gathered})

    def pack(tensor):
        if tensor.numel() in numels:
            report["packed"].append(any(tensor.data_ptr() == parameter.data_ptr() for parameter in matrices))
        return tensor

    gc.collect()
    gc.freeze()
    handles = [layer.register_forward_hook(look) for layer in layers]
    loss = forward(engine, 0, ROWS)
    for handle in handles:
        handle.remove()
    report["after"] = {
        "alive": alive(shapes),
        "gathered": [parameter.numel() for parameter in engine.module.parameters()],
        "held": held(loss, numels),
        "kept": sum(layer._weight_codes._codes is not None for layer in layers),
    }
    gc.unfreeze()
    engine.backward(loss)
    engine.step()
    report["packed"] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(engine, 1, ROWS)
    engine.backward(loss)
    engine.step()
    del loss
    with Live(matrices, shapes) as live:
        for micro in range(ACCUMULATION):
            live.begin()
            loss = forward(engine, micro, ROWS)
            in_forward = live.end()
            live.begin()
            engine.backward(loss)
            report["steps"].append({"forward": in_forward, "backward": live.end()})
            engine.step()
            del loss
    engine.destroy()
    return report


def _shape(parameter):
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def resume(path, case, counts):
    """Train, save, train on; the same from a fresh engine."""
    engine = build(path, case)
    folder = shared_folder()
    counts.take()
    early = train(engine, 0, EARLY)
    engine.save_checkpoint(folder)
    late = train(engine, EARLY, STEPS)
    taken = counts.take()
    kept = sum(layer._weight_codes._codes is not None for layer in quantized_layers(engine))
    engine.destroy()
    fresh = build(path, case)
    fresh.load_checkpoint(folder)
    resumed = train(fresh, EARLY, STEPS)
    remove(folder)
    fresh.destroy()
    return {"early": early, "late": late, "resumed": resumed, "counts": taken, "kept": kept}


def checkpointed(path, case, reentrant, counts):
    """Losses, gradients and weights of two steps, with gradient checkpointing."""
    engine = build(path, case, reentrant)
    losses, gradients, weights = [], [], []
    counts.take()
    for index in range(2 * ACCUMULATION):
        loss = forward(engine, index, ROWS)
        engine.backward(loss)
        if engine.is_gradient_accumulation_boundary():
            gradients.append(digest(safe_get_full_grad(parameter) for parameter in engine.module.parameters()))
        engine.step()
        losses.append(loss.item())
        if index % ACCUMULATION == ACCUMULATION - 1:
            weights.append(weights_digest(engine))
    engine.destroy()
    return {"losses": losses, "gradients": gradients, "weights": weights, "counts": counts.take()}


def main(output, path):
    ds_quant.enable()  # for deepspeed.zero.Init, which parses the config too
    deepspeed.init_distributed()
    config = json.loads(Path(path).read_text())
    counts = Counts()
    report = {"cases": {}, "memory": {}, "resumed": {}, "checkpointed": {}}

    def note(part, key, function, *arguments):
        begin = time.monotonic()
        report[part][key] = function(*arguments)
        gc.collect()
        say(f"rank {dist.get_rank()}: {part} {key}: {time.monotonic() - begin:.1f} s")

    for case in CASES:
        for how in ("kept", "none", "untold"):
            note("cases", f"{case} {how}", run_case, config, case, how, counts)
    for case in MEMORY:
        note("memory", case, watch_memory, config, case)
        note("resumed", case, resume, config, case, counts)
    for case in CHECKPOINTED:
        for reentrant in (None, False, True):
            note("checkpointed", f"{case} {reentrant}", checkpointed, config, case, reentrant, counts)
    write_reports(output, report)
    leave()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
