"""The texts that perplexity is measured on: test sets by name, Python's own source, or files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_quant.cli.shared import text_files, token_ids
from ds_quant.cli.shared.errors import CommandError
from ds_quant.planning.presets import PYTHON_SOURCE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BLANK_LINES, EOS = "blank-lines", "eos"
JOINS = (BLANK_LINES, EOS)


class _HubText(NamedTuple):
    """Where the hub has the test part of a data set."""

    name: str
    config: str | None
    files: str | None
    """For data sets that are still scripts, which `datasets` no longer runs: the hub's own conversion to Parquet."""
    column: str


_CONVERTED = "hf://datasets/{}@refs%2Fconvert%2Fparquet/{}/test/0000.parquet"
HUB = {
    "wikitext2": _HubText("Salesforce/wikitext", "wikitext-2-v1", None, "text"),
    "wikitext103": _HubText("Salesforce/wikitext", "wikitext-103-v1", None, "text"),
    "wikitext2-raw": _HubText("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text"),
    "ptb": _HubText(
        "ptb-text-only/ptb_text_only",
        None,
        _CONVERTED.format("ptb-text-only/ptb_text_only", "penn_treebank"),
        "sentence",
    ),
    "1bw": _HubText(
        "billion-word-benchmark/lm1b", None, _CONVERTED.format("billion-word-benchmark/lm1b", "plain_text"), "text"
    ),
}
"""Data sets of the hub by the names of --dataset. The raw test part of WikiText-103 is that of WikiText-2."""
PAPER = ("wikitext103", "wikitext2", "ptb", "1bw")
"""The four of Chitsaz et al., EMNLP 2024. Their figures for the two WikiTexts differ: these were not the raw ones."""
NAMES = (*HUB, PYTHON_SOURCE)


@dataclass
class Text:
    """A named list of documents."""

    name: str
    documents: list[str]
    source: str
    """Where it is from, for the record."""
    _tokens: dict[tuple[str, str], Tokens] = field(default_factory=dict)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, join: str) -> Tokens:
        """The documents as one row of ids, without special tokens but what `join` puts; made once a tokenizer.

        Args:
            join: `blank-lines`: the documents with an empty line between them, as one text. `eos`: each document
                closed by EOS, as training lays them end to end.

        Raises:
            CommandError: there is no EOS to close them with.
        """
        if join == EOS and tokenizer.eos_token_id is None:
            raise CommandError(
                "--join: got eos for a tokenizer without an end-of-sequence token; allowed: blank-lines; give that, or "
                "set eos_token in its tokenizer_config.json"
            )
        import torch

        key = (token_ids.fingerprint(tokenizer), join)
        if key not in self._tokens:
            self._tokens[key] = Tokens(
                name=self.name,
                ids=torch.tensor(_encode(self.documents, tokenizer, join), dtype=torch.int64),
                num_bytes=max(1, sum(len(document.encode()) for document in self._counted(join))),
                num_words=sum(len(document.split()) for document in self.documents),
            )
        return self._tokens[key]

    def _counted(self, join: str) -> list[str]:
        return ["\n\n".join(self.documents)] if join == BLANK_LINES else self.documents


@dataclass(frozen=True)
class Tokens:
    """A text as one tokenizer sees it."""

    name: str
    ids: Tensor
    """int64 [tokens]."""
    num_bytes: int
    """Of the text in UTF-8."""
    num_words: int
    """Of the text, separated by white space."""


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, join: str) -> list[int]:
    if join == EOS:
        return [token for ids in token_ids.encoder(tokenizer)(texts) for token in ids]
    # verbose: a text longer than the model's context is what windows are for.
    ids: list[int] = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def by_name(name: str, *, validation_fraction: float, seed: int) -> Text:
    """The test part of a data set of the hub, or the validation documents of the default job.

    Args:
        validation_fraction: for `python-source`: the share of the documents that was kept for validation.
        seed: for `python-source`: the --data_seed of the training, which chose them.

    Raises:
        CommandError: the hub cannot be reached, or has no such data set any more.
    """
    if name == PYTHON_SOURCE:
        every = text_files.read_files(text_files.python_source(), "text", PYTHON_SOURCE)
        held = text_files.split(every, validation_fraction, seed=seed).validation
        return Text(name, held["text"][:], f"{PYTHON_SOURCE}, validation_fraction {validation_fraction}, seed {seed}")
    asked = HUB[name]
    datasets = text_files.need_datasets()
    load: Callable[[], Any] = partial(datasets.load_dataset, asked.name, asked.config, split="test")
    if asked.files is not None:
        load = partial(datasets.load_dataset, "parquet", data_files={"test": asked.files}, split="test")
    loaded = text_files.guarded(
        load,
        f"--dataset {name}",
        f"a test part of {asked.name} that could not be loaded",
        "one that can",
        "check that the Hugging Face hub can be reached, or fetch the text elsewhere and give it with --text_file",
    )
    rows = text_files.only(loaded, asked.column, f"--dataset {name}")[asked.column][:]
    return Text(name, rows, " ".join(filter(None, (asked.name, asked.config, "test", asked.files))))


def from_files(pattern: str, column: str) -> Text:
    """The documents of the files that match; named after them.

    Raises:
        CommandError: no such file, an empty one, or one of another kind than .txt, .py, .jsonl, .json and .parquet.
    """
    loaded = text_files.read_files([pattern], column, "--text_file")
    return Text(Path(pattern).name, loaded["text"][:], str(Path(pattern).absolute()))


def check_names(names: list[str]) -> list[str]:
    """The names with `paper` written out.

    Raises:
        CommandError: a name that is not known.
    """
    written = [name for given in names for name in (PAPER if given == "paper" else (given,))]
    for name in written:
        if name not in NAMES:
            raise CommandError(
                f"--dataset: got {name!r}; allowed: {', '.join(NAMES)}, or paper for {', '.join(PAPER)}; correct it, "
                "or give a file with --text_file"
            )
    return list(dict.fromkeys(written))
