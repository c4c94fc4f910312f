"""The command line: Hugging Face's TrainingArguments, flags for model and data, and presets as defaults."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from survival import batches, resize
from survival.errors import LaunchError, mistake
from transformers import TrainingArguments

from ds_quant.base import manifest
from ds_quant.planning.presets import PRESETS
from pretraining.deepspeed_json import DeepSpeedJson
from pretraining.parser import Parser


def _flag(help_text: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class ModelArguments:
    """Which model, with which tokenizer."""

    preset: str | None = _flag(
        f"Recipe to start from: {', '.join(PRESETS)}. Default: tiny, unless a model is named. Other flags override it."
    )
    model_name_or_path: str | None = _flag("Trained weights to start from: a folder or a hub name.")
    config_name: str | None = _flag("Configuration of a model to train from scratch: a folder, file or hub name.")
    config_overrides: str | None = _flag("Changes to the configuration, such as `n_embd=256,n_layer=4`.")
    tokenizer_name: str | None = _flag("Tokenizer: a folder or a hub name. Default: the model's own.")
    vocab_size: int | None = _flag("Train a SentencePiece BPE tokenizer of this size on the training documents.")


@dataclass
class DataArguments:
    """Which text, and how it is split."""

    dataset_name: str | None = _flag("A data set on the hub, a folder that `datasets` reads, or `python-source`.")
    dataset_config_name: str | None = _flag("Configuration of that data set.")
    streaming: bool = _flag("Read the data set while training instead of tokenizing it first.", default=False)
    stream_lanes: int | None = _flag(
        "With --streaming: number of parts that are read in parallel; any number of processes that divides it can "
        "resume the run. Default: the number of files, up to 64."
    )
    train_shards: str | None = _flag("Folder of tokens from launchers/tokenize_corpus.py; their tokenizer is used.")
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Files or patterns: .txt (one document each), .jsonl, .json or .parquet."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files or patterns to validate on. Default: some of the documents."}
    )
    text_column: str = _flag("Column that holds the text of a document.", default="text")
    validation_fraction: float = _flag("Share of the documents kept for validation.", default=0.05)
    validation_documents: int = _flag("With --streaming: keep the first N documents for validation.", default=1000)
    context_length: int = _flag("Tokens in a training sequence.", default=1024, aliases=["--block_size"])
    max_eval_sequences: int | None = _flag("Validate on this many sequences, spread evenly. Default: all.")
    global_batch_size: int | None = _flag("Sequences per step over all ranks; sets the accumulation steps.")
    max_loss_rise: float | None = _flag(
        "End the run as diverged when the training loss stays this many nats above its best value."
    )
    overwrite_output_dir: bool = _flag("Start over if an earlier run left checkpoints.", default=False)


@dataclass
class Arguments:
    """The requested settings of one run."""

    model: ModelArguments
    data: DataArguments
    training: dict[str, Any]
    """Arguments for TrainingArguments, which initializes devices when it is created."""
    explicit: frozenset[str]
    """Names of the flags that the user gave."""

    def go_on_from(self, checkpoint: Path, config: DeepSpeedJson, *, world_size: int) -> str | None:
        """Divide the checkpoint's global batch over this number of ranks; a line for the user if that changes flags."""
        values = {**self.training, "global_batch_size": self.data.global_batch_size}
        line = resize.keep_global_batch(
            values,
            checkpoint,
            explicit=self.explicit,
            fixed=frozenset(config.fixed_flags()),
            world_size=world_size,
        )
        self.data.global_batch_size = values.pop("global_batch_size")
        self.training.update(values)
        return line

    def choose_dtype(self, checkpoint: Path | None, *, is_bf16_fast: bool, device: str) -> str | None:
        """Decide bf16 if it was left open: as the checkpoint was trained, or else by the speed of the device.

        Returns a line for the user; None if flags or JSON had decided.
        """
        if self.training.get("bf16") != "auto":
            return None
        saved = None if checkpoint is None else (manifest.read(checkpoint) or {}).get("bf16")
        self.training["bf16"] = is_bf16_fast if saved is None else bool(saved)
        name = "bf16" if self.training["bf16"] else "fp32"
        if checkpoint is not None and saved is not None:
            return f"Training in {name}, as {checkpoint.name} was."
        if is_bf16_fast:
            return f"Training in bf16, which the {device} multiplies fast (--bf16 false for fp32)."
        return f"Training in fp32: the {device} has no fast products of bf16 (--bf16 true has it nevertheless)."

    def build_training_arguments(self, config: DeepSpeedJson) -> TrainingArguments:
        """Create TrainingArguments; from here on the process group exists."""
        values = dict(self.training)
        # The checkpoint has already been chosen, and is passed to `train`.
        values.pop("resume_from_checkpoint", None)
        values["deepspeed"] = None if config.from_accelerate else config.filled()
        try:
            training = TrainingArguments(**values)
        except (ValueError, TypeError, OSError) as error:
            got, fix = f"arguments that do not fit together ({error})", "correct them"
            raise mistake("training arguments", got, "what the Trainer takes", fix) from error
        hf_config = getattr(training, "hf_deepspeed_config", None)
        if hf_config is not None and hf_config.mismatches:
            raise mistake(
                "the DeepSpeed JSON and the command line",
                "values that differ:\n" + "\n".join(hf_config.mismatches) + "\n",
                "equal ones",
                'drop the flags, or set these values to "auto" in the JSON',
            )
        return training


def parse(argv: list[str], *, world_size: int) -> tuple[Arguments, DeepSpeedJson]:
    """Parse the command line; raises LaunchError. Uses no device and no network."""
    parser = Parser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False, prog="pretrain.py")
    for action in parser._actions:
        # A flag that is absent from the namespace was not given, so a preset may fill it.
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    namespace, unknown = parser.parse_known_args(join_deepspeed_flags(argv))
    if unknown:
        raise _unknown_flag(unknown[0], parser)
    given = vars(namespace)
    explicit = frozenset(given)
    config = DeepSpeedJson.find(given.get("deepspeed"))
    config.refuse_ignored_flags(explicit)

    filled = _preset_flags(given)
    # A number in the JSON is a decision; a number in a preset is a default.
    filled.update({name: value for name, value in config.fixed_flags().items() if name not in explicit})
    values = {**_LAUNCHER_DEFAULTS, **filled, **given}
    values["preset"] = _preset_name(given)
    batches.resolve(values, explicit=explicit | config.fixed_flags().keys(), world_size=world_size)
    if "bf16" not in values and config.leaves_open("bf16.enabled"):
        values["bf16"] = "auto"
    if values.get("bf16") == "auto" and values.get("fp16"):
        values["bf16"] = False
    if values.get("data_seed") is None:
        values["data_seed"] = values.get("seed", 42)

    for name, reason in _REFUSED.items():
        if values.get(name):
            raise mistake(f"--{name}", values[name], *reason)
    model = ModelArguments(**_fields_of(ModelArguments, values))
    data = DataArguments(**_fields_of(DataArguments, values))
    _check(model, data)
    training = _fields_of(TrainingArguments, values)
    return Arguments(model, data, training, explicit), config


_LAUNCHER_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    # A NaN loss must be visible; the Trainer's filter would show the average of earlier steps.
    "logging_nan_inf_filter": False,
    # Every step has the same number of tokens.
    "dataloader_drop_last": True,
    # One line per loss, not one per node.
    "log_on_each_node": False,
    # The summary shows the loss at the start.
    "eval_on_start": True,
    "output_dir": "runs/pretrain",
}


_REFUSED = {
    "auto_find_batch_size": (
        "false, since it would change the global batch behind the schedule and the data order",
        "give a smaller --per_device_train_batch_size instead, which accumulation makes up for",
    ),
    "enable_jit_checkpoint": (
        "false, since it would take SIGTERM away from this program, which writes a checkpoint of all ranks then",
        "leave this flag out",
    ),
    "save_on_each_node": (
        "false, since it would have all nodes write the same files of an --output_dir that they share",
        "leave this flag out",
    ),
}
"""Trainer flags that conflict with what this program does: what is allowed and why, and the fix."""


def join_deepspeed_flags(argv: list[str]) -> list[str]:
    """Turn DeepSpeed's `--deepspeed --deepspeed_config FILE` into Hugging Face's `--deepspeed FILE`."""
    rest: list[str] = []
    files: list[str] = []
    words = iter([word for arg in argv for word in _split_equals(arg)])
    pending = next(words, None)
    while pending is not None:
        word, pending = pending, next(words, None)
        if word not in ("--deepspeed", "--deepspeed_config", "--deepspeed-config"):
            rest.append(word)
        elif pending is not None and not pending.startswith("--"):
            files.append(pending)
            pending = next(words, None)
        elif word != "--deepspeed":
            raise mistake("--deepspeed_config", "no path", "the path of a JSON file", "put the path behind the flag")
        else:
            files.append("")
    named = {file for file in files if file}
    if len(named) > 1:
        raise mistake("--deepspeed", " and ".join(sorted(named)), "one DeepSpeed configuration", "remove the other")
    if files and not named:
        fix = "put the path behind the flag, as in --deepspeed ds_configs/w8a8.json"
        raise mistake("--deepspeed", "no path", "the path of a JSON file", fix)
    return [*rest, "--deepspeed", *named] if named else rest


def _split_equals(arg: str) -> list[str]:
    return (
        arg.split("=", 1) if arg.startswith(("--deepspeed=", "--deepspeed_config=", "--deepspeed-config=")) else [arg]
    )


def _preset_name(given: dict[str, Any]) -> str | None:
    name = given.get("preset")
    if name is None:
        return None if {"model_name_or_path", "config_name"} & given.keys() else "tiny"
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "name one of them"
        raise mistake("--preset", repr(name), ", ".join(PRESETS), fix)
    return str(name)


def _preset_flags(given: dict[str, Any]) -> dict[str, Any]:
    name = _preset_name(given)
    if name is None:
        return {}
    flags = dict(PRESETS[name].flags)
    replaced: set[str] = set()
    if {"train_file", "dataset_name", "train_shards"} & given.keys():
        replaced |= {"dataset_name", "dataset_config_name", "streaming"}
    if {"model_name_or_path", "tokenizer_name", "vocab_size", "train_shards"} & given.keys():
        replaced |= {"tokenizer_name", "vocab_size"}
    return {key: value for key, value in flags.items() if key not in replaced}


def _fields_of(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.init and f.name in values}


def _check(model: ModelArguments, data: DataArguments) -> None:
    if model.model_name_or_path and model.config_name:
        raise mistake(
            "--config_name",
            f"{model.config_name} beside --model_name_or_path {model.model_name_or_path}",
            "one of them: a configuration to start from scratch, or trained weights to go on from",
            "remove the other",
        )
    if data.train_file is None and data.dataset_name is None and data.train_shards is None:
        raise mistake(
            "--train_file",
            "no text to train on",
            "files, a data set or shards",
            "give --train_file, --dataset_name, --train_shards or --preset",
        )
    if data.train_shards is not None:
        given: dict[str, Any] = {
            "train_file": data.train_file,
            "dataset_name": data.dataset_name,
            "streaming": data.streaming,
        }
        given |= {"validation_file": data.validation_file, "vocab_size": model.vocab_size}
        for name in [name for name, value in given.items() if value]:
            raise mistake(
                f"--{name}",
                f"{given[name]} beside --train_shards {data.train_shards}",
                "nothing beside shards, which bring text, validation text and tokenizer",
                f"leave --{name} out",
            )
    if data.stream_lanes is not None and not data.streaming:
        fix = "add --streaming, or leave --stream_lanes out"
        raise mistake("--stream_lanes", data.stream_lanes, "lanes for --streaming", fix)
    if data.context_length < 2:
        raise mistake("--context_length", data.context_length, "2 tokens or more", "correct it")
    if data.validation_file is None and not 0 < data.validation_fraction < 1:
        raise mistake("--validation_fraction", data.validation_fraction, "between 0 and 1", "correct it")
    if data.max_loss_rise is not None and not data.max_loss_rise > 0:
        raise mistake("--max_loss_rise", data.max_loss_rise, "above 0 nats", "leave it out for no limit")
    if data.streaming and data.dataset_name is None:
        raise mistake("--streaming", "no --dataset_name", "data sets, since files are read as they are", "leave it out")


def _unknown_flag(word: str, parser: argparse.ArgumentParser) -> LaunchError:
    allowed = "the flags that --help lists"
    if not word.startswith("-"):
        return mistake("command line", f"{word!r}, which belongs to no flag", allowed, "put its flag before it")
    name = word.split("=", 1)[0]
    close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
    fix = f"did you mean {close[0]}?" if close else "remove it"
    return mistake("command line", f"the unknown flag {name}", allowed, fix)
