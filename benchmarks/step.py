"""`benchmark.py step`: a whole training step of a transformer with int8 linears beside bf16."""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import charts, choices, device_timing, held, recipes, step_contenders, step_models, step_profile, timing
from benchmarks.step_contenders import BASE, Contender, Step
from ds_quant.cli.shared import process_memory
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv

HELP = "time and saved bytes of a whole training step of GPT-2 small and a small Llama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Forward, loss and backward of a model from its configuration (sdpa attention, random weights and tokens), all "
        "ways in turns; the optimizer's step is not among it unless --optimizer asks for it. gpt2 is GPT-2 small, 124M "
        "parameters with dropout 0.1, with which torch's attention on a CPU is not the fused one; llama has 12 layers "
        "of 768 features, 110M parameters with a tied output embedding and no dropout. `ratio` is to bf16 parameters "
        "in the same round, median and 20th to 80th percentile, `speed-up` one over it. `saved` is what the forward "
        "leaves for the backward, parameters apart, `linears` the part of it that linear layers saved; `kept` is what "
        "layers keep beside that from step to step; `extra` the peak of memory during a step, gradients included. "
        "Codes of weights are made again in every step. lm_head is quantized only where it says so. On cuda, times are "
        "those of the device between events, and the host's stand beside them: a step of more launches than a queue "
        "holds is as slow as its host. Competitors: pip install 'ds_quant[bench]'."
    )
    parser.add_argument(
        "--models",
        default="gpt2,llama",
        help=f"of {', '.join(step_models.PRESETS)}, split by commas (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--dropout", type=float, help="for all dropouts; default: the model's configuration")
    parser.add_argument("--optimizer", action="store_true", help="with a step of torch's fused AdamW")
    parser.add_argument("--backend", choices=recipes.BACKENDS, default="int8", help="ours' (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="split one more step of each into kinds of work")
    choices.add_common(parser, rounds=7, warm_up=1, output="runs/benchmark/step.csv")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure every model, print tables, write the CSVs and the pictures."""
    models = _check(options)
    device = choices.check_common(options)
    torch.set_num_threads(options.threads)
    chosen = choices.choose(step_contenders.contenders(options.backend, device), options.only, BASE)
    where = environment(device)
    print(f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, {where['commit']}")
    rows: list[dict[str, Any]] = []
    profiled: list[dict[str, Any]] = []
    for name in models:
        model = step_models.build(name, dropout=options.dropout, device=device)
        batch = _batch(model, options, device)
        steps, first_seconds = _prepare(chosen, model, batch, options)
        rows += _measure(name, steps, first_seconds, options, device)
        if options.profile:
            profiled += _profile(name, steps, device)
    output = Path(options.output)
    write_csv(output, rows, where)
    print(f"written: {output}")
    title = f"training step, {options.batch} x {options.sequence} tokens ({where['processor']})"
    charts.draw_speed_ups(output.with_suffix(".png"), title, rows, "model", BASE)
    if profiled:
        path = output.with_name(f"{output.stem}-profile.csv")
        write_csv(path, profiled, where)
        print(f"written: {path}")
        _draw_profile(path.with_suffix(".png"), profiled, where)


def _check(options: argparse.Namespace) -> list[str]:
    """The names of the models."""
    models = [name.strip() for name in options.models.split(",")]
    for name in models:
        if name not in step_models.PRESETS:
            allowed = ", ".join(step_models.PRESETS)
            raise CommandError(f"--models: got {name!r}; allowed: {allowed}; correct it")
        longest = step_models.positions(name)
        # A sequence of one token has nothing to predict.
        if not 2 <= options.sequence <= longest:
            raise CommandError(f"--sequence: got {options.sequence}; allowed: 2 to {longest} for {name}; correct it")
    choices.at_least("--batch", options.batch, 1)
    if options.dropout is not None and not 0 <= options.dropout < 1:
        raise CommandError(f"--dropout: got {options.dropout}; allowed: 0 up to, but not, 1; correct it")
    return models


def _batch(model: nn.Module, options: argparse.Namespace, device: torch.device) -> Tensor:
    """Token ids [sequences, tokens]."""
    generator = torch.Generator().manual_seed(0)
    vocab_size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    return torch.randint(vocab_size, (options.batch, options.sequence), generator=generator).to(device)


def _prepare(
    chosen: list[Contender], model: nn.Module, batch: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Step], dict[str, float]]:
    """Those that run here, after a first step, and its seconds: compilation shows in them."""
    # What was compiled for another model would count against torch's limit of recompilations.
    torch.compiler.reset()
    steps: dict[str, Step] = {}
    seconds: dict[str, float] = {}

    def prepare(contender: Contender) -> None:
        begin = time.perf_counter()
        step = contender.make(model, batch, with_optimizer=options.optimizer)
        step.run()
        step.clear()
        seconds[contender.name] = time.perf_counter() - begin
        steps[contender.name] = step
        if contender.compiled:
            print(f"compiled: {contender.name}, first step after {seconds[contender.name]:.0f} s", flush=True)

    for contender in chosen:
        choices.attempt(contender.name, BASE, functools.partial(prepare, contender))
    return steps, seconds


def _measure(
    model: str,
    steps: dict[str, Step],
    first_seconds: dict[str, float],
    options: argparse.Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    def clear(_: str) -> None:
        # All of them: the gradients of one at a time are in memory.
        for step in steps.values():
            step.clear()

    calls = {name: step.run for name, step in steps.items()}
    seconds, columns = device_timing.seconds_and_columns(
        calls,
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=device,
        before=clear,
        graphs=False,
        iterations=options.iterations,
    )
    ratios = timing.ratios(seconds, BASE)
    rows = []
    for name, step in steps.items():
        clear(name)
        # Within compiled code there are no modules to look at.
        linears = [] if step.compiled else step_models.linears(step.model)
        found = held.held_bytes(step.model, step.loss, linears)
        clear(name)
        took, ratio = timing.spread(seconds[name]), ratios[name]
        rows.append(
            {
                "model": model,
                "batch": options.batch,
                "sequence": options.sequence,
                "dropout": "configuration" if options.dropout is None else options.dropout,
                "optimizer": options.optimizer,
                "backend": options.backend,
                "contender": name,
                **timing.columns("seconds", took),
                **timing.columns("ratio", ratio),
                "speed_up": 1 / ratio.p50,
                "saved_bytes": found.saved,
                "saved_bytes_of_linears": None if step.compiled else found.saved_within,
                "kept_bytes": found.kept,
                "peak_extra_bytes": process_memory.peak_bytes(step.run, device),
                "first_step_seconds": first_seconds[name],
                **columns[name],
                "rounds": options.rounds,
            }
        )
    clear(BASE)
    print_table(
        f"{model}: {options.batch} x {options.sequence} tokens, forward, loss, backward"
        f"{', optimizer' if options.optimizer else ''}",
        [
            *("contender", "ms", "ratio", "(20%-80%)", "speed-up", "saved MB", "linears MB", "kept MB", "extra MB"),
            *device_timing.host_column(device),
        ],
        [_cells(row) + device_timing.host_cell(row) for row in rows],
    )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    amounts = ("saved_bytes", "saved_bytes_of_linears", "kept_bytes", "peak_extra_bytes")
    return [
        row["contender"],
        f"{row['seconds_p50'] * 1e3:.0f}",
        f"{row['ratio_p50']:.3f}",
        f"{row['ratio_p20']:.3f}-{row['ratio_p80']:.3f}",
        f"{row['speed_up']:.2f}",
        *("" if row[key] is None else f"{row[key] / 1e6:.1f}" for key in amounts),
    ]


def _profile(model: str, steps: dict[str, Step], device: torch.device) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        seconds = step_profile.self_seconds(step.run, device)
        step.clear()
        total = sum(seconds.values())
        shares = {f"share_{_column(group)}": value / total for group, value in seconds.items()}
        rows.append({"model": model, "contender": name, "seconds": total, **shares})
    print_table(
        f"{model}: self time of one step under the profiler, percent (compiled code: its fused kernels are rest)",
        ["contender", "ms", *step_profile.GROUPS],
        [
            [
                row["contender"],
                f"{row['seconds'] * 1e3:.0f}",
                *(f"{row[f'share_{_column(group)}']:.1%}" for group in step_profile.GROUPS),
            ]
            for row in rows
        ],
    )
    return rows


def _column(group: str) -> str:
    return group.lower().replace(" ", "_")


def _draw_profile(path: Path, rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    bars = [f"{row['model']}: {row['contender']}" for row in rows]
    parts = {
        group: [row[f"share_{_column(group)}"] * row["seconds"] * 1e3 for row in rows] for group in step_profile.GROUPS
    }
    title = f"where a training step's time goes ({where['processor']})"
    charts.draw_stacks(path, title, "ms, under the profiler", bars, parts, step_profile.REST)
