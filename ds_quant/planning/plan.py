"""What a job takes on given hardware, and the least hardware that it fits on: by dry runs."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from ds_quant.base.errors import fail
from ds_quant.config import ConfigError
from ds_quant.planning.configs import job_config, offloaded_roles
from ds_quant.planning.job import Job, Outcome
from ds_quant.planning.predict import Predictor
from ds_quant.planning.traffic import Collective

MAX_RANKS = 16384
_DRY_MICRO_STEPS = 3
"""Of a step with more, the one in the middle is the same again and again."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, whatever the hardware."""

    config: dict[str, Any]
    """The DeepSpeed config as it was read."""
    model: dict[str, Any]
    """config.json of the model."""
    length: int
    batch: int
    """Sequences of a step, on all ranks."""
    gpus_per_node: int
    gradient_checkpointing: bool = False
    flash_attention: bool = True


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run it."""

    world_size: int
    stage: int
    rows: int
    """Sequences in a micro step of a rank."""

    def accumulation(self, batch: int) -> int:
        return batch // (self.world_size * self.rows)


class Planner:
    """Answers for one request; earlier answers are cached.

    Args:
        tell: is called with a line about each dry run.
    """

    def __init__(self, request: Request, predictor: Predictor, tell: Callable[[str], None] = lambda line: None):
        self.request = request
        self._predictor = predictor
        self.tell = tell
        self._known: dict[Setting, Outcome] = {}

    def outcome(self, setting: Setting) -> Outcome:
        """Of rank 0. Raises ConfigError for a setting that training would refuse, or that is not predictable."""
        if setting not in self._known:
            request, accumulation = self.request, setting.accumulation(self.request.batch)
            dry = min(accumulation, _DRY_MICRO_STEPS)
            config = job_config(
                request.config,
                world_size=setting.world_size,
                rows=setting.rows,
                accumulation=accumulation,
                stage=setting.stage,
            )
            config["gradient_accumulation_steps"] = dry
            config["train_batch_size"] = setting.rows * dry * setting.world_size
            job = Job(
                config,
                request.model,
                setting.rows,
                request.length,
                setting.world_size,
                gradient_checkpointing=request.gradient_checkpointing,
                flash_attention=request.flash_attention,
            )
            self.tell(
                f"dry run: {setting.world_size} ranks, ZeRO {setting.stage}, micro batch {setting.rows}, "
                f"{accumulation} micro steps"
            )
            found = self._predictor.predict(job, node_size=request.gpus_per_node, offloaded=offloaded_roles(config))
            found.collectives = _repeated(found, accumulation - dry)
            self._known[setting] = found
        return self._known[setting]

    def fits(self, setting: Setting, memory: int) -> bool:
        """Whether a rank's peak is at most `memory` bytes."""
        return self.outcome(setting).peak_bytes <= memory

    def largest_rows(self, world_size: int, stage: int, memory: int) -> int | None:
        """The largest micro batch that fits, of those that divide the batch; None where a single sequence does not."""
        choices = divisors(self.request.batch // world_size)
        low, high = -1, len(choices) - 1  # choices[low] fits, those above `high` do not
        while low < high:
            middle = (low + high + 1) // 2 if low >= 0 else 0
            if self.fits(Setting(world_size, stage, choices[middle]), memory):
                low = middle
            elif middle == 0:
                return None
            else:
                high = middle - 1
        return choices[low]

    def least_hardware(self, memory: int, most_ranks: int, lowest_stage: int = 0) -> Setting | None:
        """The fewest ranks that it fits on, the lowest stage there, the largest micro batch then; None where none fit.

        A rank holds less where there are more ranks, and at a higher stage.
        """
        worlds = world_sizes(self.request.batch, self.request.gpus_per_node, most_ranks)
        stages = [stage for stage in (3, 2, 1, 0) if stage >= lowest_stage and self._is_allowed(stage)]
        if not worlds or not stages:
            return None

        def serves(world_size: int) -> bool:
            return any(self.fits(Setting(world_size, stage, 1), memory) for stage in stages)

        if not serves(worlds[-1]):
            return None
        low, high = 0, len(worlds) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if serves(worlds[middle]) else (middle + 1, high)
        world_size = worlds[low]
        stage = min(stage for stage in stages if self.fits(Setting(world_size, stage, 1), memory))
        rows = self.largest_rows(world_size, stage, memory)
        assert rows is not None
        return Setting(world_size, stage, rows)

    def _is_allowed(self, stage: int) -> bool:
        try:
            job_config(self.request.config, world_size=1, rows=1, stage=stage)
        except ConfigError:
            return False
        return True

    def variants(self) -> list[tuple[str, Request]]:
        """Other settings to try, each with a label: recomputing activations, offloading, or both."""
        request = self.request
        offloading = copy.deepcopy(request.config)
        zero = offloading.setdefault("zero_optimization", {})
        has_offloading = bool(offloaded_roles(request.config))
        zero["offload_optimizer"] = {"device": "cpu"}
        found = []
        if not request.gradient_checkpointing:
            found.append(("--gradient-checkpointing", dataclasses.replace(request, gradient_checkpointing=True)))
        if not has_offloading:
            name = '"offload_optimizer": {"device": "cpu"}'
            found.append((name, dataclasses.replace(request, config=offloading)))
            if not request.gradient_checkpointing:
                both = dataclasses.replace(request, config=offloading, gradient_checkpointing=True)
                found.append((f"--gradient-checkpointing and {name}", both))
        return found


def _repeated(outcome: Outcome, times: int) -> list[Collective]:
    """The collectives of a step with `times` more micro steps like the second."""
    if times <= 0:
        return outcome.collectives
    _, second, third = outcome.micro_steps
    middle = outcome.collectives[second:third]
    return [*outcome.collectives[:third], *middle * times, *outcome.collectives[third:]]


def divisors(number: int) -> list[int]:
    """The divisors of a number, from 1 up."""
    return [d for d in range(1, number + 1) if number % d == 0]


def world_sizes(batch: int, gpus_per_node: int, most: int) -> list[int]:
    """Numbers of ranks to try, divisors of the batch: powers of two in a node, whole nodes doubled, and `most`."""
    found, size = [], 1
    while size < gpus_per_node:
        found.append(size)
        size *= 2
    size = gpus_per_node
    while size <= most:
        found.append(size)
        size *= 2
    return sorted({size for size in (*found, most) if size <= most and batch % size == 0})


def check_batch(batch: int, world_size: int, rows: int | None) -> None:
    """Raise ConfigError for a batch that the ranks and micro batches do not divide."""
    if batch % world_size:
        near = max(world_size, batch // world_size * world_size)
        raise fail("--batch", batch, f"multiples of the {world_size} ranks", f"take {near}, or other numbers of ranks")
    if rows is not None and (batch // world_size) % rows:
        allowed = f"divisors of the {batch // world_size} sequences of a rank"
        raise fail("--micro-batch", rows, allowed, "correct it, or leave it out")
