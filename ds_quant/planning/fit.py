"""What fits: ZeRO stages, recomputed activations, and bits of moments and masters tried on one job, by dry runs.

Moments and masters are a chain of depths, each of which takes less memory than the one before it. For each stage, with
and without recomputation, the least depth that fits is looked for; at stage 2 also with gradients that are released in
the backward, where the config allows it (no clipping, no accumulation).

What fits is sorted by what it costs: recomputing activations, which adds a forward to the forward and two of the
backward; then the bytes that a rank sends; then depth. Layers' bits and what crosses the wire stay as the config has
them, since they decide little of what fits (docs/planning.md).
"""

import copy
import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ds_quant.config import ConfigError
from ds_quant.optim.kinds import kind_of
from ds_quant.planning.job import Outcome
from ds_quant.planning.plan import MAX_RANKS, Planner, Request, Setting, world_sizes
from ds_quant.planning.predict import Predictor

DEPTHS: tuple[tuple[int, int], ...] = ((32, 32), (8, 32), (8, 24), (4, 24), (4, 16))
"""Bits of moments and of masters. 4: those with a sign, beside 8 of exp_avg_sq, and of AdEMAMix's slow moment."""
_FIRST_WITH_MASTERS = 2
"""The least of DEPTHS at which gradients can be released."""
_EIGHT_AT_LEAST = ("exp_avg_sq", "exp_avg_slow")


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A way to run the job that fits."""

    setting: Setting
    gradient_checkpointing: bool
    depth: int
    """Of DEPTHS."""
    config: dict[str, Any]
    """The DeepSpeed config to use."""
    outcome: Outcome
    released: bool = False
    """Whether gradients are released in the backward."""

    def cost(self) -> tuple[int, bool, int, int]:
        """What it is sorted by: ranks, recomputation, bytes sent, depth."""
        sent = sum(one.sent for one in self.outcome.collectives)
        return self.setting.world_size, self.gradient_checkpointing, sent, self.depth

    def describe(self) -> str:
        """In words."""
        moments, masters = DEPTHS[self.depth]
        return ", ".join(
            [
                f"ZeRO {self.setting.stage}",
                "activations recomputed" if self.gradient_checkpointing else "activations kept",
                "moments as configured" if moments == 32 else f"{moments}-bit moments",
                "masters as configured" if masters == 32 else f"{masters}-bit masters",
                *(["gradients released"] if self.released else []),
            ]
        )


def config_at(raw: dict[str, Any], depth: int, stage: int, released: bool = False) -> dict[str, Any]:
    """The config with moments and masters of a depth, of a ZeRO stage, and with gradients released or not."""
    config = copy.deepcopy(raw)
    config.setdefault("zero_optimization", {})["stage"] = stage
    moments, masters = DEPTHS[depth]
    if depth:
        section = config.setdefault("ds_quant", {}).setdefault("optimizer", {})
        for name in kind_of(raw).optimizer.STATES:
            section[name] = {"bits": max(moments, 8) if name in _EIGHT_AT_LEAST else moments}
        if masters < 32:
            section["master"] = {"bits": masters}
        section.pop("release_gradients", None)
        if released:
            section["release_gradients"] = True
    return config


class Fitter:
    """Tries ways to run a request.

    Args:
        tell: is called with a line about each dry run.
    """

    def __init__(self, request: Request, predictor: Predictor, tell: Callable[[str], None] = lambda line: None):
        self._request, self._predictor, self._tell = request, predictor, tell
        self._planners: dict[tuple[int, bool, int, bool], Planner] = {}
        self._is_checkpointed = (True,) if request.gradient_checkpointing else (False, True)

    def outcome(
        self, world_size: int, stage: int, checkpointing: bool, depth: int, released: bool = False
    ) -> Outcome | None:
        """At micro batch 1; None for what training would refuse."""
        key = (depth, checkpointing, stage, released)
        if key not in self._planners:
            config = config_at(self._request.config, depth, stage, released)
            asked = dataclasses.replace(self._request, config=config, gradient_checkpointing=checkpointing)
            moments, masters = DEPTHS[depth]
            more = f"{', recomputed' if checkpointing else ''}{', released' if released else ''}: "
            label = f"{moments}-bit moments, {masters}-bit masters{more}"
            self._planners[key] = Planner(asked, self._predictor, lambda line: self._tell(label + line))
        try:
            return self._planners[key].outcome(Setting(world_size, stage, 1))
        except ConfigError:
            return None

    def fitting(self, world_size: int, memory: int) -> list[Fitting]:
        """The ways that fit in `memory` bytes of each of `world_size` ranks, cheapest first."""
        # On one rank the stages take the same, but for the buffers of the higher ones.
        stages = [(stage, False) for stage in ((1,) if world_size == 1 else (1, 2, 3))]
        found = [
            one
            for checkpointing in self._is_checkpointed
            for stage, released in (*stages, (2, True))
            for one in self._least_depth(world_size, stage, checkpointing, memory, released)
        ]
        return sorted(found, key=Fitting.cost)

    def _least_depth(
        self, world_size: int, stage: int, checkpointing: bool, memory: int, released: bool
    ) -> Iterator[Fitting]:
        def outcome(depth: int) -> Outcome | None:
            found = self.outcome(world_size, stage, checkpointing, depth, released)
            return found if found is not None and found.peak_bytes <= memory else None

        last = self._deepest(world_size, stage, checkpointing, released)
        if last is None or outcome(last) is None:
            return
        depths = range(_FIRST_WITH_MASTERS if released else 0, last)
        low = depths.start + bisect_left(depths, True, key=lambda depth: outcome(depth) is not None)  # `last` fits
        fits = outcome(low)
        assert fits is not None
        config = config_at(self._request.config, low, stage, released)
        yield Fitting(Setting(world_size, stage, 1), checkpointing, low, config, fits, released)

    def _deepest(self, world_size: int, stage: int, checkpointing: bool, released: bool = False) -> int | None:
        """The deepest that training does not refuse: there are no masters of few bits without bf16, or offloaded."""
        for depth in (len(DEPTHS) - 1, *(() if released else (1, 0))):
            if self.outcome(world_size, stage, checkpointing, depth, released) is not None:
                return depth
        return None

    def least_ranks(self, memory: int, most_ranks: int = MAX_RANKS) -> int | None:
        """The fewest ranks on which anything fits; None where nothing does."""
        worlds = world_sizes(self._request.batch, self._request.gpus_per_node, most_ranks)

        def serves(world_size: int) -> bool:
            """Whether what takes least does: stages 1 and 3 differ either way by their buffers."""
            for stage, released in (*(((3, False),) if world_size > 1 else ()), (1, False), (2, True)):
                depth = self._deepest(world_size, stage, True, released)
                found = None if depth is None else self.outcome(world_size, stage, True, depth, released)
                if found is not None and found.peak_bytes <= memory:
                    return True
            return False

        if not worlds or not serves(worlds[-1]):
            return None
        return worlds[bisect_left(worlds[:-1], True, key=serves)]


def section_of(fitting: Fitting) -> dict[str, Any]:
    """What of the config decides that it fits."""
    zero = {"stage": fitting.setting.stage}
    quant = fitting.config.get("ds_quant", {}).get("optimizer")
    return {"zero_optimization": zero, **({"ds_quant": {"optimizer": quant}} if quant else {})}


def table(found: Sequence[tuple[str, int | None, Fitting | None]]) -> list[str]:
    """Markdown: a row for each (memory, fewest ranks, the cheapest way there)."""
    rows = ["| memory of a GPU | fewest GPUs | cheapest way there | peak, GiB |", "|---|---|---|---|"]
    for memory, ranks, fitting in found:
        if ranks is None or fitting is None:
            rows.append(f"| {memory} | none | | |")
        else:
            rows.append(f"| {memory} | {ranks} | {fitting.describe()} | {fitting.outcome.peak_bytes / 2**30:.1f} |")
    return rows
