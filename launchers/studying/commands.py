"""The command line of launchers/study.py."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sweeping import matrix

from ds_quant.cli.shared.errors import CommandError
from studying import (
    arguments,
    isolation,
    memory,
    other_domain,
    pictures,
    plan,
    post_training,
    processors,
    protocol,
    repeating,
    results,
    smoke,
    tables,
    texts,
    verdicts,
)
from studying.plan import Key, Settings
from studying.rows import BASELINE, Row, all_rows
from studying.training import Training

Measure = Callable[[Sequence[Key], Mapping[str, Row], Settings, Path, Path], None]


def run(argv: list[str], *, description: str) -> int:
    """Do one command; returns the exit code. Raises CommandError."""
    handlers = {
        "run": _train,
        "plan": _print_plan,
        "tables": _write_tables,
        "repeat": _repeat,
        "post-training": _quantize_after_training,
        "isolate": _isolate,
        "memory": _measure_memory,
        "smoke": _smoke,
    }
    options = arguments.parser(description, handlers).parse_args(argv)
    code: int = options.do(options)
    return code


def _train(options: argparse.Namespace) -> int:
    training = _training(options)
    failed: list[Key] = []
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            rate, lost = _tuned(training, size, family, plan.ratio_of(options.ratio))
            failed += lost
            if rate is not None:
                keys = _keys(options, size, family, rate)
                failed += training.run(keys)
                if options.seeds is None and not training.stopped:
                    more = _more_seeds(options, training, size, family, rate)
                    failed += training.run(more)
                    keys += more
                if not training.stopped:
                    _measure_other_domain(options, training, keys)
    for key in failed:
        print(f"not done: {plan.shown(key)}", file=sys.stderr)
    return 1 if failed else 0


def _more_seeds(options: argparse.Namespace, training: Training, size: str, family: str, rate: float) -> list[Key]:
    """Runs of the protocol's further seeds, of rows whose effect is small, and the baseline's."""
    ratio = plan.ratio_of(options.ratio)
    asked = {key.row for key in _keys(options, size, family, rate)}
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


def _measure_other_domain(
    options: argparse.Namespace, training: Training, keys: Sequence[Key], measure: Measure = other_domain.measure
) -> None:
    text = _other_domain(options)
    if text is not None:
        measure(keys, training.rows, training.settings, training.csv, text)


def _other_domain(options: argparse.Namespace) -> Path | None:
    """Text of the held-out domain; None where there is none for tokens of one's own."""
    own = None if options.corpus else options.runs / "text" / texts.OTHER_DOMAIN
    return options.other_domain or own


def _print_plan(options: argparse.Namespace) -> int:
    training = _training(options)
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            ratio = plan.ratio_of(options.ratio)
            rate = results.tuned_rate(list(results.read(options.csv).values()), size, family, ratio)
            if rate is None:
                for key in training.missing(_tuning(size, family, ratio, protocol.RATES)):
                    print("to tune ", plan.shown(key))
                rate = protocol.RATES[0]
            for key in training.missing(_keys(options, size, family, rate)):
                print("to train", plan.shown(key))
    return 0


def _write_tables(options: argparse.Namespace) -> int:
    found = list(results.read(options.csv).values())
    rows = list(all_rows().values())
    folder = options.csv.parent
    made = tables.text(
        found,
        rows,
        post_training.read(post_training.path(options.csv)),
        isolation.read(isolation.path(options.csv)),
        memory.read(memory.path(options.csv)),
    )
    for size, family, ratio in tables.groups(found):
        rate = results.tuned_rate(found, size, family, ratio)
        judged = [] if rate is None else verdicts.judge(rows, found, (size, family, ratio, rate))
        name = f"{family}-{size}-{ratio:g}.png"
        if len([entry for entry in judged if entry.seeds]) > 1 and pictures.draw(
            judged, f"{family}, {size}, D/N {ratio:g}", folder / name
        ):
            link = os.path.relpath(folder / name, options.page.parent)
            made += f"\n![gaps of {family}, {size}, D/N {ratio:g}]({link})\n"
    changed = tables.write(options.page, made)
    print(f"{'written' if changed else 'unchanged'}: {options.page}")
    return 0


def _quantize_after_training(options: argparse.Namespace) -> int:
    if options.corpus and not options.other_domain:
        raise CommandError("--other-domain: got none with --corpus; allowed: text to evaluate on; name a file")
    training, known = _training(options), list(results.read(options.csv).values())
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            rate = results.tuned_rate(known, size, family, plan.ratio_of(options.ratio))
            if rate is not None:
                keys = _keys(options, size, family, rate)
                _measure_other_domain(options, training, keys, post_training.measure)
    return 0


def _isolate(options: argparse.Namespace) -> int:
    training, known = _training(options), list(results.read(options.csv).values())
    count = 0
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            rate = results.tuned_rate(known, size, family, plan.ratio_of(options.ratio))
            if rate is not None:
                keys = _keys(options, size, family, rate)
                count += isolation.measure(keys, training.rows, training.settings, training.csv)
    if not count:
        raise CommandError(f"isolate: got no tuned baseline in {options.csv}; allowed: sizes that it has; correct it")
    return 0


def _measure_memory(options: argparse.Namespace) -> int:
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            memory.measure(size, family, all_rows(), options.csv)
    return 0


def _repeat(options: argparse.Namespace) -> int:
    """By default one row of each table, seed 0; 1 where a figure is another one."""
    known, training = results.read(options.csv), _training(options)
    evaluated = post_training.read(post_training.path(options.csv)).values()
    options.seeds = options.seeds or "0"
    again: list[Key] = []
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            ratio = plan.ratio_of(options.ratio)
            rate = results.tuned_rate(list(known.values()), size, family, ratio)
            if rate is not None:
                seeds, group = matrix.seeds(options.seeds), (size, family, ratio, rate)
                drawn = repeating.drawn(training.rows, known.values(), evaluated, group, seeds)
                names = argparse.Namespace(**{**vars(options), "rows": options.rows or drawn or [BASELINE]})
                again += [key for key in _keys(names, size, family, rate) if key in known or options.rows]
    missing = training.missing(again)
    if missing or not again:
        got = plan.shown(missing[0]) if missing else "no tuned baseline"
        allowed = f"sizes, rows and seeds that {options.csv} has, of the same settings and text"
        raise CommandError(f"repeat: got {got}; allowed: {allowed}; correct it")
    return repeating.repeat(again, training, _other_domain(options))


def _smoke(options: argparse.Namespace) -> int:
    settings = Settings(runs=(options.runs / "smoke").resolve(), corpus=_own_corpus(options.runs).resolve())
    seeds = None if options.seeds is None else matrix.seeds(options.seeds)
    return smoke.run(settings, all_rows(), processors.where("cpu"), seeds, at_once=options.at_once)


def _keys(options: argparse.Namespace, size: str, family: str, rate: float) -> list[Key]:
    known = all_rows()
    names = plan.chosen(options.rows or list(known), known, "--rows")
    # Nothing is told of a row without its baseline.
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    return plan.keys(
        names,
        seeds=protocol.SEEDS if options.seeds is None else matrix.seeds(options.seeds),
        rates=[scale * rate for scale in options.scales],
        size=size,
        family=family,
        ratio=plan.ratio_of(options.ratio),
    )


def _tuned(training: Training, size: str, family: str, ratio: float) -> tuple[float | None, list[Key]]:
    """The learning rate of the lowest loss, and the runs that failed on the way to it."""
    rates = list(protocol.RATES)
    while True:
        failed = training.run(_tuning(size, family, ratio, rates))
        if failed:
            return None, failed
        known = list(results.read(training.csv).values())
        rate = results.tuned_rate(known, size, family, ratio)
        if rate is not None:
            return rate, []
        best = results.best_rate(known, size, family, ratio)
        assert best is not None
        rates = [best / 2, best * 2]


def _tuning(size: str, family: str, ratio: float, rates: Sequence[float]) -> list[Key]:
    return plan.keys([BASELINE], seeds=[0], rates=rates, size=size, family=family, ratio=ratio)


def _training(options: argparse.Namespace) -> Training:
    if options.at_once < 1:
        raise CommandError(f"--at-once: got {options.at_once}; allowed: 1 or more; correct it")
    corpus = options.corpus or _own_corpus(options.runs)
    settings = Settings(runs=options.runs.resolve(), corpus=corpus.resolve(), device=options.device)
    return Training(settings, all_rows(), options.csv, processors.where(options.device), at_once=options.at_once)


def _own_corpus(runs: Path) -> Path:
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
