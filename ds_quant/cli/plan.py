"""`ds_quant plan`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from ds_quant.base.errors import ConfigError, fail
from ds_quant.config import read_deepspeed_config
from ds_quant.planning.models import WAYS, resolve_model

# These load torch and deepspeed: not for --help.
if TYPE_CHECKING:
    from ds_quant.planning.fit import Fitter
    from ds_quant.planning.job import Outcome
    from ds_quant.planning.plan import Planner, Request, Setting
    from ds_quant.planning.predict import Predictor

_UNITS = {"": 1, "B": 1, **{f"{u}B": 1000**n for n, u in enumerate("KMGT", 1)}, **{
    f"{u}iB": 1024**n for n, u in enumerate("KMGT", 1)
}}  # fmt: skip


def main(arguments: list[str] | None = None, *, prog: str = "ds_quant plan") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What a training job takes of each rank's memory and puts on the wire, and the least hardware that "
        "it fits on. Exit code: 0; 1 where it does not fit; 2 where it cannot be planned.",
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ConfigError, RuntimeError) as error:  # RuntimeError: what training itself would end with
        print(error, file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a DeepSpeed JSON")
    parser.add_argument("--model", required=True, help=WAYS)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences of a step, on all ranks together")
    parser.add_argument("--micro-batch", type=int, help="sequences of a rank at a time; the most that fit without it")
    parser.add_argument("--context", type=int, help="tokens of a sequence; all positions of the model without it")
    parser.add_argument("--vocab-size", type=int, help="of a preset, whose own is its tokenizer's")
    parser.add_argument("--stage", type=int, choices=range(4), help="a ZeRO stage in place of the config's")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="activations are recomputed")
    parser.add_argument(
        "--attention",
        choices=("flash", "cpu"),
        default="flash",
        help="flash: as on GPUs, with no matrix of tokens by tokens; cpu: as torch has it on CPUs, which with dropout "
        "has one. Default: %(default)s",
    )
    parser.add_argument("--gpu-memory", help="of a GPU, as 80GiB; then also what fits, and on how little hardware")
    parser.add_argument(
        "--reserve",
        default="2GiB",
        help="of the GPU's memory, for its context, the communication library and fragmentation: an assumption of "
        "yours, nothing of it is predicted. Default: %(default)s",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="try ZeRO stages, recomputed activations, bits of moments and of masters, and print what fits, cheapest "
        "first, with the JSON to use; --gpu-memory may then be several, as 24GiB,80GiB",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Plan and print; returns 1 if it does not fit. Raises ConfigError for invalid requests."""
    from ds_quant.planning.configs import job_config
    from ds_quant.planning.fit import Fitter
    from ds_quant.planning.plan import MAX_RANKS, Planner, Request, Setting, check_batch
    from ds_quant.planning.predict import Predictor

    for name in ("nodes", "gpus_per_node", "batch", "micro_batch", "context", "vocab_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise fail(f"--{name.replace('_', '-')}", value, "1 or more", "correct it")
    world_size = options.nodes * options.gpus_per_node
    if world_size > MAX_RANKS:
        raise fail("--nodes, --gpus-per-node", world_size, f"at most {MAX_RANKS} ranks", "plan fewer")
    check_batch(options.batch, world_size, options.micro_batch)
    memories = _memories(options)
    memory = next(iter(memories.values()), None)
    raw = read_deepspeed_config(options.config)
    model, length = resolve_model(options.model, length=options.context, vocabulary=options.vocab_size)
    config = job_config(
        raw,
        world_size=world_size,
        rows=options.micro_batch or 1,
        accumulation=options.batch // world_size // (options.micro_batch or 1),
        stage=options.stage,
    )
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    request = Request(
        raw,
        model,
        length,
        options.batch,
        options.gpus_per_node,
        options.gradient_checkpointing,
        options.attention == "flash",
    )
    with Predictor() as predictor:
        if options.fit:
            return _fit(options, Fitter(request, predictor, lambda line: print(line, file=sys.stderr)), memories)
        planner = Planner(request, predictor, lambda line: print(line, file=sys.stderr))
        rows = options.micro_batch or options.batch // world_size
        if options.micro_batch is None and memory is not None:
            rows = planner.largest_rows(world_size, stage, memory) or 1
        setting = Setting(world_size, stage, rows)
        report = describe(planner.outcome(setting), setting, request)
        if memory is not None:
            report |= fitting(planner, predictor, setting, memory)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    return 0 if report.get("fits", True) else 1


def _memories(options: argparse.Namespace) -> dict[str, int]:
    """Usable bytes of each --gpu-memory. Raises ConfigError."""
    asked = [] if options.gpu_memory is None else options.gpu_memory.split(",")
    if options.fit and not asked:
        raise fail("--fit", "no --gpu-memory", "a GPU's memory, or several", "add --gpu-memory 24GiB,80GiB, say")
    if len(asked) > 1 and not options.fit:
        raise fail("--gpu-memory", options.gpu_memory, "one without --fit", "add --fit, or name one")
    for name in ("micro_batch", "stage"):
        if options.fit and getattr(options, name) is not None:
            raise fail(f"--{name.replace('_', '-')}", getattr(options, name), "none with --fit", "remove one of them")
    found = {}
    for text in asked:
        found[text.strip()] = parse_size("--gpu-memory", text) - parse_size("--reserve", options.reserve)
        if found[text.strip()] <= 0:
            raise fail("--reserve", options.reserve, f"less than --gpu-memory {text}", "lower it")
    return found


def _fit(options: argparse.Namespace, fitter: Fitter, memories: dict[str, int]) -> int:
    from ds_quant.cli import fit

    found = fit.report(fitter, options.nodes * options.gpus_per_node, memories)
    print(json.dumps(found, indent=1) if options.json else "\n".join(fit.lines(found)))
    return 0 if all(answer["ways"] for answer in found["fit"]) else 1


def parse_size(where: str, text: str) -> int:
    """Bytes from "80GiB", "80GB", "512MiB". Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B?)\s*", text)
    unit = found and (found[2] if found[2] in _UNITS else None)
    if not found or unit is None:
        raise fail(where, text, "a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB", "write 80GiB, say")
    return int(float(found[1]) * _UNITS[unit])


def describe(outcome: Outcome, setting: Setting, request: Request) -> dict[str, Any]:
    """What is predicted, as plain data; bytes throughout."""
    from ds_quant.planning.traffic import totals

    wire = totals(outcome.collectives, 0, request.gpus_per_node)
    return {
        "parameters": outcome.num_parameters,
        "ranks": setting.world_size,
        "nodes": -(-setting.world_size // request.gpus_per_node),
        "stage": setting.stage,
        "micro_batch": setting.rows,
        "micro_steps": setting.accumulation(request.batch),
        "context": request.length,
        "peak_bytes": outcome.peak_bytes,
        "peak_in": outcome.phase,
        "at_peak": outcome.parts,
        "phase_peaks": outcome.phase_peaks,
        "between_steps_bytes": outcome.rest_bytes,
        "host_bytes": outcome.host_bytes,
        "wire": wire,
        "sent_bytes": sum(row["sent_bytes"] for row in wire),
        "node_bytes": sum(row["node_bytes"] for row in wire),
    }


def fitting(planner: Planner, predictor: Predictor, setting: Setting, memory: int) -> dict[str, Any]:
    """Whether a setting fits, the least hardware that does, and what else would make it fit."""
    from ds_quant.planning.plan import MAX_RANKS, Planner, Setting

    report: dict[str, Any] = {"usable_bytes": memory, "fits": planner.fits(setting, memory)}
    most = setting.world_size
    least = planner.least_hardware(memory, most)
    if least is None:
        # It does not fit: would it on more hardware?
        least = planner.least_hardware(memory, MAX_RANKS)
    if least is not None:
        report["least_hardware"] = describe(planner.outcome(least), least, planner.request)
    if not report["fits"] or least is None:
        report["would_fit"] = []
        for name, request in planner.variants():
            other = Planner(request, predictor, planner.tell)
            peak = other.outcome(Setting(most, setting.stage, 1)).peak_bytes
            if peak <= memory:
                report["would_fit"].append({"with": name, "peak_bytes": peak})
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    job = (
        f"{report['parameters']:,} parameters on {report['ranks']} ranks ({report['nodes']} nodes), ZeRO "
        f"{report['stage']}, micro batch {report['micro_batch']} of {report['context']} tokens, "
        f"{report['micro_steps']} micro steps"
    )
    peak, between = _size(report["peak_bytes"]), _size(report["between_steps_bytes"])
    found = [job, "", f"peak of a rank: {peak}, in the {report['peak_in']}; between steps {between}"]
    found += [f"  {role:<14}{_size(size):>14}" for role, size in report["at_peak"].items()]
    found += [f"  peak in {name:<9}{_size(size):>11}" for name, size in report["phase_peaks"].items()]
    if report["host_bytes"]:
        found.append(f"  on the host   {_size(report['host_bytes']):>14}  (offloaded, beside it)")
    found += ["", "on the wire in a step:" if report["wire"] else "on the wire: nothing, there is one rank"]
    for row in report["wire"]:
        found.append(
            f"  {row['phase']:<9}{row['operation']:<15}{row['dtype']:<9}{row['ranks']:>6} ranks {row['calls']:>7} calls"
            f"  a rank sends {_size(row['sent_bytes']):>11}, a node to others {_size(row['node_bytes']):>11}"
        )
    if report["wire"]:
        sent, node = report["sent_bytes"], report["node_bytes"]
        found.append(f"  in all: a rank sends {sent:,} bytes, a node sends {node:,} to others")
    if "fits" in report:
        found += ["", f"{'fits' if report['fits'] else 'DOES NOT FIT'} in {_size(report['usable_bytes'])} of a GPU"]
        least = report.get("least_hardware")
        if least:
            found.append(
                f"least hardware that fits: {least['ranks']} GPUs ({least['nodes']} nodes), ZeRO {least['stage']}, "
                f"micro batch {least['micro_batch']}, {least['micro_steps']} micro steps: {_size(least['peak_bytes'])}"
            )
        else:
            found.append("no number of ranks fits: a single sequence takes too much on every rank")
        found += [
            f"would fit here with {one['with']}, at micro batch 1: {_size(one['peak_bytes'])}"
            for one in report.get("would_fit", ())
        ]
    return found


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} B"
