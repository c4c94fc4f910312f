"""Data sets by their names on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import datasets
from survival.errors import LaunchError

from ds_quant.cli.shared.text_files import guarded


def load(name: str | None, config: str | None, *, streaming: bool = False) -> Any:
    """The data set of that name; it has a split `train`."""
    loaded = guarded(
        lambda: datasets.load_dataset(name, config, streaming=streaming),
        f"--dataset_name {name}",
        "a data set that could not be loaded",
        "one that can",
        "check the name and that the Hugging Face hub can be reached, or train on files with --train_file",
    )
    if "train" not in loaded:
        got = f"a data set with the parts {', '.join(loaded)}"
        raise LaunchError(f"--dataset_name {name}: got {got}; allowed: one with a part 'train'; fix: name another")
    return loaded
