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
from common import digest, forward, leave, remove, say, shared_folder, write_reports
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_grad
from int8_edits import EDITS, edited, skipped
from int8_memory import watch_memory
from int8_training import ACCUMULATION, EARLY, ROWS, STAGE3, STEPS, build, quantized_layers, train, weights_digest

import ds_quant
from ds_quant.engine import weights as zero_weights
from ds_quant.linear import int8, modules, weight_codes
from ds_quant.linear.weight_codes import WeightCodes

CASES = ["0:fp32", "0:bf16", "1:fp32", "1:bf16", "2:fp32", "2:bf16", "1:bf16_fp32", "1:offload"]
"""STAGE:DTYPE; bf16_fp32 accumulates the gradients of bf16 in fp32, offload keeps the moments of fp32 on the CPU."""
MEMORY = ["1:fp32", *STAGE3]
CHECKPOINTED = ["1:fp32", "1:bf16", *STAGE3]


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
