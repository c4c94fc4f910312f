"""One training step of an engine, recorded: the same for real ranks and for a dry run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_quant.engine.memory_parts import gradient_buckets, memory_parts, pending_gradients
from ds_quant.linear.modules import QuantizedModule
from ds_quant.planning.ledger import Ledger

WARM_STEPS = 2
"""Before the one that counts: moments and buffers are made in the first, and stage 3 learns its order of modules."""


def watch_gradients(engine: Any, ledger: Ledger) -> None:
    """Have the ledger know gradients, and what they are collected in, from the moment that autograd hands them over."""

    def watch(gradient: Tensor) -> None:
        ledger.assign("gradients", [gradient, *pending_gradients(engine)])
        ledger.assign("communication", gradient_buckets(engine))

    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(watch)


def record_step(engine: Any, make_batch: Callable[[], Mapping[str, Tensor]], ledger: Ledger) -> list[int]:
    """Take one whole step, with all its micro steps, between the marks "begin" and "end" of the ledger.

    Returns which of the ledger's collectives is the first of each micro step.
    """
    begins: list[int] = []
    ledger.mark("begin")
    for _ in range(engine.gradient_accumulation_steps()):
        begins.append(len(ledger.collectives))
        ledger.mark("forward")
        batch = make_batch()
        loss = engine(**batch).loss
        _assign_codes(engine, ledger)  # at stage 3 the backward releases them
        ledger.assign_born_since("activations", "forward")
        ledger.mark("backward")
        engine.backward(loss)
        del loss, batch
        _assign(engine, ledger)
        ledger.mark("step")
        engine.step()
        _assign(engine, ledger)
    ledger.mark("end")
    return begins


def _assign(engine: Any, ledger: Ledger) -> None:
    for role, tensors in memory_parts(engine).items():
        ledger.assign(role, tensors)
    _assign_codes(engine, ledger)


def _assign_codes(engine: Any, ledger: Ledger) -> None:
    for module in engine.module.modules():
        if isinstance(module, QuantizedModule):
            ledger.assign("weights", [t for t in module._weight_codes._codes or () if t is not None])


def token_batch(vocabulary: int, rows: int, length: int) -> dict[str, Tensor]:
    """Input of a causal language model, as the Trainer's collator for packed text gives it: int64 [rows, length]."""
    ids = torch.arange(rows * length, dtype=torch.int64).reshape(rows, length) % vocabulary
    return {"input_ids": ids, "labels": ids.clone()}
