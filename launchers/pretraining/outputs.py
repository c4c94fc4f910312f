"""Writes the results of a run: the model folder, summary.json, curves.png, and a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_quant.base.whole_folder import replace_folder, write_whole
from ds_quant.cli.shared.run_folder import read_metrics
from ds_quant.cli.shared.terminal import say
from pretraining import plots
from pretraining.trainer import PretrainTrainer


def save_model(trainer: PretrainTrainer, folder: Path) -> None:
    """Write weights and tokenizer to `folder`, replacing it at once. All ranks must call it: stage 3 gathers."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    trainer.save_model(str(temporary))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        # The pickled training arguments are not part of a model.
        (temporary / "training_args.bin").unlink(missing_ok=True)
        replace_folder(temporary, folder)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json."""
    write_whole(path, json.dumps(summary, indent=2) + "\n")


def write_curves(output_dir: Path, title: str) -> None:
    """Draw curves.png from metrics.csv, or print one line on why there is none."""
    if not plots.draw_curves(read_metrics(output_dir / "metrics.csv"), output_dir / "curves.png", title):
        say("curves.png was not drawn: matplotlib is missing (pip install 'ds_quant[plot]').")


def print_table(summary: dict[str, Any], output_dir: Path) -> None:
    """Print the summary as a table."""
    table = Table(title=f"Pre-training: {output_dir}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    size = summary["model"]["num_parameters"]
    table.add_row("model", f"{summary['model']['class']}, {size / 1e6:.1f}M parameters, {summary['dtype']}")
    table.add_row("ranks, ZeRO stage", f"{summary['world_size']}, {summary['zero_stage']}")
    table.add_row("tokens", f"{summary['tokens']:,}")
    table.add_row("time", f"{summary['seconds']:.0f} s, {summary['seconds_evaluating']:.0f} s of it evaluating")
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("validation loss", f"{_number(summary['first_eval_loss'])} -> {_number(summary['final_eval_loss'])}")
    converted = summary["converted_modules"]
    if converted:
        table.add_row("quantized", "\n".join(_grouped(converted)))
        table.add_row("matmul parameters", f"{summary['share']:.1%} quantized")
        left_out = summary["left_out"]
        table.add_row("left out", ", ".join(f"{name} {tuple(shape)}" for name, shape in left_out.items()) or "none")
    elif not summary["moments"] and not summary["communication"]:
        table.add_row("quantized", "nothing: full precision")
    if summary["moments"]:
        table.add_row("Adam's moments", summary["moments"].replace("; ", "\n"))
    communication = summary["communication"] or {}
    if "gradient" in communication:
        table.add_row("gradients on the wire", _wire(communication))
    if "weight" in communication:
        table.add_row("weights on the wire", _weights(communication))
    Console().print(table)


def _weights(communication: dict[str, Any]) -> str:
    return _sent(communication, "weight", "weight_", "weights")


def _wire(communication: dict[str, Any]) -> str:
    told = _sent(communication, "gradient", "", "gradients")
    if communication["wire_bytes_per_step"] is None:
        return told
    return f"{told}\nrelative quantization error {_number(communication['quantization_error'])}"


def _sent(communication: dict[str, Any], part: str, prefix: str, what: str) -> str:
    sent = communication[f"{prefix}wire_bytes_per_step"]
    if sent is None:
        return f"{communication[part]}\none rank: nothing crossed a wire"
    ratio = communication[f"{prefix}compression_ratio"]
    return (
        f"{communication[part]}\n{sent / 2**20:.2f} MiB a step from rank 0, "
        f"{ratio:.2f} times fewer than in the {what}' dtype"
    )


def _grouped(converted: dict[str, str]) -> list[str]:
    # model.layers.0.mlp.up_proj and its counterparts in other layers share one line.
    counts: dict[tuple[str, str], int] = {}
    for name, description in converted.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        counts[pattern, description] = counts.get((pattern, description), 0) + 1
    descriptions: dict[str, list[str]] = {}
    for (pattern, description), count in counts.items():
        descriptions.setdefault(description, []).append(f"  {count} x {pattern}")
    return [line for description, lines in descriptions.items() for line in (description, *lines)]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
