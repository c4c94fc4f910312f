"""A DeepSpeed config for each front end: who fills in which `"auto"`, and who provides the optimizer."""

import copy
from typing import Any

from ds_quant.config.batch_sizes import BATCH_SIZES
from ds_quant.config.deepspeed_json import resolve_auto, unresolved_auto

WAYS = ("trainer", "accelerate", "accelerate-dummy", "lightning", "native")
"""Hugging Face's Trainer; an accelerate loop with an AdamW of its own; one with DummyOptim and DummyScheduler;
Lightning with an AdamW of its own; a script that hands the config to deepspeed.initialize."""

ASSUMED = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16.enabled": True,
    "optimizer.params.lr": 1e-3,
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.weight_decay": 0.01,
}
"""What stands where nobody fills an `"auto"`: torch's AdamW, and the usual. It is said, and `values` replaces it."""


def config_for(config: dict[str, Any], way: str, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config that runs unedited by `way` (of WAYS), and a line for each thing that was decided.

    values: by key or path, as `resolve_auto` takes them.

    Raises:
        ConfigError: a value that the config has no key for or that it contradicts.
    """
    config = copy.deepcopy(config)
    lines: list[str] = []
    if way == "trainer":
        for key in BATCH_SIZES:
            config.setdefault(key, "auto")
        return (resolve_auto(config, **values) if values else config), lines
    # accelerate refuses an optimizer here beside the script's; a scheduler has lengths that only the script knows.
    dropped = {
        "accelerate": ("optimizer", "scheduler"),
        "accelerate-dummy": (),
        "lightning": ("optimizer", "scheduler"),
        "native": ("scheduler",),
    }
    for key in dropped[way]:
        if config.pop(key, None) is not None:
            lines.append(f"{key} is left out: the script brings its own" + (", or none" if key == "scheduler" else ""))
    if way == "lightning":
        lines += _leave_to_lightning(config)
    if way == "native" and config.get("train_batch_size") == "auto":
        del config["train_batch_size"]  # DeepSpeed computes it from the other two and the ranks
    if values:
        config = resolve_auto(config, **values)
    theirs = {*BATCH_SIZES, "bf16.enabled", "optimizer.params.lr", "optimizer.params.weight_decay"}
    filled = set() if way == "native" else theirs
    assumed = {path: value for path, value in ASSUMED.items() if path not in filled}
    for path in unresolved_auto(config):
        if path in assumed:
            *parents, key = path.split(".")
            place = config
            for parent in parents:
                place = place[parent]
            place[key] = assumed[path]
            lines.append(
                f"{path} is {assumed[path]}: choose yours with --set {key if key != 'enabled' else 'bf16'}=..."
            )
    if way == "native":
        config = resolve_auto(config)
    elif unresolved_auto(config):
        config.get("optimizer", {}).get("params", {}).pop("eps", None)
    return config, lines


def _leave_to_lightning(config: dict[str, Any]) -> list[str]:
    """Drop what Lightning's Trainer fills in, or refuses to find: accumulation. A line for each that was there."""
    theirs = {
        "gradient_accumulation_steps": "accumulate_grad_batches",
        "gradient_clipping": "gradient_clip_val",
        "bf16": "precision",
    }
    if config.get("train_micro_batch_size_per_gpu") == "auto":
        del config["train_micro_batch_size_per_gpu"]  # the data loader's
    if config.get("train_batch_size") == "auto":
        del config["train_batch_size"]  # DeepSpeed computes it
    return [
        f"{key} is left out: it is Lightning's Trainer({argument}=...)"
        for key, argument in theirs.items()
        if config.pop(key, None) is not None
    ]
