"""One run, from the command line to its outputs, ordered so that mistakes are found cheaply."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from survival import checkpoints, resize
from survival.control import Control
from survival.ending import ending, give_up, take_folder
from survival.guard import Guard
from survival.lease import Lease
from survival.saving import CheckpointSaver
from survival.signals import StopRequest
from survival.watchdog import Watchdog
from transformers import TrainingArguments

from ds_quant.base import trainer_checkpoints
from ds_quant.cli.shared import terminal
from pretraining import arguments, data, diagnostics, documents, environment, metrics, model, outputs
from pretraining.arguments import Arguments
from pretraining.deepspeed_json import DeepSpeedJson, fill_gaps
from pretraining.summary import summarize
from pretraining.trainer import PretrainTrainer, RestoreProgress, last_eval_loss


def run(argv: list[str], *, use_cpu: bool, request: StopRequest) -> None:
    """Train, save, and report.

    Raises LaunchError or ConfigError for errors that the user can fix, RunEnded if the run ends before its last step.
    """
    world_size = environment.world_size()
    args, config = arguments.parse(argv, world_size=world_size)
    terminal.quiet(verbose="log_level" in args.explicit)
    _ = config.quant  # reports config errors before minutes of tokenizing
    args.training.setdefault("use_cpu", use_cpu)
    documents.check_files(args.data)
    output_dir = Path(args.training["output_dir"])
    wish = args.training.get("resume_from_checkpoint")
    # This first check compares file sizes. Every byte is read once other jobs are known to stay away.
    found = checkpoints.choose(wish, output_dir, contents=False, say=lambda _: None)
    auto = (wish or "").lower() == "auto"
    checkpoints.refuse_mixing(output_dir, resume=found is not None or auto, overwrite=args.data.overwrite_output_dir)

    timeout = args.training.get("ddp_timeout", 1800)
    environment.join_process_group(timeout)
    control = Control(timeout)
    lease = take_folder(output_dir, control)
    with ending(lease, control):
        _run(args, config, wish, _Run(lease, control, request))


class _Run(NamedTuple):
    """What a run needs besides its arguments to survive and to end with a clear state."""

    lease: Lease
    control: Control
    request: StopRequest


def _run(args: Arguments, config: DeepSpeedJson, wish: str | None, run: _Run) -> None:
    lease, control = run.lease, run.control
    resume = control.from_first(lambda: checkpoints.choose(wish, lease.output_dir, contents=True))
    universal = False
    if resume is not None:
        # The checkpoint's history already has this evaluation.
        args.training["eval_on_start"] = False
        terminal.say(f"Resuming from {resume}.")
        line = args.go_on_from(resume, config, world_size=control.world_size)
        if line is not None:
            terminal.say(line)
        universal = resize.needs_universal(resume, control.world_size, config.content)
        if universal:
            terminal.say(
                f"{resume} was saved by {len(trainer_checkpoints.optimizer_ranks(resume))} ranks, this run has "
                f"{control.world_size}: converting its optimizer states to DeepSpeed's universal format."
            )
            control.from_first(lambda: resize.make_universal(resume, lease))
    # Rank 0 decides for all, because nodes may differ.
    is_bf16_fast = control.from_first(environment.is_bf16_fast)
    device = "CPU" if args.training["use_cpu"] else "accelerator"
    if (line := args.choose_dtype(resume, is_bf16_fast=is_bf16_fast, device=device)) is not None:
        terminal.say(line)
    training = args.build_training_arguments(config)
    plugin = training.deepspeed_plugin.hf_ds_config.config
    if config.from_accelerate:
        fill_gaps(plugin)
    diagnosed = diagnostics.place(plugin, lease.output_dir)
    if universal:
        plugin.setdefault("checkpoint", {})["load_universal"] = True
    trainer = _trainer(args, training)
    if diagnosed is not None:
        trainer.add_callback(diagnostics.DiagnosticsCallback(lambda: trainer.deepspeed, lambda: not lease.lost()))
    if resume is None:
        control.from_first(lambda: _start_over(lease, overwrite=args.data.overwrite_output_dir))
    _train(trainer, args, config, resume, run)


def _start_over(lease: Lease, *, overwrite: bool) -> None:
    lease.check()
    # Broken checkpoints alone are not deleted; they are replaced when the run reaches their step.
    if overwrite or not trainer_checkpoints.listed(lease.output_dir):
        checkpoints.clear(lease.output_dir)


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


def _train(trainer: PretrainTrainer, args: Arguments, config: DeepSpeedJson, resume: Path | None, run: _Run) -> None:
    training = trainer.args
    lease, control = run.lease, run.control
    output_dir = lease.output_dir
    tokens_per_step = (
        args.data.context_length
        * training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
    )
    about = {
        "world_size": training.world_size,
        "global_batch_size": args.data.global_batch_size,
        "context_length": args.data.context_length,
        "bf16": training.bf16,
        "generation": lease.generation,
    }
    trainer.saver = CheckpointSaver(lease, control, about, training.save_total_limit)
    trainer.guard = Guard(control, lease, run.request, args.data.max_loss_rise)
    written = metrics.MetricsCallback(output_dir / "metrics.csv", tokens_per_step, lambda: not lease.lost())
    trainer.add_callback(trainer.guard)
    trainer.add_callback(Watchdog(control.timeout_seconds, lambda idle: give_up(lease, control, control.stuck(idle))))
    trainer.add_callback(written)
    if resume is not None:
        trainer.add_callback(RestoreProgress(trainer, resume))
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if trainer.guard.outcome is not None:
        written.flush()
        raise trainer.guard.outcome
    step = trainer.state.global_step
    if last_eval_loss(trainer.state.log_history, step) is None:
        trainer.evaluate()
    written.flush()
    seconds = time.monotonic() - begin
    control.on_all(lease.check)
    outputs.save_model(trainer, output_dir / "model")
    peak_memory = max(control.gather(environment.peak_memory_bytes()))
    if not trainer.is_world_process_zero():
        return
    summary = summarize(
        trainer, args, config, tokens_per_step=tokens_per_step, seconds=seconds, peak_memory=peak_memory
    )
    outputs.write_summary(output_dir / "summary.json", summary)
    outputs.write_curves(output_dir, str(output_dir))
    outputs.print_table(summary, output_dir)
