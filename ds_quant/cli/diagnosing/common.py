"""What the commands of `diagnose` share: which checkpoints, which text, and where the figures go."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_quant.base.commit import commit
from ds_quant.base.whole_folder import write_whole
from ds_quant.cli import report
from ds_quant.cli.evaluating import texts
from ds_quant.cli.evaluating.arguments import LONGEST_DEFAULT
from ds_quant.cli.shared import terminal
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.loaded_model import LoadedModel, load_opened
from ds_quant.cli.shared.opened_model import OpenedModel, open_model
from ds_quant.diagnostics import figures, folder
from ds_quant.diagnostics.measurement import Measurement, rows_csv
from ds_quant.planning.presets import PYTHON_SOURCE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "saved": None}


# ---- arguments


def add_checkpoints(parser: argparse.ArgumentParser, several: str) -> None:
    """`several`: what more than one checkpoint gives."""
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help=f"a run, its model, a checkpoint-N, or any model's folder; {several}",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that say which checkpoints are loaded, and how."""
    parser.add_argument(
        "--quantizers",
        default="trained",
        metavar="WHICH",
        help="trained, off, or a DeepSpeed JSON whose ds_quant.linear is put in their place (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights (default: %(default)s)")
    parser.add_argument("--device", help="default: the accelerator, or the CPU without one")


def add_text(parser: argparse.ArgumentParser) -> None:
    """Which text is run through the model."""
    add = parser.add_argument_group("text").add_argument
    add("--dataset", choices=texts.NAMES, default=PYTHON_SOURCE, help="a text by name (default: %(default)s)")
    add("--text_file", metavar="FILE", help="instead: .txt, .py, .jsonl, .json, .parquet, or a pattern of such")
    add("--text_column", default="text", help="column of a document's text (default: %(default)s)")
    add("--context_length", type=int, help=f"tokens of a sequence (default: {LONGEST_DEFAULT}, or the model's fewest)")
    add("--batch_size", type=int, default=8, help="sequences of a batch (default: %(default)s)")
    add("--batches", type=int, default=4, help="batches, from all over the text (default: %(default)s)")
    add("--validation_fraction", type=float, default=0.05, help=f"of the training, for {PYTHON_SOURCE}")
    add("--data_seed", type=int, default=42, help=f"of the training, for {PYTHON_SOURCE} (default: %(default)s)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flag that says where the figures go."""
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder of the files (default: diagnostics/NAME of the checkpoint)")
    add("--overwrite", action="store_true", help="replace files of an earlier measurement there")
    add("--no_pictures", action="store_true", help="no PNG files, and no need of matplotlib")


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"of {what} (default: %(default)s)")


def json_object(text: str) -> dict[str, Any]:
    """The type of an argument such as {"bits": 8}."""
    wanted = 'a JSON object such as {"bits": 8}, in quotes'
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r} ({error}); allowed: {wanted}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {wanted}")
    return found


# ---- models and inputs


class Subject(NamedTuple):
    """A model to measure, and its input."""

    loaded: LoadedModel
    batches: list[dict[str, torch.Tensor]]
    """input_ids and labels, int64 [batch_size, context_length]."""
    settings: dict[str, Any]
    """Of the command, for the record."""

    def named(self, found: Measurement) -> Measurement:
        """The measurement with this subject's settings."""
        return replace(found, settings={**self.settings, **found.settings})


def subjects(options: argparse.Namespace, *, with_backward: bool = False) -> Iterator[Subject]:
    """The checkpoints one after the other, each loaded when the one before may be forgotten.

    with_backward: what is run is a forward and a backward.

    Raises:
        ConfigError, CommandError: something is missing, broken or does not fit together.
    """
    check_positive(options, "batch_size", "batches")
    models = load_all(options, with_backward=with_backward)
    text = _text(options)
    for loaded in models:
        yield Subject(loaded, _batches(loaded, text, options), {**model_settings(loaded, options), "text": text.source})


def load_all(options: argparse.Namespace, *, with_backward: bool = False) -> Iterator[LoadedModel]:
    """The checkpoints as the options say, all inspected at the start, each loaded in its turn.

    Raises:
        ConfigError: something is missing, broken or does not fit together.
    """
    return _loaded([open_model(checkpoint) for checkpoint in options.checkpoints], options, with_backward)


def _loaded(opened: list[OpenedModel], options: argparse.Namespace, with_backward: bool) -> Iterator[LoadedModel]:
    asked = {"quantizers": options.quantizers, "dtype": DTYPES[options.dtype], "device": options.device}
    for one in opened:
        loaded = load_opened(one, **asked, with_backward=with_backward)
        for note in loaded.notes:
            print(note)
        loaded.model.config.use_cache = False
        yield loaded


def model_settings(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """What another person needs to load the same model."""
    return {
        "name": loaded.name,
        "quantizers": Path(options.quantizers).stem if options.quantizers.endswith(".json") else options.quantizers,
        "linear": None if loaded.linear is None else loaded.linear.model_dump(mode="json", exclude_unset=True),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise CommandError for a count below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise CommandError(f"--{name}: got {getattr(options, name)}; allowed: 1 or more; correct it")


def _text(options: argparse.Namespace) -> texts.Text:
    if options.text_file is not None:
        return texts.from_files(options.text_file, options.text_column)
    fraction = options.validation_fraction
    if not 0 < fraction < 1:
        raise CommandError(f"--validation_fraction: got {fraction}; allowed: between 0 and 1; correct it")
    return texts.by_name(options.dataset, validation_fraction=fraction, seed=options.data_seed)


def _batches(loaded: LoadedModel, text: texts.Text, options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    if loaded.tokenizer is None:
        raise CommandError(
            f"{loaded.folder}: got a model without a tokenizer; allowed: one that text can be given to; save the "
            "tokenizer of its training beside it (tokenizer.save_pretrained)"
        )
    positions = getattr(loaded.model.config, "max_position_embeddings", LONGEST_DEFAULT)
    length = options.context_length or min(positions, LONGEST_DEFAULT)
    if not 2 <= length <= positions:
        allowed = f"2 to {positions}, the positions of {loaded.name}"
        raise CommandError(f"--context_length: got {length}; allowed: {allowed}; correct it")
    ids = text.tokens(loaded.tokenizer, texts.EOS).ids
    there, size = len(ids) // length, options.batch_size
    if there < size:
        raise CommandError(
            f"{text.source}: got {len(ids)} tokens, {there} sequences of {length}; allowed: at least the {size} of a "
            "batch; give more text, a smaller --batch_size or a shorter --context_length"
        )
    count = min(options.batches, there // size) * size
    chosen = torch.linspace(0, there - 1, count).round().long()
    rows = ids[: there * length].reshape(there, length)[chosen].to(loaded.model.device)
    return [{"input_ids": part, "labels": part} for part in rows.split(size)]


def run_through(model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]], *, backward: bool) -> None:
    """A forward of each batch and, where asked for, its backward, whose gradients are not kept."""
    with torch.set_grad_enabled(backward):
        for batch in batches:
            loss = model(**batch).loss
            if backward:
                loss.backward()
                model.zero_grad(set_to_none=True)


# ---- where it goes


def run(options: argparse.Namespace, kind: str, measure: Callable[[argparse.Namespace], list[Measurement]]) -> None:
    """Measure, print the sentences, and write KIND.json, KIND.csv and the pictures, each whole or not at all.

    Raises:
        ConfigError, CommandError: it cannot be measured or written; nothing is written then.
    """
    output = _output(options, kind)
    terminal.quiet(verbose=False)
    if not options.no_pictures:
        figures.check_matplotlib()
    found = [replace(one, settings={**about(), **one.settings}) for one in measure(options)]
    drawn = [] if options.no_pictures else figures.draw(kind, found)
    for text in figures.explain(kind, found):
        print(text)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number, (figure, _) in enumerate(drawn):
            write_whole(output / _picture(kind, number), figures.png(figure))
        write_whole(output / f"{kind}.csv", rows_csv(found))
        write_whole(output / f"{kind}.json", folder.to_text(found))
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"--output: got {output} ({reason}); allowed: a folder to write in; name another") from error
    print(f"written: {output}/{kind}.json, .csv" + ("" if options.no_pictures else f" and {len(drawn)} PNG"))


def about() -> dict[str, Any]:
    """The command, when and with what it ran."""
    return {
        "command": shlex.join(terminal.words_of_command()),
        "date": datetime.date.today().isoformat(),
        "commit": commit() or "unknown",
        "versions": report.versions(),
    }


def _picture(kind: str, number: int) -> str:
    return f"{kind}.png" if number == 0 else f"{kind}-{number + 1}.png"


def output_folder(options: argparse.Namespace) -> Path:
    """The folder of the figures: --output, or one named after the first checkpoint."""
    output: Path = options.output or Path("diagnostics") / Path(options.checkpoints[0]).resolve().name
    return output


def _output(options: argparse.Namespace, kind: str) -> Path:
    """The folder to write to, checked before minutes of measuring."""
    output = output_folder(options)
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output: got {output}, a file; allowed: a folder; name another")
    there = [name for name in (f"{kind}.json", f"{kind}.csv") if (output / name).exists()]
    if there and not options.overwrite:
        raise CommandError(
            f"--output: got {output}, which has {there[0]} of an earlier measurement; allowed: a folder without it; "
            "name another, or add --overwrite"
        )
    return output
