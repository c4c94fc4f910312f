"""Documents from files or from Python's own source. One row is one document."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_quant.cli.shared.errors import CommandError

if TYPE_CHECKING:
    import datasets

_KINDS = ".txt, .py, .jsonl, .json, .parquet"
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".py": "text"}
_NOT_SOURCE = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    # Code tables and one huge generated text: easy to learn by heart, and they make the validation part a lottery.
    *("encodings", "pydoc_data"),
}


def need_datasets() -> Any:
    """The package `datasets`; only what reads texts needs it. Raises CommandError without it."""
    try:
        import datasets
    except ImportError as error:
        raise CommandError(
            f"texts: got no package datasets ({error}); allowed: datasets 5.2 or newer; pip install 'ds_quant[launch]'"
        ) from error
    return datasets


UNREADABLE = (
    "what cannot be read",
    "a whole file or data set",
    "check that it is whole and of the kind its name says, and that it can be reached",
)
"""What was got, what is allowed and the fix, for `guarded`."""


class Documents(NamedTuple):
    """Documents to train and to validate on."""

    train: datasets.Dataset
    validation: datasets.Dataset


def python_source() -> list[str]:
    """Paths of the standard library's modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in sorted(root.rglob("*.py")) if not _NOT_SOURCE & set(p.relative_to(root).parts)]
    # Generated when Python was built: it differs from machine to machine.
    return [str(p) for p in found if not p.name.startswith("_sysconfigdata") and p.stat().st_size > 0]


def read_files(patterns: list[str], text_column: str, flag: str) -> datasets.Dataset:
    """The documents of the files that match; a .txt file is one document, a row of the other kinds is one."""
    datasets = need_datasets()
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
            f"{flag} {' '.join(patterns)}",
            f"what cannot be read as {reader}",
            f"whole files of {reader}",
            "check that the files are whole and of the kind their names say",
        )
        parts.append(with_text(loaded, "text" if text else text_column, f"{flag} {files[0]}"))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def split(documents: datasets.Dataset, fraction: float, *, seed: int) -> Documents:
    """Keep about `fraction` of the documents, chosen by `seed`, for validation."""
    if len(documents) == 1:
        datasets = need_datasets()
        # One long file is the usual first experiment: its end is kept.
        text = documents[0]["text"]
        cut = max(1, int(len(text) * (1 - fraction)))
        return Documents(
            datasets.Dataset.from_dict({"text": [text[:cut]]}), datasets.Dataset.from_dict({"text": [text[cut:]]})
        )
    count = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
    parts = documents.train_test_split(test_size=count, seed=seed)
    return Documents(parts["train"], parts["test"])


def guarded(load_it: Callable[[], Any], where: str, got: str, allowed: str, fix: str) -> Any:
    """The result of `load_it`; whatever it raises becomes a CommandError of these words, with the reason."""
    try:
        return load_it()
    except Exception as error:
        # `datasets` and the readers below it raise dozens of kinds; to the user they are all one: no data.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(cause).strip().splitlines()
        reason = text[0] if text else type(cause).__name__
        raise CommandError(f"{where}: got {got} ({reason}); allowed: {allowed}; fix: {fix}") from error


def by_reader(patterns: list[str], flag: str) -> list[tuple[str, list[str]]]:
    """The files that match, by the kind of reader that they need; always in the same order."""
    by_reader: dict[str, list[str]] = {}
    for file in files_of(patterns, flag):
        by_reader.setdefault(_READERS[Path(file).suffix.lower()], []).append(file)
    return sorted(by_reader.items())


def files_of(patterns: list[str], flag: str) -> list[str]:
    """The files that match, in a fixed order; raises CommandError for missing, empty or unknown ones."""
    files = [file for pattern in patterns for file in _expand(pattern, flag)]
    for file in files:
        if Path(file).suffix.lower() not in _READERS:
            raise CommandError(f"{flag}: got {file}, an unknown kind of file; allowed: {_KINDS}; fix: convert it")
    return files


def _expand(pattern: str, flag: str) -> list[str]:
    files = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    if not files:
        allowed = "the path of a file, or a pattern in quotes"
        raise CommandError(f"{flag}: got {pattern}, but there is no such file; allowed: {allowed}; fix: correct it")
    for file in files:
        path = Path(file)
        if path.is_dir():
            fix = f"give its files, such as '{file}/*.txt'"
            raise CommandError(f"{flag}: got {file}, which is a folder; allowed: files; fix: {fix}")
        try:
            with path.open("rb") as opened:
                empty = not opened.read(1)
        except OSError as error:
            got = f"{file}, which cannot be read ({error.strerror or error})"
            raise CommandError(f"{flag}: got {got}; allowed: readable files; fix: change its permissions") from error
        if empty:
            raise CommandError(
                f"{flag}: got {file}, which is empty; allowed: files with text; fix: leave this file out"
            )
    return files


def _check_utf8(files: Iterable[str], flag: str) -> None:
    for file in files:
        try:
            Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(
                f"{flag}: got {file}, which is not UTF-8 text (byte {error.start}); allowed: text in UTF-8; "
                "fix: convert it, for example with iconv"
            ) from error


def with_text(loaded: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """The documents with `column` alone, called "text". Raises CommandError if it is missing."""
    loaded = only(loaded, column, where)
    return loaded if column == "text" else loaded.rename_column(column, "text")


def only(loaded: Any, column: str, where: str) -> Any:
    """The documents without any other column; raises CommandError if it is missing."""
    names = loaded.column_names
    if names is None:  # a stream may not know its columns before the first row
        names = list(guarded(lambda: next(iter(loaded), None), where, *UNREADABLE) or {})
    if column not in names:
        raise CommandError(
            f"{where}: got no column {column!r}; allowed: its columns, {', '.join(names)}; "
            "fix: name one with --text_column"
        )
    return loaded.select_columns([column])
