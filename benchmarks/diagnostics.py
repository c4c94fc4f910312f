"""`benchmark.py diagnostics`: what diagnostics add to a training step, and that nothing is added where they are off."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pretraining.environment import ensure_process_group_variables
from torch import Tensor, nn

from benchmarks import choices, timing
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.tables import environment, print_table, write_csv
from ds_quant.planning.presets import PRESETS

HELP = "what diagnostics inside training add to a step"

STOCK = "stock DeepSpeed"
OFF = "W8A8"
OFF_AGAIN = "W8A8, once more"
BETWEEN = "W8A8, between looks"
LOOK = "W8A8, a step with a look"
EVERY = 100
"""Steps between looks of the row that is computed."""
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Contender(NamedTuple):
    """A way to train: its name, and what its DeepSpeed JSON says beside the common part."""

    name: str
    section: dict[str, Any] | None
    """None: stock DeepSpeed, which ds_quant has not touched."""
    needs: str | None = None
    """No package but our own."""


def _contenders(folder: str) -> list[Contender]:
    linear = {"weight": {"bits": 8}, "activation": {"bits": 8}}
    looks = {"output_dir": folder, "report": False}
    return [
        Contender(STOCK, None),
        Contender("ds_quant without a section", {}),
        Contender(OFF, {"linear": linear}),
        Contender(OFF_AGAIN, {"linear": linear}),
        Contender(BETWEEN, {"linear": linear, "diagnostics": {**looks, "every": 2**40}}),
        Contender(LOOK, {"linear": linear, "diagnostics": {**looks, "every": 1}}),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Whole steps of DeepSpeed's engine on one rank, bf16, ZeRO 1, all ways in turns in one process: stock "
        "DeepSpeed, a config without a section through ds_quant, W8A8 without diagnostics (twice: how far two equal "
        "rows lie apart is what noise amounts to), with diagnostics in a step between two looks, and in a step with a "
        f"look at all kinds. `every {EVERY}` is computed from the same rounds: {EVERY - 1} steps between looks and one "
        "with a look. The report is not among it: while a run lasts it takes at most a hundredth of its time."
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="default: %(default)s, the default job's")
    parser.add_argument("--batch", type=int, default=32, help="sequences (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="default: %(default)s")
    parser.add_argument(
        "--clock",
        choices=_CLOCKS,
        default="wall",
        help="cpu: this process's own processor time, for a machine that others use too (default: %(default)s)",
    )
    choices.add_common(parser, rounds=15, warm_up=2, output="runs/benchmark/diagnostics.csv")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, write the CSV."""
    for name, least in (("batch", 1), ("sequence", 2), ("vocabulary", 2)):
        choices.at_least(f"--{name}", getattr(options, name), least)
    device = choices.check_common(options)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(options.threads)
    ensure_process_group_variables()
    where = environment(device)
    print(f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, {where['commit']}")
    with tempfile.TemporaryDirectory() as folder:
        chosen = choices.choose(_contenders(folder), options.only, OFF)
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(options.vocabulary, (options.batch, options.sequence), generator=generator).to(device)
        calls = {contender.name: _step(contender, batch, options) for contender in chosen}
        clock = _CLOCKS[options.clock]
        seconds = timing.take_turns(calls, rounds=options.rounds, warm_up=options.warm_up, device=device, clock=clock)
    if {BETWEEN, LOOK} <= seconds.keys():
        pairs = zip(seconds[BETWEEN], seconds[LOOK], strict=True)
        seconds[f"W8A8, every {EVERY}"] = [((EVERY - 1) * step + look) / EVERY for step, look in pairs]
    rows = _rows(seconds, options)
    write_csv(Path(options.output), rows, where)
    print(f"written: {options.output}")


def _step(contender: Contender, batch: Tensor, options: argparse.Namespace) -> Callable[[], None]:
    """A step of an engine of its own."""
    # Imported here: they look for their device when they are imported.
    import deepspeed

    import ds_quant

    model = _model(options)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": 1},
    }
    if contender.section:
        config["ds_quant"] = contender.section
        config["zero_optimization"] = {"stage": 1, "ds_quant_required": True}
    initialize = deepspeed.initialize if contender.section is None else ds_quant.initialize
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> None:
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()

    return step


def _model(options: argparse.Namespace) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(PRESETS[options.preset].model)
    config = AutoConfig.for_model(values.pop("model_type"), **values, vocab_size=options.vocabulary, use_cache=False)
    longest = int(config.max_position_embeddings)
    if options.sequence > longest:
        raise CommandError(f"--sequence: got {options.sequence}; allowed: up to {longest} for {options.preset}")
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def _rows(seconds: dict[str, list[float]], options: argparse.Namespace) -> list[dict[str, Any]]:
    ratios = timing.ratios(seconds, OFF)
    rows = [
        {
            "preset": options.preset,
            "batch": options.batch,
            "sequence": options.sequence,
            "clock": options.clock,
            "contender": name,
            **timing.columns("seconds", timing.spread(values)),
            **timing.columns("ratio", ratios[name]),
            "rounds": options.rounds,
        }
        for name, values in seconds.items()
    ]
    print_table(
        f"a step of DeepSpeed's engine, {options.preset}, {options.batch} x {options.sequence} tokens",
        ["contender", f"ms, {options.clock}", f"ratio to {OFF}", "(20%-80%)"],
        [
            [
                row["contender"],
                f"{row['seconds_p50'] * 1e3:.1f}",
                f"{row['ratio_p50']:.3f}",
                f"{row['ratio_p20']:.3f}-{row['ratio_p80']:.3f}",
            ]
            for row in rows
        ],
    )
    return rows
