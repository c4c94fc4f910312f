"""Loads the text from files, the hub, or Python's own source. One row is one document."""

from __future__ import annotations

from typing import Any

import datasets
from survival.errors import LaunchError

from ds_quant.cli.shared.text_files import (
    Documents,
    files_of,
    guarded,
    python_source,
    read_files,
    split,
    with_text,
)
from ds_quant.planning.presets import PYTHON_SOURCE
from pretraining import shards
from pretraining.arguments import DataArguments


def load(args: DataArguments, *, seed: int) -> Documents:
    """Training and validation documents: disjoint, and always the same for the same arguments."""
    if args.train_file is not None:
        train = read_files(args.train_file, args.text_column, "--train_file")
    elif args.dataset_name == PYTHON_SOURCE:
        train = read_files(python_source(), "text", PYTHON_SOURCE)
    else:
        hub = from_hub(args.dataset_name, args.dataset_config_name)
        train = with_text(hub["train"], args.text_column, str(args.dataset_name))
        if args.validation_file is None and "validation" in hub:
            return Documents(train, with_text(hub["validation"], args.text_column, str(args.dataset_name)))
    if args.validation_file is not None:
        return Documents(train, read_files(args.validation_file, args.text_column, "--validation_file"))
    return split(train, args.validation_fraction, seed=seed)


def check_files(args: DataArguments) -> None:
    """Raise for files that are missing, empty, truncated or of an unknown type, before anything starts."""
    for flag in ("train_file", "validation_file"):
        if getattr(args, flag) is not None:
            files_of(getattr(args, flag), f"--{flag}")
    if args.train_shards is not None:
        shards.load(args.train_shards)


def from_hub(name: str | None, config: str | None, *, streaming: bool = False) -> Any:
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
