"""The command line of `evaluate`, checked before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ds_quant.cli.evaluating import tasks, texts
from ds_quant.cli.shared.errors import CommandError
from ds_quant.planning.presets import PYTHON_SOURCE

DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST_DEFAULT = 1024
"""The paper's windows."""
DEFAULT_SEED = 1234
"""What lm-eval itself chooses examples with."""


@dataclass
class Options:
    """The flags of `ds_quant evaluate`, parsed."""

    checkpoints: list[str]
    quantizers: list[str]
    dataset: list[str]
    text_file: list[str]
    text_column: str
    join: str
    context_length: int | None
    stride: int | None
    max_windows: int | None
    batch_size: int
    validation_fraction: float
    data_seed: int
    tasks: list[str]
    num_fewshot: int | None
    seeds: list[int]
    include_path: str | None
    limit: float | None
    baseline: str | None
    dtype: str
    device: str | None
    output: list[Path]
    overwrite: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"command line: got {message}; allowed: the flags that --help lists; fix: correct it")


def parse(argv: list[str], *, prog: str, description: str) -> Options:
    """Read and check the command line.

    Raises:
        CommandError: a flag is wrong, nothing is to be measured, or an output cannot be written.
    """
    options = _parser(prog, description).parse_args(argv)
    if "paper" in options.tasks:
        options.num_fewshot = tasks.PAPER_FEWSHOT if options.num_fewshot is None else options.num_fewshot
        options.seeds = options.seeds or list(tasks.PAPER_SEEDS)
    options.tasks = [name for given in options.tasks for name in (tasks.PAPER if given == "paper" else (given,))]
    options.tasks = list(dict.fromkeys(options.tasks))
    options.seeds = options.seeds or [DEFAULT_SEED]
    options.dataset = texts.check_names(options.dataset)
    asked = Options(**vars(options))
    _check(asked)
    return asked


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="+", help="a run, its model, a checkpoint-N, or any model's folder")
    add(
        "--quantizers",
        nargs="+",
        default=["trained"],
        metavar="WHICH",
        help="trained, off, or DeepSpeed JSONs whose ds_quant.linear is put in their place (default: trained)",
    )

    add = parser.add_argument_group("perplexity").add_argument
    names = ", ".join(texts.NAMES)
    add("--dataset", nargs="+", default=[], metavar="NAME", help=f"{names}, or paper: {', '.join(texts.PAPER)}")
    add("--text_file", nargs="+", default=[], metavar="FILE", help=".txt, .py, .jsonl, .json, .parquet, or patterns")
    add("--text_column", default="text", help="column of a document's text (default: %(default)s)")
    add(
        "--join",
        choices=texts.JOINS,
        default=texts.BLANK_LINES,
        help="documents with an empty line between them, or closed by EOS as in training (default: %(default)s)",
    )
    add(
        "--context_length",
        type=int,
        help=f"tokens of a window (default: {LONGEST_DEFAULT}, or the fewest positions of the models)",
    )
    add("--stride", type=int, help="tokens from a window to the next (default: the context length, no overlap)")
    add("--max_windows", type=int, help="score so many whole windows, spread evenly (default: all)")
    add("--batch_size", type=int, default=8, help="windows, or questions of a task, at a time (default: %(default)s)")
    add(
        "--validation_fraction",
        type=float,
        default=0.05,
        help=f"of the training, for {PYTHON_SOURCE} (default: %(default)s)",
    )
    add("--data_seed", type=int, default=42, help=f"of the training, for {PYTHON_SOURCE} (default: %(default)s)")

    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-eval, or paper: " + ", ".join(tasks.PAPER))
    add(
        "--num_fewshot",
        type=int,
        help=f"examples before a question (default: the task's; paper: {tasks.PAPER_FEWSHOT})",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        help=f"each chooses other examples (default: {DEFAULT_SEED}; paper: {' '.join(map(str, tasks.PAPER_SEEDS))})",
    )
    add("--include_path", help="folder with task files (YAML) of your own")
    add("--limit", type=float, help="questions of a task, or their share below 1 (default: all)")

    add = parser.add_argument_group("all").add_argument
    add("--baseline", metavar="NAME", help="a checkpoint or config: gaps of the loss to it, without quantizers")
    add("--dtype", choices=DTYPES, default="auto", help="of weights and products (default: auto, as saved)")
    add("--device", help="such as cpu or cuda:1 (default: the accelerator, else the CPU)")
    add("--output", type=Path, nargs="+", default=[], metavar="FILE", help="FILE.json, FILE.md, or both")
    add("--overwrite", action="store_true", help="replace them where they exist")
    return parser


def _check(asked: Options) -> None:
    if not asked.dataset and not asked.text_file and not asked.tasks:
        raise CommandError(
            "nothing to measure: got no --dataset, no --text_file and no --tasks; allowed: at least one of them; "
            "give --dataset python-source, for instance"
        )
    for flag, least in (
        ("context_length", 2),
        ("stride", 1),
        ("max_windows", 1),
        ("batch_size", 1),
        ("num_fewshot", 0),
    ):
        value = getattr(asked, flag)
        if value is not None and value < least:
            raise CommandError(f"--{flag}: got {value}; allowed: {least} or more; correct it")
    if asked.stride is not None and asked.context_length is not None and asked.stride > asked.context_length:
        raise CommandError(
            f"--stride: got {asked.stride}; allowed: 1 to the context length of {asked.context_length}, or tokens "
            "would be left out; correct it"
        )
    if not 0 < asked.validation_fraction < 1:
        raise CommandError(
            f"--validation_fraction: got {asked.validation_fraction}; allowed: between 0 and 1; correct it"
        )
    if asked.limit is not None and not asked.limit > 0:
        raise CommandError(f"--limit: got {asked.limit}; allowed: above 0; correct it")
    for flag in ("checkpoints", "quantizers", "text_file", "seeds", "output"):
        given = list(map(str, getattr(asked, flag)))
        if twice := next((value for value in given if given.count(value) > 1), None):
            name = "CHECKPOINT" if flag == "checkpoints" else f"--{flag}"
            raise CommandError(f"{name}: got {twice} twice; allowed: each once; leave one out")
    for path in asked.output:
        _check_output(path, overwrite=asked.overwrite)


def _check_output(path: Path, *, overwrite: bool) -> None:
    if path.suffix not in (".json", ".md"):
        raise CommandError(f"--output: got {path}; allowed: names that end in .json or .md; correct it")
    if not path.parent.is_dir():
        raise CommandError(f"--output: got {path}; allowed: a folder that exists; make {path.parent}, or correct it")
    if path.is_dir() or (path.exists() and not overwrite):
        raise CommandError(
            f"--output: got {path}, which exists; allowed: a new file; name another, or replace it with --overwrite"
        )
