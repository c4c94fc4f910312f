"""The command line of launchers/study.py."""

from __future__ import annotations

import argparse
import os
import sys

from sweeping import matrix

from ds_quant.cli.shared.errors import CommandError
from studying import (
    adapting,
    arguments,
    asked,
    cluster,
    isolation,
    memory,
    pictures,
    plan,
    post_training,
    processors,
    protocol,
    remeasuring,
    repeating,
    results,
    smoke,
    tables,
    verdicts,
)
from studying.plan import Key, Settings
from studying.rows import BASELINE, all_rows


def run(argv: list[str], *, description: str) -> int:
    """Do one command; returns the exit code. Raises CommandError."""
    handlers = {
        "run": _train,
        "submit": _submit,
        "plan": _print_plan,
        "tables": _write_tables,
        "repeat": _repeat,
        "post-training": _quantize_after_training,
        "adapt": _adapt,
        "isolate": _isolate,
        "memory": _measure_memory,
        "smoke": _smoke,
    }
    options = arguments.parser(description, handlers).parse_args(argv)
    options.argv = argv
    code: int = options.do(options)
    return code


def _train(options: argparse.Namespace) -> int:
    training = asked.training_of(options)
    failed: list[Key] = []
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            tuning, rate = asked.tuned(training, size, family, plan.ratio_of(options.ratio), training.run)
            if rate is None:
                failed += training.missing(tuning)
            else:
                keys = asked.keys(options, size, family, rate)
                failed += training.run(keys)
                if options.seeds is None and not training.stopped:
                    more = asked.more_seeds(options, training, size, family, rate)
                    failed += training.run(more)
                    keys += more
                if not training.stopped:
                    asked.measure_other_domain(options, training, keys)
    for key in failed:
        print(f"not done: {plan.shown(key)}", file=sys.stderr)
    return 1 if failed else 0


def _submit(options: argparse.Namespace) -> int:
    return cluster.submit(options, options.argv)


def _print_plan(options: argparse.Namespace) -> int:
    training = asked.training_of(options)
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            ratio = plan.ratio_of(options.ratio)
            rate = results.tuned_rate(list(results.read(options.csv).values()), size, family, ratio)
            if rate is None:
                for key in training.missing(asked.tuning(size, family, ratio, protocol.RATES)):
                    print("to tune ", plan.shown(key))
                rate = protocol.RATES[0]
            for key in training.missing(asked.keys(options, size, family, rate)):
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
        adapting.read(adapting.path(options.csv)),
    )
    for size, family, ratio in tables.groups(found):
        rate = results.tuned_rate(found, size, family, ratio)
        judged = [] if rate is None else verdicts.judge(rows, found, (size, family, ratio, rate))
        title, picture = f"{family}, {size}, D/N {ratio:g}", folder / f"{family}-{size}-{ratio:g}.png"
        several = len([entry for entry in judged if entry.seeds and entry.row.name != BASELINE]) > 1
        if several and pictures.draw(judged, title, picture):
            made += f"\n![gaps of {title}]({os.path.relpath(picture, options.page.parent)})\n"
    changed = tables.write(options.page, made)
    print(f"{'written' if changed else 'unchanged'}: {options.page}")
    return 0


def _quantize_after_training(options: argparse.Namespace) -> int:
    if options.corpus and not options.other_domain:
        raise CommandError("--other-domain: got none with --corpus; allowed: text to evaluate on; name a file")
    training = asked.training_of(options)
    groups = [asked.keys(options, *group) for group in _tuned_groups(options, "post-training")]
    if not any(post_training.can_be_put_in(training.rows[key.row]) for keys in groups for key in keys):
        raise CommandError("--rows: got none to put in; allowed: rows of weights or activations; correct it")
    for keys in groups:
        asked.measure_other_domain(options, training, keys, post_training.measure)
    return 0


def _adapt(options: argparse.Namespace) -> int:
    training = asked.training_of(options)
    count = 0
    for group in _tuned_groups(options, "adapt"):
        keys = asked.keys(options, *group)
        count += adapting.measure(keys, training.rows, training.settings, training.csv)
    if not count:
        raise CommandError("--rows: got none to train on with; allowed: rows of weights or activations; correct it")
    return 0


def _isolate(options: argparse.Namespace) -> int:
    training = asked.training_of(options)
    for group in _tuned_groups(options, "isolate"):
        isolation.measure(asked.keys(options, *group), training.rows, training.settings, training.csv)
    return 0


def _tuned_groups(options: argparse.Namespace, command: str) -> list[tuple[str, str, float]]:
    """(size, family, rate) of what was asked for, where the CSV has tuned the learning rate.

    Raises:
        CommandError: it has for nothing of it; `command` is named.
    """
    known, found = list(results.read(options.csv).values()), []
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            rate = results.tuned_rate(known, size, family, plan.ratio_of(options.ratio))
            if rate is not None:
                found.append((size, family, rate))
    if not found:
        got = f"no tuned learning rate in {options.csv}"
        raise CommandError(f"{command}: got {got}; allowed: sizes, families and ratios that it has; correct them")
    return found


def _measure_memory(options: argparse.Namespace) -> int:
    for size in plan.chosen(options.sizes, protocol.SIZES, "--sizes"):
        for family in plan.chosen(options.families, protocol.FAMILIES, "--families"):
            memory.measure(size, family, all_rows(), options.csv)
    return 0


def _repeat(options: argparse.Namespace) -> int:
    """By default one row of each table, seed 0; 1 where a figure is another one."""
    known, training = results.read(options.csv), asked.training_of(options)
    evaluated = post_training.read(post_training.path(options.csv)).values()
    adapted = adapting.read(adapting.path(options.csv)).values()
    options.seeds = options.seeds or "0"
    again: list[Key] = []
    ratio, seeds = plan.ratio_of(options.ratio), matrix.seeds(options.seeds)
    for size, family, rate in _tuned_groups(options, "repeat"):
        group = (size, family, ratio, rate)
        drawn = repeating.drawn(training.rows, known.values(), evaluated, adapted, group, seeds)
        parts = [(options.rows or drawn or [BASELINE], options.scales)]
        elsewhere = repeating.drawn_at_another_rate(training.rows, known.values(), group, seeds)
        if options.rows is None and elsewhere is not None:
            row, scale = elsewhere
            parts.append(([row], [scale]))
        for names, scales in parts:
            part = argparse.Namespace(**{**vars(options), "rows": names, "scales": scales})
            again += [key for key in asked.keys(part, size, family, rate) if key in known or options.rows]
    missing = training.missing(again)
    if missing or not again:
        got = plan.shown(missing[0]) if missing else "no run"
        allowed = f"sizes, rows and seeds that {options.csv} has, of the same settings and text"
        raise CommandError(f"repeat: got {got}; allowed: {allowed}; correct it")
    code = repeating.repeat(again, training, asked.other_domain_text(options))
    if repeating.apart(training).missing(again):
        return code
    code |= remeasuring.adapted(again, training)
    if options.rows is None:
        code |= remeasuring.isolated(again, training)
        code |= remeasuring.in_memory(training)
    return code


def _smoke(options: argparse.Namespace) -> int:
    settings = Settings(runs=(options.runs / "smoke").resolve(), corpus=asked.own_corpus(options.runs).resolve())
    seeds = None if options.seeds is None else matrix.seeds(options.seeds)
    return smoke.run(settings, all_rows(), processors.where("cpu"), seeds, at_once=options.at_once)
