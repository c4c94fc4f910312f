"""Loads the text from files, the hub, or Python's own source. One row is one document."""

from __future__ import annotations

from corpora import hub, shards

from ds_quant.cli.shared.text_files import (
    Documents,
    files_of,
    python_source,
    read_files,
    split,
    with_text,
)
from ds_quant.planning.presets import PYTHON_SOURCE
from pretraining.arguments import DataArguments


def load(args: DataArguments, *, seed: int) -> Documents:
    """Training and validation documents: disjoint, and always the same for the same arguments."""
    if args.train_file is not None:
        train = read_files(args.train_file, args.text_column, "--train_file")
    elif args.dataset_name == PYTHON_SOURCE:
        train = read_files(python_source(), "text", PYTHON_SOURCE)
    else:
        found = hub.load(args.dataset_name, args.dataset_config_name)
        train = with_text(found["train"], args.text_column, str(args.dataset_name))
        if args.validation_file is None and "validation" in found:
            return Documents(train, with_text(found["validation"], args.text_column, str(args.dataset_name)))
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
