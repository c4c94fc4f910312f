"""Where the text comes from: files, the hub, or Python's own source. One row is one document."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ds_quant.planning.presets import PYTHON_SOURCE
from pretraining import shards
from pretraining.arguments import DataArguments
from pretraining.errors import LaunchError

_KINDS = ".txt, .py, .jsonl, .json, .parquet"
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".py": "text"}
_NOT_SOURCE = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    # Code tables and one huge generated text: easy to learn by heart, and they make the validation part a lottery.
    *("encodings", "pydoc_data"),
}


class Documents(NamedTuple):
    """Documents to train and to validate on."""

    train: datasets.Dataset
    validation: datasets.Dataset


def load(args: DataArguments, *, seed: int) -> Documents:
    """The documents of both parts; no document is in both, and the same arguments always give the same parts."""
    if args.train_file is not None:
        train = read_files(args.train_file, args.text_column, "--train_file")
    elif args.dataset_name == PYTHON_SOURCE:
        train = read_files(python_source(), "text", PYTHON_SOURCE)
    else:
        hub = from_hub(args.dataset_name, args.dataset_config_name)
        train = _with_text(hub["train"], args.text_column, str(args.dataset_name))
        if args.validation_file is None and "validation" in hub:
            return Documents(train, _with_text(hub["validation"], args.text_column, str(args.dataset_name)))
    if args.validation_file is not None:
        return Documents(train, read_files(args.validation_file, args.text_column, "--validation_file"))
    return split(train, args.validation_fraction, seed=seed)


def check_files(args: DataArguments) -> None:
    """Raise for files that are missing, empty, cut or of an unknown kind: known before anything is started."""
    for flag in ("train_file", "validation_file"):
        if getattr(args, flag) is not None:
            files_of(getattr(args, flag), f"--{flag}")
    if args.train_shards is not None:
        shards.load(args.train_shards)


def python_source() -> list[str]:
    """Paths of the standard library's modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in sorted(root.rglob("*.py")) if not _NOT_SOURCE & set(p.relative_to(root).parts)]
    # Generated when Python was built: it differs from machine to machine.
    return [str(p) for p in found if not p.name.startswith("_sysconfigdata") and p.stat().st_size > 0]


def read_files(patterns: list[str], text_column: str, flag: str) -> datasets.Dataset:
    """The documents of the files that match; a .txt file is one document, a row of the other kinds is one."""
    parts = []
    for reader, files in by_reader(patterns, flag):
        text = reader == "text"
        if text:
            _check_utf8(files, flag)
        loaded = guarded(
            partial(
                datasets.load_dataset,
                reader,
                data_files=files,
                split="train",
                **({"sample_by": "document"} if text else {}),
            ),
            f"{flag} {' '.join(patterns)} cannot be read as {reader}",
            "Check that the files are whole and of the kind their names say.",
        )
        parts.append(_with_text(loaded, "text" if text else text_column, f"{flag} {files[0]}"))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def split(documents: datasets.Dataset, fraction: float, *, seed: int) -> Documents:
    """Keep about `fraction` of the documents, chosen by `seed`, for validation."""
    if len(documents) == 1:
        # One long file is the usual first experiment: its end is kept.
        text = documents[0]["text"]
        cut = max(1, int(len(text) * (1 - fraction)))
        return Documents(
            datasets.Dataset.from_dict({"text": [text[:cut]]}), datasets.Dataset.from_dict({"text": [text[cut:]]})
        )
    count = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
    parts = documents.train_test_split(test_size=count, seed=seed)
    return Documents(parts["train"], parts["test"])


def from_hub(name: str | None, config: str | None, *, streaming: bool = False) -> Any:
    """The data set of that name; it has a part `train`."""
    loaded = guarded(
        lambda: datasets.load_dataset(name, config, streaming=streaming),
        f"The data set {name!r} could not be loaded",
        "Check the name and that the Hugging Face hub can be reached, or train on files with --train_file.",
    )
    if "train" not in loaded:
        raise LaunchError(f"The data set {name!r} has no part 'train', only: {', '.join(loaded)}.")
    return loaded


def guarded(load_it: Callable[[], Any], what: str, remedy: str) -> Any:
    """The result of `load_it`; whatever it raises becomes a LaunchError that begins with `what`."""
    try:
        return load_it()
    except Exception as error:
        # `datasets` and the readers below it raise dozens of kinds; to the user they are all one: no data.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(cause).strip().splitlines()
        raise LaunchError(f"{what}: {text[0] if text else type(cause).__name__}\n{remedy}") from error


def by_reader(patterns: list[str], flag: str) -> list[tuple[str, list[str]]]:
    """The files that match, by the kind of reader that they need; always in the same order."""
    by_reader: dict[str, list[str]] = {}
    for file in files_of(patterns, flag):
        by_reader.setdefault(_READERS[Path(file).suffix.lower()], []).append(file)
    return sorted(by_reader.items())


def files_of(patterns: list[str], flag: str) -> list[str]:
    """The files that match, in a fixed order; raises LaunchError for missing, empty or unknown ones."""
    files = [file for pattern in patterns for file in _expand(pattern, flag)]
    for file in files:
        if Path(file).suffix.lower() not in _READERS:
            raise LaunchError(f"{flag} {file}: unknown kind of file. Allowed: {_KINDS}.")
    return files


def _expand(pattern: str, flag: str) -> list[str]:
    files = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise LaunchError(f"{flag} {pattern}: there is no such file. Give the path of a file, or a pattern in quotes.")
    for file in files:
        path = Path(file)
        if path.is_dir():
            raise LaunchError(f"{flag} {file} is a folder. Give its files, such as '{file}/*.txt'.")
        try:
            with path.open("rb") as opened:
                empty = not opened.read(1)
        except OSError as error:
            raise LaunchError(f"{flag} {file} cannot be read: {error.strerror or error}.") from error
        if empty:
            raise LaunchError(f"{flag} {file} is empty. Leave it out, or give a file with text.")
    return files


def _check_utf8(files: Iterable[str], flag: str) -> None:
    for file in files:
        try:
            Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LaunchError(
                f"{flag} {file} is not UTF-8 text (byte {error.start}). Convert it, for example with iconv."
            ) from error


def _with_text(loaded: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    loaded = only(loaded, column, where)
    return loaded if column == "text" else loaded.rename_column(column, "text")


def only(loaded: Any, column: str, where: str) -> Any:
    """The documents without any other column; raises LaunchError if it is missing."""
    names = loaded.column_names
    if names is None:  # a stream may not know its columns before the first row
        remedy = "Check that it is whole and of the kind its name says, and that it can be reached."
        names = list(guarded(lambda: next(iter(loaded), None), f"{where} cannot be read", remedy) or {})
    if column not in names:
        raise LaunchError(
            f"{where} has no column {column!r}; its columns are: {', '.join(names)}. Name one with --text_column."
        )
    return loaded.select_columns([column])
