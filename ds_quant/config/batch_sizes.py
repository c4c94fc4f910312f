"""The three batch sizes of a DeepSpeed config, with the fixes that DeepSpeed's own errors leave out."""

import os
from typing import Any

from ds_quant.base.errors import fail

BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_filled(config: dict[str, Any]) -> None:
    """Raise ConfigError where `deepspeed.zero.Init` would meet an "auto" among them: it needs numbers, before anything
    has filled them in."""
    left = [key for key in BATCH_SIZES if config.get(key) == "auto"]
    if left:
        raise fail(
            f"deepspeed.zero.Init: {', '.join(left)}",
            "auto",
            "numbers: at ZeRO stage 3 the config is read when the model is built",
            "write numbers, or fill them in first: ds_quant.resolve_auto(config, train_micro_batch_size_per_gpu=..., "
            "gradient_accumulation_steps=...). Hugging Face's Trainer does it where TrainingArguments are made before "
            "the model, accelerate where Accelerator is",
        )


def check_ranks(config: dict[str, Any], num_ranks: int, *, on_cpu: bool) -> None:
    """Raise ConfigError where train_batch_size was computed for one rank and the job has `num_ranks`."""
    total, micro, accumulation = (config.get(key) for key in BATCH_SIZES)
    if not (isinstance(total, int) and isinstance(micro, int) and isinstance(accumulation, int)):
        return
    if num_ranks == 1 or total != micro * accumulation:
        return
    fix = f"write {total * num_ranks}, or leave it out: DeepSpeed computes it"
    if on_cpu:
        # Without an accelerator, accelerate assumes by default that each process is the only one.
        fix = (
            "if you did not write it, accelerate assumed that each process is the only one, as it does on CPUs "
            "by default: give the Trainer --use_cpu, or a loop of your own "
            'Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]); else ' + fix
        )
    raise fail(
        "train_batch_size",
        total,
        f"{total * num_ranks} = train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation} x "
        f"{num_ranks} ranks",
        fix,
    )


def num_ranks() -> int:
    """The world size that the launcher set; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
