"""Weights gathered as differences: what ranks hold, how near it is to the owners', and what checkpoints make of it.

    weights_difference.py OUTPUT JSON ...

A JSON is [CASE, {what is said of communication.weight}], CASE as in weights.py.
"""

import gc
import json
import sys

import deepspeed
import torch
from common import digest, forward, leave, remove, say, shared_folder, write_reports
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from weights import ROWS, build, parameters_of, refusal, saved_weights, train

from ds_quant.comm import backend
from ds_quant.comm.weight_difference import rounding_of, wire_format

EARLY, STEPS, DRIFTING = 3, 6, 24


class Watch:
    """Bytes of the messages between nodes, counted at the all-gather; those of gradients have their own."""

    def __init__(self):
        self.node_size, self.sent = 1, 0
        self._gather = backend.all_gather
        backend.all_gather = self._counted

    def _counted(self, output, message, group):
        ranks = torch.distributed.get_process_group_ranks(group)
        if ranks[0] // self.node_size != ranks[-1] // self.node_size:
            self.sent += output.numel() - message.numel()
        return self._gather(output, message, group)

    def take(self):
        found, self.sent = self.sent, 0
        return found


def own_partitions(engine):
    """The own partition of each group, as it lies in the model, and its master."""
    wrapper, rank = engine.optimizer, dist.get_rank()
    for flat, master in zip(wrapper.bit16_groups_flat, wrapper.single_partition_of_fp32_groups, strict=True):
        yield flat.chunk(dist.get_world_size())[rank], master


def drifts(engine, steps):
    """After each step: the distance of the replica from the masters, what one gather may leave of it, the difference.

    A code is off by a scale at most when rounded stochastically, by half a scale when to nearest; a scale is a block's
    largest magnitude over the levels; what is added is rounded to the dtype. A rotation keeps sums of squares only, and
    no magnitude of a block is above the root of its sum of squares.
    """
    config, found = engine.ds_quant_weight_communication.config, []
    off = (1.0 if rounding_of(config) == "stochastic" else 0.5) / {8: 127, 4: 7}[config.bits]
    norm = 2 if config.rotation == "hadamard" else float("inf")
    if norm == 2:
        off *= wire_format(config).block_size ** 0.5
    for step in range(steps):
        before = [part.float().clone() for part, _ in own_partitions(engine)]
        train(engine, step, step + 1)
        for kept, (part, master) in zip(before, own_partitions(engine), strict=True):
            drift, difference = ((master - other).norm(norm).item() for other in (part.float(), kept))
            rounding = torch.finfo(part.dtype).eps / 2 * part.float().norm(norm).item()
            found.append([drift, 1.001 * (off * difference + rounding), difference])
    return found


def masters_in_16_bits(engine, names):
    dtype = engine.optimizer.bit16_groups_flat[0].dtype
    return digest(safe_get_full_fp32_param(parameter).to(dtype) for parameter in names.values())


def run(case, weight, watch):
    folder = shared_folder()
    engine = build(case, weight)
    part = engine.ds_quant_weight_communication
    names = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    watch.node_size = weight.get("hierarchical", 1)
    watch.take()
    report = {"trained": train(engine, 0, EARLY), "wire": watch.take(), "counted": part.total.sent_bytes}
    report["layout"] = [gather.sent_bytes for gather in part._gathers]
    report["slots"] = [gather.layout.slot_bytes for gather in part._gathers]
    report["numel"] = [flat.numel() for flat in engine.optimizer.bit16_groups_flat]
    report["error"] = part.summary()["weight_quantization_error"]
    report["replica"] = parameters_of(engine)
    report["refused"] = refusal(engine.module.state_dict)
    report["saved"] = saved_weights(engine, folder)
    report["whole"] = digest(names.values())
    report["masters"] = masters_in_16_bits(engine, names)
    engine.eval()
    with torch.no_grad():
        forward(engine, 1000, ROWS)
    engine.train()
    report["replica after saving"] = parameters_of(engine)
    report["late"] = train(engine, EARLY, STEPS)
    report["last replica"] = parameters_of(engine)
    dist.barrier()
    fresh = build(case, weight)
    train(fresh, 0, 1)
    fresh.load_checkpoint(folder, tag="whole")
    report["resumed"] = train(fresh, EARLY, STEPS)
    report["resumed replica"] = parameters_of(fresh)
    straight = build(case, weight)
    report["straight"] = train(straight, 0, STEPS)
    report["drifts"] = drifts(build(case, weight), DRIFTING)
    remove(folder)
    return report


def main():
    output, *cases = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    watch, report = Watch(), []
    for text in cases:
        say(f"rank {dist.get_rank()}: {text}")
        report.append(run(*json.loads(text), watch))
        gc.collect()
    write_reports(output, report)
    leave()


if __name__ == "__main__":
    main()
