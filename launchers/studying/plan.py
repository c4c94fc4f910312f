"""Which runs were asked for, where each of them lies, and the command that trains it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from corpora import shards
from sweeping.paper import FOLDER

from ds_quant.base.whole_folder import write_whole
from ds_quant.cli.shared.errors import CommandError
from studying import protocol, sections
from studying.rows import Row

ROOT = FOLDER.parent
PRETRAIN = ROOT / "launchers" / "pretrain.py"
_EVALUATIONS = 5
_WARM_UP = 0.1
_FLAGS = (
    *("--weight_decay", "0.1", "--max_grad_norm", "1.0"),
    *("--adam_beta1", "0.9", "--adam_beta2", "0.999", "--adam_epsilon", "1e-8"),
    *("--max_eval_sequences", "256", "--eval_strategy", "steps"),
)
"""Of every run: the paper's recipe, but for its length. Its cosine is in the JSON."""


@dataclass(frozen=True)
class Key:
    """What one run is: two runs with the same key are the same."""

    size: str
    family: str
    ratio: float
    """Tokens a parameter that were asked for."""
    rate: float
    """Peak learning rate."""
    row: str
    seed: int

    @property
    def group(self) -> tuple[str, str, float, float]:
        """(size, family, ratio, rate): what the runs of one table have in common."""
        return self.size, self.family, self.ratio, self.rate


@dataclass(frozen=True)
class Settings:
    """What all runs of one call share."""

    runs: Path
    """Root of their folders."""
    corpus: Path
    """Tokens as launchers/tokenize_corpus.py writes them."""
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        """fp32 costs every CPU the same, and leaves no rounding but the quantizers' in a gap."""
        return "float32" if self.device == "cpu" else "bfloat16"

    @cached_property
    def index(self) -> shards.Index:
        """Of the corpus. Raises LaunchError where it is not whole."""
        return shards.load(str(self.corpus))

    @cached_property
    def text(self) -> str:
        """Tells corpora apart."""
        told = [[file.sha256 for file in files] for files in (self.index.train, self.index.validation)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def fingerprint(row: Row) -> str:
    """Of a row's settings and the flags of all runs: figures with another one are of another experiment."""
    told = [row.own, _FLAGS, _WARM_UP]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def keys(
    rows: Iterable[str],
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    size: str,
    family: str,
    ratio: float,
) -> list[Key]:
    """All of them, seed by seed and rate by rate, so that the first figures cover every row."""
    names = list(rows)
    return [Key(size, family, ratio, rate, row, seed) for seed in seeds for rate in rates for row in names]


def folder(key: Key, row: Row, settings: Settings) -> Path:
    """The run's own. Other settings of the row, or another text, lead to another folder."""
    group = f"{key.size}-{key.family}-{key.ratio:g}-{settings.dtype}-{settings.text[:6]}"
    return settings.runs / group / f"rate-{key.rate:g}" / f"{key.row}.{fingerprint(row)[:6]}" / f"seed-{key.seed}"


AGAIN = "again"
"""Folder below `Settings.runs` of runs that `repeat` trains: of a fresh clone, whose CSV has others, the only ones."""


def finished(key: Key, row: Row, settings: Settings) -> Path:
    """Folder of a run of the CSV that still has its model, or of the same that `repeat` has trained.

    Raises:
        CommandError: neither is there.
    """
    again = dataclasses.replace(settings, runs=settings.runs / AGAIN)
    folders = [folder(key, row, where) for where in (settings, again)]
    for one in folders:
        if (one / "model").is_dir():
            return one
    raise CommandError(
        f"--runs: got no {folders[0] / 'model'}; allowed: the model of each run that others are made of; "
        f"train it by `study.py repeat --rows {key.row} --seeds {key.seed}`"
    )


def steps(key: Key, settings: Settings) -> int:
    """Steps of the run."""
    return protocol.SIZES[key.size].steps(key.family, settings.index.vocab_size, key.ratio)


def config_text(key: Key, row: Row, settings: Settings) -> str:
    """The DeepSpeed JSON of the run."""
    return sections.filled_in(row.config, layers=protocol.SIZES[key.size].layers, steps=steps(key, settings))


def write_config(key: Key, row: Row, settings: Settings) -> Path:
    """Write the row's DeepSpeed JSON beside its runs, if it is not there."""
    config, text = folder(key, row, settings).parent / "config.json", config_text(key, row, settings)
    if not config.exists() or config.read_text(encoding="utf-8") != text:
        config.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config, text)
    return config


def command(key: Key, row: Row, settings: Settings) -> list[str]:
    """The command that trains it, from its last checkpoint if it has one. Writes the DeepSpeed JSON that it names."""
    launcher: list[str] = []
    if row.ranks > 1:
        # The time that a rank has for its last checkpoint.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launcher += ["--nproc-per-node", str(row.ranks), "--shutdown-timeout", "300"]
    return [sys.executable, *launcher, str(PRETRAIN), *pretrain_arguments(key, row, settings)]


def pretrain_arguments(key: Key, row: Row, settings: Settings) -> list[str]:
    """That command without the program. Writes the DeepSpeed JSON."""
    size = protocol.SIZES[key.size]
    out, config = folder(key, row, settings), write_config(key, row, settings)
    total = steps(key, settings)
    every = -(-total // _EVALUATIONS)
    micro_batch = size.micro_batch // row.ranks
    overrides = {**size.overrides(key.family), **_understood(row.overrides, key.family)}
    return [
        *("--deepspeed", str(config), "--output_dir", str(out)),
        *("--preset", "tiny" if key.family == "llama" else "tiny-gpt2", "--train_shards", str(settings.corpus)),
        *("--config_overrides", ",".join(f"{name}={value}" for name, value in overrides.items())),
        *("--context_length", str(size.context_length), "--global_batch_size", str(size.batch)),
        *("--per_device_train_batch_size", str(micro_batch)),
        *("--per_device_eval_batch_size", str(micro_batch)),
        *("--max_steps", str(total), "--warmup_steps", str(max(1, round(_WARM_UP * total)))),
        *("--learning_rate", repr(key.rate), "--seed", str(key.seed), *_FLAGS, "--eval_steps", str(every)),
        *("--bf16", "true" if settings.dtype == "bfloat16" else "false"),
        *("--save_strategy", "steps", "--save_steps", str(every), "--save_total_limit", "1"),
        *("--overwrite_output_dir", "false", "--resume_from_checkpoint", "auto"),
        *("--logging_steps", "10", "--disable_tqdm", "true"),
    ]


def _understood(overrides: dict[str, str], family: str) -> dict[str, str]:
    # Both families have this one.
    assert set(overrides) <= {"tie_word_embeddings"}, family
    return overrides


def import_path() -> str:
    """PYTHONPATH of the programs that are started: this checkout first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def environment(device: str) -> dict[str, str]:
    """What runs have in their environment beside what is there."""
    found = {"OMP_NUM_THREADS": "1", "PYTHONPATH": import_path()}
    if device == "cpu":
        # No row compiles anything on a CPU, and importing torch's compiler is a fifth of the start.
        found |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    return found


def chosen(names: Sequence[str], known: Iterable[str], flag: str) -> list[str]:
    """The names as given, each of them known. Raises CommandError."""
    allowed = list(known)
    for name in names:
        if name not in allowed:
            raise CommandError(f"{flag}: got {name!r}; allowed: {', '.join(allowed)}; correct it")
    return list(dict.fromkeys(names))


def ratio_of(text: str) -> float:
    """Tokens a parameter. Raises CommandError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise CommandError(f"--ratio: got {text!r}; allowed: tokens a parameter, above 0; correct it")
    return value


def shown(key: Key) -> str:
    """A run in one word a part, for the terminal."""
    return json.dumps([key.size, key.family, f"D/N {key.ratio:g}", f"rate {key.rate:g}", key.row, f"seed {key.seed}"])
