"""One run from the command line to its outputs, in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import deepspeed
from transformers import TrainingArguments

import ds_quant
from ds_quant import report
from ds_quant.comm.reducer import describe_wire
from ds_quant.optimizer_setup import describe_moments
from pretraining import arguments, checkpoints, data, documents, environment, metrics, model, outputs
from pretraining.arguments import Arguments
from pretraining.deepspeed_json import DeepSpeedJson, fill_gaps
from pretraining.trainer import PretrainTrainer, last_eval_loss


def run(argv: list[str], *, use_cpu: bool) -> None:
    """Train, save, and report; raises LaunchError or ConfigError for what the user can mend."""
    world_size = environment.world_size()
    args, config = arguments.parse(argv, world_size=world_size)
    environment.quiet(verbose="log_level" in args.explicit)
    ds_quant.QuantConfig.load(config.content)  # before minutes of tokenizing; initialize loads it again
    args.training.setdefault("use_cpu", use_cpu)
    documents.check_files(args.data)
    output_dir = Path(args.training["output_dir"])
    resume = checkpoints.resolve(
        args.training.get("resume_from_checkpoint"), str(output_dir), world_size=world_size, config=config.content
    )
    if resume is not None:
        # The checkpoint's own history has this evaluation.
        args.training["eval_on_start"] = False
        environment.say(f"Resuming from {resume}.")
    checkpoints.refuse_mixing(output_dir, resume=resume is not None, overwrite=args.data.overwrite_output_dir)

    training = args.build_training_arguments(config)
    fill_gaps(training.deepspeed_plugin.hf_ds_config.config)
    # With use_cpu nobody else has done it by the time that zero.Init asks for the world's size.
    deepspeed.init_distributed()
    trainer = _trainer(args, training)
    if resume is None and training.process_index == 0:
        checkpoints.clear(output_dir)
    trainer.accelerator.wait_for_everyone()
    _train(trainer, args, config, resume)


def _trainer(args: Arguments, training: TrainingArguments) -> PretrainTrainer:
    prepared = data.prepare(args, training)
    built = model.build(args.model, training, prepared.tokenizer, args.data.context_length)
    return PretrainTrainer(
        model=built,
        args=training,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        processing_class=prepared.tokenizer,
        data_collator=data.collate,
    )


def _train(trainer: PretrainTrainer, args: Arguments, config: DeepSpeedJson, resume: str | None) -> None:
    training = trainer.args
    output_dir = Path(training.output_dir)
    tokens_per_step = (
        args.data.context_length
        * training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
    )
    written = metrics.MetricsCallback(output_dir / "metrics.csv", tokens_per_step)
    trainer.add_callback(written)
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    step = trainer.state.global_step
    if last_eval_loss(trainer.state.log_history, step) is None:
        trainer.evaluate()
    written.flush()
    seconds = time.monotonic() - begin
    outputs.save_model(trainer, output_dir / "model")
    if not trainer.is_world_process_zero():
        return
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    steps_here = step - trainer.first_step
    coverage = ds_quant.coverage(trainer.model)
    quant = ds_quant.QuantConfig.load(config.content)
    summary: dict[str, Any] = {
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
        "first_eval_loss": evaluated[0],
        "final_eval_loss": last_eval_loss(trainer.state.log_history, step),
        "converted_modules": dict(coverage.converted),
        "share": coverage.share,
        "left_out": {name: list(shape) for name, shape in coverage.left_out.items()},
        "moments": describe_moments(quant.optimizer) if quant.optimizer else None,
        "communication": _communication(trainer, quant),
        "dtype": str(trainer.deepspeed.get_data_types()[0]).removeprefix("torch."),
        "zero_stage": trainer.deepspeed.zero_optimization_stage(),
        "world_size": training.world_size,
        "device": training.device.type,
        "seed": training.seed,
        "config": config.content,
        "versions": report.versions(),
        "commit": outputs.commit(),
    }
    outputs.write_summary(output_dir / "summary.json", summary)
    outputs.write_curves(output_dir, str(output_dir))
    outputs.print_table(summary, output_dir)


def _communication(trainer: PretrainTrainer, quant: ds_quant.QuantConfig) -> dict[str, Any] | None:
    """How gradients crossed the wire, and what rank 0 sent a step; None: in full precision."""
    if not quant.communication or not quant.communication.gradient:
        return None
    return {
        "gradient": describe_wire(quant.communication.gradient),
        **trainer.deepspeed.ds_quant_gradients.summary(),
    }
