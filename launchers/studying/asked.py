"""What the flags of launchers/study.py ask for: which runs, on which text, and where they are kept."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sweeping import matrix

from ds_quant.cli.shared.errors import CommandError
from studying import other_domain, plan, processors, protocol, results, texts, verdicts
from studying.plan import Key, Settings
from studying.rows import BASELINE, Row, all_rows
from studying.training import Training

Measure = Callable[[Sequence[Key], Mapping[str, Row], Settings, Path, Path], None]


def keys(options: argparse.Namespace, size: str, family: str, rate: float) -> list[Key]:
    """Runs of the rows, seeds and multiples of the tuned `rate` that were asked for, the baseline's among them."""
    known = all_rows()
    names = plan.chosen(options.rows or list(known), known, "--rows")
    # Nothing is told of a row without its baseline.
    most = _most_ranks(options)
    names = [name for name in names if known[name].is_of(family) and (most is None or known[name].ranks <= most)]
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    return plan.keys(
        names,
        seeds=protocol.SEEDS if options.seeds is None else matrix.seeds(options.seeds),
        rates=[scale * rate for scale in options.scales],
        size=size,
        family=family,
        ratio=plan.ratio_of(options.ratio),
    )


def more_seeds(options: argparse.Namespace, training: Training, size: str, family: str, rate: float) -> list[Key]:
    """Runs of the protocol's further seeds, of rows whose effect is small, and the baseline's."""
    ratio = plan.ratio_of(options.ratio)
    asked = {key.row for key in keys(options, size, family, rate)}
    rows = [training.rows[name] for name in training.rows if name in asked]
    found = list(results.read(training.csv).values())
    more: list[Key] = []
    for scale in options.scales:
        judged = verdicts.judge(rows, found, (size, family, ratio, scale * rate))
        small = [entry.row.name for entry in judged if entry.row.name != BASELINE and verdicts.needs_more_seeds(entry)]
        if small:
            names, seeds = [BASELINE, *small], protocol.MORE_SEEDS
            more += plan.keys(names, seeds=seeds, rates=[scale * rate], size=size, family=family, ratio=ratio)
    return more


def tuning(size: str, family: str, ratio: float, rates: Sequence[float]) -> list[Key]:
    """Runs of the baseline with these learning rates."""
    return plan.keys([BASELINE], seeds=[0], rates=rates, size=size, family=family, ratio=ratio)


def tuned(
    training: Training, size: str, family: str, ratio: float, left: Callable[[Sequence[Key]], Sequence[Key]]
) -> tuple[list[Key], float | None]:
    """The runs that tune the learning rate, and the one of the lowest loss; None while `left` leaves some of them over.

    There are more of them while the best rate is at an end.
    """
    found, rates = [], list(protocol.RATES)
    while True:
        found += tuning(size, family, ratio, rates)
        if left(found):
            return found, None
        known = list(results.read(training.csv).values())
        rate = results.tuned_rate(known, size, family, ratio)
        if rate is not None:
            return found, rate
        best = results.best_rate(known, size, family, ratio)
        assert best is not None
        rates = [best / 2, best * 2]


def _most_ranks(options: argparse.Namespace) -> int | None:
    """Ranks that a run can have: one in a task of a job array, one for each GPU; None: any number."""
    if options.most_ranks is None and options.device == "cuda":
        import torch

        return max(1, torch.cuda.device_count())
    ranks: int | None = options.most_ranks
    return ranks


def _check(options: argparse.Namespace) -> None:
    """Mistakes end it before hours of tuning, not after."""
    known = all_rows()
    rows = plan.chosen(options.rows or [], known, "--rows")
    plan.chosen(options.sizes, protocol.SIZES, "--sizes")
    families, most = plan.chosen(options.families, protocol.FAMILIES, "--families"), _most_ranks(options)
    for name in rows:
        if not any(known[name].is_of(family) for family in families):
            allowed = ", ".join(known[name].families)
            raise CommandError(f"--rows: got {name!r} for {', '.join(families)}; allowed: {allowed}; add --families")
        if most is not None and known[name].ranks > most:
            got = f"{name!r}, a run of {known[name].ranks} ranks"
            allowed = f"runs of at most {most}: a task of a job array has one rank, a GPU takes one"
            raise CommandError(f"--rows: got {got}; allowed: {allowed}; leave it out, or use study.py run on CPUs")
    plan.ratio_of(options.ratio)
    if options.seeds is not None:
        matrix.seeds(options.seeds)


def training_of(options: argparse.Namespace) -> Training:
    """What does the runs, with the study's own text made if it is not there. Raises CommandError for mistakes."""
    _check(options)
    if options.at_once < 1:
        raise CommandError(f"--at-once: got {options.at_once}; allowed: 1 or more; correct it")
    corpus = options.corpus or own_corpus(options.runs)
    settings = Settings(runs=options.runs.resolve(), corpus=corpus.resolve(), device=options.device)
    return Training(settings, all_rows(), options.csv, processors.where(options.device), at_once=options.at_once)


def own_corpus(runs: Path) -> Path:
    """Tokens of the study's own text, made if they are not there."""
    text, tokens = runs / "text", runs / "tokens"
    if not (tokens / "index.json").exists():
        texts.prepare(text)
        command = [
            *(sys.executable, str(plan.ROOT / "launchers" / "tokenize_corpus.py"), "--output_dir", str(tokens)),
            *("--train_file", str(text / texts.TRAIN), "--validation_file", str(text / texts.VALIDATION)),
            *("--vocab_size", str(protocol.VOCABULARY)),
        ]
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": plan.import_path()}).returncode:
            raise CommandError(f"corpus: got no tokens of {text}; allowed: what tokenize_corpus.py says above")
    return tokens


def other_domain_text(options: argparse.Namespace) -> Path | None:
    """Text of the held-out domain; None where there is none for tokens of one's own."""
    own = None if options.corpus else options.runs / "text" / texts.OTHER_DOMAIN
    return options.other_domain or own


def measure_other_domain(
    options: argparse.Namespace, training: Training, keys: Sequence[Key], measure: Measure = other_domain.measure
) -> None:
    """Call `measure` with the text of the held-out domain, where there is one."""
    text = other_domain_text(options)
    if text is not None:
        measure(keys, training.rows, training.settings, training.csv, text)
