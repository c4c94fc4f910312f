"""What ranks check of each other, and what is noted where it does not hold."""

import torch
from torch import distributed as dist


def same_on_all(tensor):
    raw = tensor.contiguous().view(-1).view(torch.uint8).clone()
    others = [torch.empty_like(raw) for _ in range(dist.get_world_size())]
    dist.all_gather(others, raw)
    return all(torch.equal(raw, other) for other in others)


def expecting(report):
    """A function that counts a condition in the report, and notes what is wrong where it does not hold."""

    def expect(condition, *what):
        report["checked"] += 1
        if not condition:
            report["wrong"].append(" ".join(map(str, what)))

    return expect
