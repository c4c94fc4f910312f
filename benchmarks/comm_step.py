"""`benchmark.py comm-step`: whole training steps of the default job over slow links, by DeepSpeed configuration."""

from __future__ import annotations

import argparse
import asyncio
import email
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import links, timing
from benchmarks.ranks import ROOT, run_ranks
from benchmarks.slow_link import INTERFACE, Link
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv
from ds_quant.config import ConfigError, QuantConfig
from ds_quant.config.refusals import check_refusals

HELP = "seconds and bytes of whole training steps of the default job, over slow links too"

_DEFAULT = ("baseline.json", "comm8.json", "comm4.json", "full_int8.json", "wire8.json", "wire4.json")


class Job(NamedTuple):
    """A configuration, and the ZeRO stage that it is run at."""

    name: str
    stage: int
    content: dict[str, Any]


class Steps(NamedTuple):
    """Steps of one run, those of the warm-up left out."""

    seconds: list[float]
    sent: list[float]
    """Bytes; empty where they were not counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs the job of `make pretrain`, model and batch, for a few steps with each configuration in turns. A step's "
        "time is from its start to that of the next, data included; evaluation and saving are left out. `ratio` is to "
        "the first configuration at the same stage in the same round: medians of the steps, then the median over "
        "rounds with its range. `sent` is what a rank's interface counted in a step, all of it: gradients, parameters, "
        "norms, headers."
    )
    parser.add_argument(
        "--configs", help=f"files, the first is the base (default: those of {', '.join(_DEFAULT)} there)"
    )
    parser.add_argument("--stages", help="ZeRO stages to run each of them at, such as 0,1,2 (default: as in the files)")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    links.add_argument(parser)
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="first steps that do not count (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each configuration (default: %(default)s)")
    parser.add_argument(
        "--arguments", default="", help="more of pretrain.py's, in quotes, such as '--preset tiny-gpt2'"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a run (default: %(default).0f)")
    parser.add_argument("--output", default="runs/benchmark/comm_step.csv", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure every configuration over every link, print a table for each link, write the CSV."""
    if options.ranks < 2:
        raise CommandError(f"--ranks: got {options.ranks}; allowed: 2 or more, since one sends nothing")
    if options.warm_up < 0 or options.steps - options.warm_up < 2:
        raise CommandError(
            f"--steps: got {options.steps}; allowed: 2 more than --warm-up ({options.warm_up}), for a spread; give more"
        )
    if options.rounds < 1:
        raise CommandError(f"--rounds: got {options.rounds}; allowed: 1 or more; give more")
    jobs = _jobs(options.configs, options.stages)
    names = links.choose(options.links)
    where = {**environment(torch.device("cpu")), "threads": 1}
    print(f"{where['processor']}, {options.ranks} ranks of 1 thread, torch {where['torch']}, {where['commit']}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = _write_text(Path(folder) / "text.jsonl")
        for name in names:
            steps: dict[tuple[str, int], list[Steps]] = {}
            with links.open_link(name, options.ranks) as link:
                for _ in range(options.rounds):
                    for job in jobs:
                        steps.setdefault((job.name, job.stage), []).append(_train(job, text, link, options))
            rows += _report(name, jobs, steps, options)
    write_csv(Path(options.output), rows, where)
    print(f"written: {options.output}")


def _jobs(configs: str | None, stages: str | None) -> list[Job]:
    folder = ROOT / "ds_configs"
    if configs:
        files = [Path(part.strip()) for part in configs.split(",")]
    else:
        files = [folder / name for name in _DEFAULT if (folder / name).is_file()]
        if len(files) < len(_DEFAULT):
            left_out = ", ".join(name for name in _DEFAULT if folder / name not in files)
            print(f"left out: {left_out}: not in {folder.name}")
    jobs = []
    for file in files:
        try:
            content = json.loads(file.read_text())
            shipped = int(content.get("zero_optimization", {}).get("stage", 0))
        except (OSError, ValueError, AttributeError) as error:
            raise CommandError(f"--configs: got {file}: {error}; allowed: DeepSpeed JSON files; correct it") from error
        for stage in _stages(stages) or [shipped]:
            zero = {**content.get("zero_optimization", {}), "stage": stage}
            job = Job(file.stem, stage, {**content, "zero_optimization": zero})
            if stages and (why := _refusal(job)):
                print(f"left out: {job.name} at stage {stage}: {why}")
            else:
                jobs.append(job)
    # All of a stage one after the other: they are compared.
    return sorted(jobs, key=lambda job: job.stage)


def _refusal(job: Job) -> str | None:
    """Why a configuration cannot be run at the stage of its job."""
    try:
        check_refusals(job.content, QuantConfig.load(job.content))
    except ConfigError as error:
        return str(error)
    return None


def _stages(text: str | None) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [-1]
    if not all(0 <= stage <= 3 for stage in found):
        raise CommandError(f"--stages: got {text!r}; allowed: 0 to 3, split by commas; correct it")
    return found


def _write_text(path: Path) -> Path:
    """A part of the default job's text: a step takes as long on any, and a tokenizer of a part is made in a second."""
    files = sorted(file for package in (asyncio, email) for file in Path(package.__path__[0]).glob("*.py"))
    path.write_text("\n".join(json.dumps({"text": file.read_text(encoding="utf-8")}) for file in files))
    return path


def _train(job: Job, text: Path, link: Link | None, options: argparse.Namespace) -> Steps:
    """Run the job once; what its slowest rank took for each step, and what its busiest sent."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.json"
        config.write_text(json.dumps(job.content))
        run_ranks(
            [
                *("-m", "benchmarks.timed_pretrain", name, INTERFACE if link else "-"),
                *("--deepspeed", str(config), "--output_dir", str(folder / "run")),
                *("--max_steps", str(options.steps), "--warmup_steps", "2", "--save_strategy", "no"),
                *("--eval_strategy", "no", "--eval_on_start", "false", "--max_eval_sequences", "4"),
                *("--train_file", str(text), "--disable_tqdm", "true"),
                *options.arguments.split(),
            ],
            ranks=options.ranks,
            link=link,
            environment={
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "TORCH_EXTENSIONS_DIR": os.environ.get(
                    "TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")
                ),
            },
            timeout=options.timeout,
        )
        ranks = [json.loads((folder / f"steps-{rank}.json").read_text()) for rank in range(options.ranks)]
    seconds, sent = [], []
    for step in range(options.warm_up, options.steps):
        spans = [(marks[step], marks[step + 1]) for marks in ranks]
        seconds.append(max(end[0] - begin[0] for begin, end in spans))
        if link:
            sent.append(max(end[1] - begin[1] for begin, end in spans))
    return Steps(seconds, sent)


def _report(
    link: str, jobs: list[Job], steps: dict[tuple[str, int], list[Steps]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one link; prints them."""
    rows = []
    for job in jobs:
        runs = steps[job.name, job.stage]
        base = next(other for other in jobs if other.stage == job.stage)
        pairs = zip(runs, steps[base.name, base.stage], strict=True)
        ratios = [statistics.median(own.seconds) / statistics.median(other.seconds) for own, other in pairs]
        took = timing.spread([value for run in runs for value in run.seconds])
        sent = [value for run in runs for value in run.sent]
        rows.append(
            {
                "link": link,
                "ranks": options.ranks,
                "config": job.name,
                "zero_stage": job.stage,
                **timing.columns("seconds", took),
                "ratio_to": base.name,
                "ratio_least": min(ratios),
                "ratio_p50": statistics.median(ratios),
                "ratio_most": max(ratios),
                "bytes_sent_per_step": statistics.median(sent) if sent else None,
                "steps": len(runs[0].seconds),
                "rounds": options.rounds,
                "arguments": options.arguments,
            }
        )
    print_table(
        f"a training step, {options.ranks} ranks, {link}",
        ["config", "ZeRO stage", "ms a step", "(20%-80%)", "ratio", "(range)", "sent kB a step"],
        [
            [
                row["config"],
                str(row["zero_stage"]),
                f"{row['seconds_p50'] * 1e3:.0f}",
                f"{row['seconds_p20'] * 1e3:.0f}-{row['seconds_p80'] * 1e3:.0f}",
                f"{row['ratio_p50']:.3f}",
                f"{row['ratio_least']:.3f}-{row['ratio_most']:.3f}",
                "" if row["bytes_sent_per_step"] is None else f"{row['bytes_sent_per_step'] / 1e3:.0f}",
            ]
            for row in rows
        ],
    )
    return rows
