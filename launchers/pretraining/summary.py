"""What summary.json says of a run that has reached its last step."""

from __future__ import annotations

from typing import Any

import ds_quant
from ds_quant.base.commit import commit
from ds_quant.cli import report
from ds_quant.cli.shared import processors
from ds_quant.comm.reducer import describe_wire
from ds_quant.comm.weight_difference import describe_weights
from ds_quant.optim.kinds import kind_of
from ds_quant.optim.setup import describe_moments
from pretraining import model
from pretraining.arguments import Arguments
from pretraining.deepspeed_json import DeepSpeedJson
from pretraining.trainer import PretrainTrainer, last_eval_loss


def summarize(
    trainer: PretrainTrainer,
    args: Arguments,
    config: DeepSpeedJson,
    *,
    tokens_per_step: int,
    seconds: float,
    peak_memory: int,
) -> dict[str, Any]:
    """The summary of a run, for rank 0.

    Args:
        seconds: of training and evaluating in this process.
        peak_memory: the most bytes that a rank has taken.
    """
    training, step = trainer.args, trainer.state.global_step
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    steps_here = step - trainer.first_step
    coverage = ds_quant.coverage(trainer.model)
    quant = config.quant
    return {
        "preset": args.model.preset,
        "model": model.describe(trainer.model),
        "vocab_size": trainer.model.config.vocab_size,
        "context_length": args.data.context_length,
        "steps": step,
        "resumed_from_step": trainer.first_step or None,
        "tokens": step * tokens_per_step,
        "seconds": round(seconds, 2),
        "seconds_evaluating": round(trainer.seconds_evaluating, 2),
        "tokens_per_second": round(steps_here * tokens_per_step / max(seconds - trainer.seconds_evaluating, 1e-9), 1),
        "peak_memory_bytes": peak_memory,
        "first_eval_loss": evaluated[0],
        "final_eval_loss": last_eval_loss(trainer.state.log_history, step),
        "converted_modules": dict(coverage.converted),
        "share": coverage.share,
        "left_out": {name: list(shape) for name, shape in coverage.left_out.items()},
        "moments": describe_moments(quant.optimizer, kind_of(config.content)) if quant.optimizer else None,
        "communication": _communication(trainer, quant),
        "dtype": str(trainer.deepspeed.get_data_types()[0]).removeprefix("torch."),
        "zero_stage": trainer.deepspeed.zero_optimization_stage(),
        "world_size": training.world_size,
        "device": training.device.type,
        "processor": processors.kind(training.device),
        "seed": training.seed,
        "config": config.content,
        "versions": report.versions(),
        "commit": commit(),
    }


def _communication(trainer: PretrainTrainer, quant: ds_quant.QuantConfig) -> dict[str, Any] | None:
    """How gradients and weights were sent, and the bytes rank 0 sent per step; None: all in full precision."""
    if not quant.communication:
        return None
    found: dict[str, Any] = {}
    if quant.communication.gradient:
        found |= {"gradient": describe_wire(quant.communication.gradient)}
        found |= trainer.deepspeed.ds_quant_gradients.summary()
    if quant.communication.weight:
        found |= {"weight": describe_weights(quant.communication.weight)}
        found |= trainer.deepspeed.ds_quant_weight_communication.summary()
    return found
