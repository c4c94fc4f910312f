"""A training job to be measured or predicted, and its model and engine: made by the same code for both."""

import contextlib
import copy
import dataclasses
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ds_quant.engine.entry import initialize
from ds_quant.linear.convert import step_key_of
from ds_quant.planning.ledger import ROLES, Ledger
from ds_quant.planning.models import causal_model
from ds_quant.planning.traffic import Collective
from ds_quant.planning.training_step import WARM_STEPS, record_step, token_batch, watch_gradients


@dataclasses.dataclass(frozen=True)
class Job:
    """What one rank does. Plain data, so that it can be sent to another process."""

    config: dict[str, Any]
    """The DeepSpeed config, without "auto"s."""
    model: dict[str, Any]
    """The model's config.json."""
    rows: int
    """Sequences in a micro step of a rank."""
    length: int
    """Tokens of a sequence."""
    world_size: int = 1
    rank: int = 0
    gradient_checkpointing: bool = False
    flash_attention: bool = False
    """Whether attention never allocates a matrix of tokens by tokens, like the kernels of GPUs. Torch's on CPUs does
    with dropout. Only for dry runs, which drop nothing."""


@dataclasses.dataclass
class Outcome:
    """What one step of one rank took."""

    peak_bytes: int
    parts: dict[str, int]
    """Bytes of each role (`ledger.ROLES`) at the peak."""
    phase: str
    """In which the peak was: forward, backward or step."""
    phase_peaks: dict[str, int]
    """The peak of each phase, in bytes."""
    rest_bytes: int
    """What is allocated before the step and after it."""
    host_bytes: int
    """Memory that DeepSpeed's offloading keeps on the host; not part of the others."""
    num_parameters: int
    collectives: list[Collective]
    """Those of the step, in the order in which they were called."""
    micro_steps: list[int]
    """Which of `collectives` is the first of each micro step."""


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Context in which torch's attention uses the fused CPU kernel, which takes the same memory as the GPUs'."""
    # Not by a TorchFunctionMode: within a backward, where checkpointed layers run again, none is in force.
    own = F.scaled_dot_product_attention

    @functools.wraps(own)
    def fused(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        return own(query, key, value, attn_mask, 0.0, **options)

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def make_engine(job: Job) -> Any:
    """The engine of a job in this process, whose process group is there. Raises ConfigError as `initialize` does."""
    model: Any = causal_model(job.model)
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    config = copy.deepcopy(job.config)
    _watch_oscillation(config)
    if "optimizer" in config:
        return initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    # As the Trainer does; fused as it does by default.
    return initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), config=config)[0]


def _watch_oscillation(config: dict[str, Any]) -> None:
    """Have `oscillation_reset` watch from the first step on: it holds most then, and exchanges nothing yet."""
    weight = (config.get("ds_quant", {}).get("linear") or {}).get("weight") or {}
    if weight.get("oscillation_reset"):
        every = 10 * (WARM_STEPS + 1)
        weight["oscillation_reset"] |= {"every": every, "watched_steps": every - 1, "first_step": 0}


def run_job(job: Job, ledger: Ledger, offloaded: tuple[str, ...] = ()) -> Outcome:
    """Make the engine, take `WARM_STEPS` steps, and then the one that counts. Enter `ledger` before.

    Where the forward is in full precision from some step on, once before and once after it: the larger one counts.

    offloaded: roles whose memory is the host's.
    """
    with flash_attention() if job.flash_attention else contextlib.nullcontext():
        return _run_job(job, ledger, offloaded)


def _run_job(job: Job, ledger: Ledger, offloaded: tuple[str, ...]) -> Outcome:
    engine = make_engine(job)
    watch_gradients(engine, ledger)
    found = _record(engine, job, ledger, offloaded)
    later = _full_forward_from(engine)
    if later is None or later <= engine.global_steps:
        return found
    engine.global_steps = later  # layers hold other activations from there on, and no codes of weights
    return max(found, _record(engine, job, ledger, offloaded), key=lambda outcome: outcome.peak_bytes)


def _full_forward_from(engine: Any) -> int | None:
    """The step from which on the engine's layers do not quantize their forward; None: all do, or none."""
    step_key = step_key_of(engine.module)
    return None if step_key is None else step_key.full_forward_from


def _record(engine: Any, job: Job, ledger: Ledger, offloaded: tuple[str, ...]) -> Outcome:
    vocabulary = int(job.model["vocab_size"])
    for _ in range(WARM_STEPS + 1):
        gc.collect()
        ledger.collectives.clear()
        begins = record_step(engine, lambda: token_batch(vocabulary, job.rows, job.length), ledger)
    roles = [role for role in ROLES if role not in offloaded]
    peak = ledger.peak("begin", "end", roles)
    sizes = {id(p): int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters()}
    return Outcome(
        peak_bytes=peak.bytes,
        parts=peak.parts,
        phase=peak.phase,
        phase_peaks=ledger.phase_peaks(roles),
        rest_bytes=ledger.rest("begin", roles),
        host_bytes=ledger.peak("begin", "end", offloaded).bytes,
        num_parameters=sum(sizes.values()),
        collectives=list(ledger.collectives),
        micro_steps=begins,
    )
