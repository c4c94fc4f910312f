"""`ds_quant plan --fit`: which ways of running a job fit, and on how few GPUs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_quant.planning.fit import Fitter, Fitting


def report(fitter: Fitter, world_size: int, memories: dict[str, int]) -> dict[str, Any]:
    """For each memory of a GPU, what fits on `world_size` ranks, and the fewest that anything fits on; plain data.

    Args:
        fitter: which holds the job.
        world_size: ranks.
        memories: usable bytes by what was asked for.
    """
    from ds_quant.planning.fit import table

    answers, rows = [], []
    for name, memory in memories.items():
        found = fitter.fitting(world_size, memory)
        fewest = fitter.least_ranks(memory, world_size) or fitter.least_ranks(memory)
        there = fitter.fitting(fewest, memory) if fewest else []
        rows.append((name, fewest, there[0] if there else None))
        answer: dict[str, Any] = {"gpu_memory": name, "usable_bytes": memory, "ranks": world_size}
        answer["ways"] = [_plain(one) for one in found]
        answer["fewest_ranks"] = fewest
        answer["ways_there"] = [_plain(one) for one in there]
        answers.append(answer)
    return {"fit": answers, "table": table(rows)}


def _plain(one: Fitting) -> dict[str, Any]:
    from ds_quant.planning.fit import section_of

    return {
        "what": one.describe(),
        "ranks": one.setting.world_size,
        "stage": one.setting.stage,
        "gradient_checkpointing": one.gradient_checkpointing,
        "peak_bytes": one.outcome.peak_bytes,
        "at_peak": one.outcome.parts,
        "sent_bytes": sum(row.sent for row in one.outcome.collectives),
        "json": section_of(one),
        "config": one.config,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = []
    for answer in found["fit"]:
        usable = f"{answer['usable_bytes'] / 2**30:,.2f} GiB of {answer['gpu_memory']}"
        text.append(f"on {answer['ranks']} GPUs, in {usable}, micro batch 1, cheapest first:")
        text += _ways(answer["ways"]) or ["  nothing fits"]
        fewest = answer["fewest_ranks"]
        if fewest is None:
            text.append("no number of ranks fits: a single sequence takes too much on every rank")
        elif fewest != answer["ranks"]:
            text.append(f"fewest GPUs: {fewest}, cheapest first:")
            text += _ways(answer["ways_there"])
        text.append("")
    return [*text, *found["table"]]


def _ways(ways: list[dict[str, Any]]) -> list[str]:
    text = []
    for number, one in enumerate(ways, 1):
        peak, sent = one["peak_bytes"] / 2**30, one["sent_bytes"]
        text.append(f"  {number}. {one['what']}: {peak:,.2f} GiB, a rank sends {sent:,} bytes a step")
        flag = " with --gradient-checkpointing" if one["gradient_checkpointing"] else ""
        text.append(f"     {json.dumps(one['json'])}{flag}")
    return text
