"""Checks that pretrain.py accepts the flags of runs, and counts the tokens they train on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ds_quant.cli.shared.errors import CommandError

_OWN = ("--deepspeed", "--deepspeed_config", "--seed", "--output_dir", "--resume_from_checkpoint")


def refuse_own(more: Sequence[str]) -> None:
    """Refuse flags that the sweep itself sets for each run. Raises CommandError."""
    for word in more:
        if word.split("=", 1)[0] in _OWN:
            raise CommandError(
                f"PRETRAIN_ARGS: got {word}, which the sweep sets for each run; allowed: other flags of pretrain.py; "
                "use CONFIGS, SEEDS and SWEEP_DIR instead"
            )


def tokens(arguments: Sequence[str], world_size: int) -> int | None:
    """Tokens that a run with these arguments of pretrain.py trains on: steps x global batch x context length.

    None if the number of steps depends on the data. The first call takes seconds, to import pretrain.py's parser.

    Raises:
        CommandError: pretrain.py would refuse the arguments.
    """
    # This only parses, which needs no device.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from pretraining import arguments as pretrain_arguments
    from survival.errors import LaunchError

    import ds_quant

    try:
        parsed, config = pretrain_arguments.parse(list(arguments), world_size=world_size)
        _ = config.quant
    except (LaunchError, ds_quant.ConfigError) as error:
        raise CommandError(f"pretrain.py refuses a run with {' '.join(arguments)}: {error}") from error
    training = parsed.training
    steps = int(training.get("max_steps", -1))
    if steps <= 0:
        return None
    sequences = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) * world_size
    return steps * int(sequences) * parsed.data.context_length
