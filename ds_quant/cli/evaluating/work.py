"""One evaluation from its options to its rows, in the order in which mistakes are cheapest to find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_quant.base import manifest
from ds_quant.cli.evaluating import perplexity, texts
from ds_quant.cli.evaluating.arguments import LONGEST_DEFAULT, Options
from ds_quant.cli.evaluating.results import Row
from ds_quant.cli.evaluating.tasks import Tasks
from ds_quant.cli.evaluating.texts import Text
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.loaded_model import LoadedModel, device_named, load_opened
from ds_quant.cli.shared.opened_model import OpenedModel, choose, open_model, short_name
from ds_quant.cli.shared.run_folder import of_folder


@dataclass(frozen=True)
class _Job:
    """A row of the result: a checkpoint, evaluated with one choice of quantizers."""

    opened: OpenedModel
    name: str
    quantizers: str
    label: str


@dataclass(frozen=True)
class Work:
    """The planned measurements, after everything that can be checked beforehand."""

    asked: Options
    jobs: list[_Job]
    texts: list[Text]
    tasks: Tasks | None
    context_length: int
    stride: int
    notes: list[str]

    def run(self, say: Callable[[str], None]) -> list[Row]:
        """All rows; `say` is called as each one begins.

        Raises:
            CommandError, ConfigError: a model cannot be loaded, or does not go with a text or task.
        """
        rows = []
        for number, job in enumerate(self.jobs, 1):
            say(f"{number} of {len(self.jobs)}: {job.name}, quantizers {job.label}")
            dtype = None if self.asked.dtype == "auto" else getattr(torch, self.asked.dtype)
            loaded = load_opened(job.opened, quantizers=job.quantizers, dtype=dtype, device=self.asked.device)
            rows.append(self._row(job, loaded))
        return rows

    def _row(self, job: _Job, loaded: LoadedModel) -> Row:
        if loaded.tokenizer is None:
            raise CommandError(
                f"{loaded.folder}: got no tokenizer; allowed: a model with its tokenizer; copy tokenizer.json and "
                "tokenizer_config.json of its training into the folder"
            )
        config, seed = _config_of(loaded.folder)
        row = Row(job.name, config, seed, job.label, _about(loaded, job))
        for text in self.texts:
            tokens = text.tokens(loaded.tokenizer, self.asked.join)
            vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
            if len(tokens.ids) and int(tokens.ids.max()) >= vocabulary:
                raise CommandError(
                    f"{loaded.folder}: got a tokenizer with the id {int(tokens.ids.max())} and a model of {vocabulary} "
                    "ids; allowed: the tokenizer of the training; copy its files into the folder"
                )
            row.perplexity[text.name] = perplexity.measure(
                loaded.model,
                tokens,
                length=self.context_length,
                stride=self.stride,
                batch_size=self.asked.batch_size,
                max_windows=self.asked.max_windows,
            )
        if self.tasks is not None:
            row.tasks = self.tasks.run(loaded.model, loaded.tokenizer, self.asked.batch_size)
        return row


def plan(asked: Options) -> Work:
    """Look through every folder, JSON, text and task.

    Raises:
        CommandError, ConfigError, CommandError: whatever is missing, broken or does not go together.
    """
    device_named(asked.device)
    opened = [open_model(folder) for folder in asked.checkpoints]
    notes: list[str] = []
    jobs = _jobs(asked, opened, notes)
    length, stride = _windows(asked, opened)
    tasks = None
    if asked.tasks:
        tasks = Tasks(
            asked.tasks,
            include_path=asked.include_path,
            num_fewshot=asked.num_fewshot,
            seeds=asked.seeds,
            limit=asked.limit,
        )
    found = [
        texts.by_name(name, validation_fraction=asked.validation_fraction, seed=asked.data_seed)
        for name in asked.dataset
    ]
    found += [texts.from_files(pattern, asked.text_column) for pattern in asked.text_file]
    if twice := [name for name, count in Counter(text.name for text in found).items() if count > 1]:
        raise CommandError(f"--text_file: got two texts named {twice[0]}; allowed: names that differ; rename one")
    return Work(asked, jobs, found, tasks, length, stride, notes)


def _jobs(asked: Options, opened: list[OpenedModel], notes: list[str]) -> list[_Job]:
    """All rows to be, checkpoint by checkpoint. What would be the same row twice is there once."""
    short = Counter(each.name for each in opened)
    stems = Counter(Path(quantizers).stem for quantizers in asked.quantizers)
    jobs = []
    for each, given in zip(opened, asked.checkpoints, strict=True):
        name = each.name if short[each.name] == 1 else given
        for quantizers in asked.quantizers:
            linear, said = choose(each, quantizers)
            notes += [line for line in said if line not in notes]
            if linear is None and quantizers == "trained" and not each.exported and "off" in asked.quantizers:
                notes.append(f"{name} was trained without quantizers in its forward: its row is `off`")
                continue
            stem = Path(quantizers).stem
            label = quantizers if quantizers in ("trained", "off") or stems[stem] > 1 else stem
            jobs.append(_Job(each, name, quantizers, label))
            if linear is not None and linear.activation is not None:
                _note_activations(linear, label, notes)
    for (config, seed), count in Counter(_config_of(each.path) for each in opened).items():
        if count > 1:
            notes.append(
                f"{count} models are {config}{'' if seed is None else f' with seed {seed}'}: means take the first"
            )
    if asked.baseline is not None:
        _check_baseline(asked.baseline, jobs)
    return jobs


def _note_activations(linear: Any, label: str, notes: list[str]) -> None:
    line = None
    if linear.activation.outlier_share is not None:
        line = f"{label}: outlier channels are those of a batch, so that figures depend on --batch_size"
    elif linear.activation.granularity in ("tensor", "channel"):
        line = f"{label}: activations share scales over a batch, so that figures depend on --batch_size"
    elif linear.activation.rounding == "stochastic":
        line = f"{label}: activations are rounded by a fixed key, so that figures depend on --batch_size"
    if line is not None and line not in notes:
        notes.append(line)


def _check_baseline(baseline: str, jobs: list[_Job]) -> None:
    without = [job for job in jobs if choose(job.opened, job.quantizers)[0] is None and not job.opened.exported]
    known = {job.name for job in without} | {_config_of(job.opened.path)[0] for job in without}
    if baseline not in known:
        allowed = ", ".join(sorted(known)) or "none here"
        raise CommandError(
            f"--baseline: got {baseline!r}; allowed: a model or config with a row without quantizers ({allowed}); "
            "correct it, or add off to --quantizers"
        )


def _config_of(path: Path) -> tuple[str, int | None]:
    """Config and seed of the run that the model in `path` is of; a checkpoint-N is a config of its own."""
    if path.name == short_name(path):
        return of_folder(path, path.parent)
    config, seed = of_folder(path.parent, path.parent.parent)
    return config if path.name == "model" else f"{config}/{path.name}", seed


def _windows(asked: Options, opened: list[OpenedModel]) -> tuple[int, int]:
    """The context length and the stride, in tokens, that all the models allow."""
    positions = {each.name: each.positions for each in opened}
    limits = [limit for limit in positions.values() if limit is not None]
    length = asked.context_length or min([LONGEST_DEFAULT, *limits])
    for name, limit in positions.items():
        if limit is not None and length > limit:
            raise CommandError(
                f"--context_length: got {length}; allowed: at most the {limit} positions of {name}; give that, or "
                "leave the flag out"
            )
    stride = asked.stride or length
    if stride > length:
        raise CommandError(
            f"--stride: got {stride}; allowed: 1 to the context length of {length}, or tokens would be left out; "
            "correct it"
        )
    return length, stride


def _about(loaded: LoadedModel, job: _Job) -> dict[str, Any]:
    """What the row's file tells about the model: files, digest, step, quantizers."""
    files = sorted(path.name for path in loaded.folder.glob("*.safetensors"))
    weights = manifest.digest(loaded.folder, files)
    return {
        "folder": str(loaded.folder),
        "step": loaded.step,
        "quantizers_from": job.quantizers,
        "linear": None if loaded.linear is None else loaded.linear.model_dump(mode="json"),
        "trained": None if loaded.trained is None else loaded.trained.model_dump(mode="json"),
        "exported": job.opened.exported,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "num_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "weights": [entry._asdict() for entry in weights],
    }
