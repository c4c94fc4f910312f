"""`ds_quant report [CONFIG.json]`: what is installed here, and what a config will do; `--for` writes the config for
another way in. `ds_quant_report` is the same command, and `ds_quant_report plan` is `ds_quant plan`."""

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

from ds_quant.base.errors import fail
from ds_quant.cli import schema
from ds_quant.config import (
    ConfigError,
    GradientCommunicationConfig,
    OptimizerConfig,
    QuantConfig,
    WeightCommunicationConfig,
    has_tripwire,
    near_miss_keys,
    read_deepspeed_config,
)
from ds_quant.config import unresolved_auto as find_auto
from ds_quant.config.refusals import check_refusals
from ds_quant.config.ways_in import WAYS, config_for

PACKAGES = ("ds_quant", "torch", "deepspeed", "transformers", "accelerate", "datasets", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """Package name to installed version, None where it is missing; Python's own under "python"."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> tuple[list[tuple[str, str]], list[str]]:
    """Rows of (what, state) on DeepSpeed, the accelerator and the seams; and what is wrong."""
    import torch

    rows: list[tuple[str, str]] = []
    problems: list[str] = []
    try:
        from ds_quant import engine
        from ds_quant.engine.extension_locks import check_extension_locks
        from ds_quant.kernels import registry
        from ds_quant.kernels.fp8_units import fp8_units
        from ds_quant.kernels.integer_units import integer_units
    except (ConfigError, ImportError) as error:
        return [("deepspeed", "cannot be used")], [str(error)]
    name, devices = engine.accelerator()
    rows.append(("accelerator", f"{name}, {devices} device(s)"))
    rows.append(("CPU instructions", torch.backends.cpu.get_cpu_capability()))
    for device in dict.fromkeys(("cpu", name)):
        rows += [(f"{title} on {device}", serving) for title, serving in registry.report(device)]
    units = integer_units(torch.device(name))
    rows.append((f"int8 products on {name}", units.line()))
    rows.append((f"fp8 products on {name}", fp8_units(torch.device(name)).line()))
    for seam, there in engine.find_seams().items():
        rows.append((f"seam {seam}", "found" if there else "MISSING"))
    try:
        check_extension_locks(engine.op_names())
        rows.append(("extension locks", "none"))
    except ConfigError as error:
        problems.append(str(error))
    return rows, problems


def explain(source: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows of (what, meaning) for a DeepSpeed config, and what would stop it."""
    rows: list[tuple[str, str]] = []
    problems: list[str] = []
    raw = read_deepspeed_config(source)
    quant = QuantConfig.load(raw)
    stage = (raw.get("zero_optimization") or {}).get("stage", 0)
    rows.append(("ZeRO stage", str(stage)))
    rows += [("warning", warning) for warning in near_miss_keys(raw)]
    if not quant.enabled:
        why = "switched off" if "ds_quant" in raw else "absent"
        return [*rows, ("ds_quant section", f"{why}: a plain DeepSpeed run in full precision")], problems
    rows.append(
        ("tripwire", "set" if has_tripwire(raw) else "missing: a script that forgets ds_quant trains without it")
    )
    if quant.linear:
        from ds_quant.linear.modules import describe

        exclude = quant.linear.exclude
        rows.append(("linear layers", describe(quant.linear)))
        rows.append(("  include", ", ".join(quant.linear.include)))
        left_out = "the model's output heads" if exclude is None else ", ".join(exclude) or "nothing"
        rows.append(("  exclude", left_out))
        if ends := quant.linear.exclude_blocks:
            rows.append(("  exclude_blocks", f"the first {ends.first:.1%} and the last {ends.last:.1%}, rounded up"))
        if step := quant.linear.forward_full_precision_from:
            rows.append(("  forward_full_precision_from", f"optimizer step {step:,}, gradients quantized as before"))
    else:
        rows.append(("linear layers", "full precision"))
    checks: list[Callable[[], Any]] = [lambda: check_refusals(raw, quant)]
    if quant.optimizer:
        rows += _moments(quant.optimizer, raw)
        checks += _moment_checks(quant.optimizer, raw, stage)
    else:
        rows.append(("AdamW's moments", "32 bits"))
    if quant.communication and quant.communication.gradient:
        rows += _wire(quant.communication.gradient, raw, stage)
    else:
        rows.append(("gradients on the wire", "full precision"))
    if quant.communication and quant.communication.weight:
        rows += _weights(quant.communication.weight, stage)
    if quant.diagnostics:
        checks.append(lambda: rows.extend(_diagnostics(quant)))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += str(error).splitlines()
    auto = find_auto(raw)
    if auto:
        rows.append(('"auto"', f"{', '.join(auto)}: filled by Hugging Face's Trainer, or by ds_quant.resolve_auto"))
    return rows, problems


def _diagnostics(quant: QuantConfig) -> list[tuple[str, str]]:
    """Raises ConfigError for a kind that the section has no component for."""
    from ds_quant.diagnostics.choice import choose

    config = quant.diagnostics
    if config is None:
        return []
    choice = choose(config, quant)
    return [
        ("diagnostics", f"every {config.every} steps: {', '.join(choice.kinds)}"),
        *(("  left out", line) for line in choice.left_out),
    ]


def _moments(config: OptimizerConfig, raw: dict[str, Any]) -> list[tuple[str, str]]:
    from ds_quant.optim.kinds import kind_of
    from ds_quant.optim.setup import describe_moments, describe_size

    kind = kind_of(raw)
    if any(name not in kind.optimizer.STATES for name in config.states()):
        return []  # it is refused
    source = "the config's optimizer section"
    if "optimizer" not in raw:
        source = "none in the config: pass torch.optim.AdamW to initialize; Hugging Face's Trainer passes its own"
    return [
        (kind.label, describe_moments(config, kind)),
        ("  bytes a parameter", describe_size(config, kind).replace(" bytes a parameter", "")),
        *([("master weights", f"{config.master.bits}-bit, rounded {config.master.rounding}")] if config.master else []),
        ("  exclude", ", ".join(config.exclude) or "nothing"),
        ("  optimizer", source),
    ]


def _wire(config: GradientCommunicationConfig, raw: dict[str, Any], stage: Any) -> list[tuple[str, str]]:
    from ds_quant.comm.reducer import bytes_an_element, describe_wire

    zero = raw.get("zero_optimization") or {}
    ways = {0: "all-reduce", 1: "reduce-scatter, once a step", 2: "reduce-scatter, every micro step"}
    way = "all-reduce" if zero.get("reduce_scatter") is False else ways.get(stage, ways[2])
    return [
        ("gradients on the wire", describe_wire(config)),
        ("  bytes an element", f"{bytes_an_element(config):.3f} instead of 4 or 2"),
        ("  by", way),
    ]


def _weights(config: WeightCommunicationConfig, stage: Any) -> list[tuple[str, str]]:
    from ds_quant.comm.weight_difference import describe_weights, wire_format

    rows = [("weights on the wire", describe_weights(config))]
    if config.mode == "difference":
        fmt = wire_format(config)
        rows.append(("  bytes an element", f"{fmt.bits / 8 + 4 / fmt.block_size:.3f} instead of 4 or 2"))
    when = "before the forward and the backward of a layer" if stage == 3 else "once a step"
    return [*rows, ("  gathered", when)]


def _moment_checks(config: OptimizerConfig, raw: dict[str, Any], stage: Any) -> list[Callable[[], Any]]:
    from ds_quant.optim.kinds import check_states, check_universal, check_zero, kind_of
    from ds_quant.optim.setup import check_granularity, json_hyperparameters

    kind = kind_of(raw)
    checks: list[Callable[[], Any]] = []
    if isinstance(stage, int):  # what else it may be is refused elsewhere
        checks.append(lambda: check_granularity(config, stage))
    if "optimizer" in raw:
        checks.append(lambda: json_hyperparameters(raw))
        checks.append(lambda: check_states(config, kind.optimizer, kind.name))
        checks.append(lambda: check_universal(raw, kind))
        checks.append(lambda: check_zero(raw, kind))
    return checks


def main(arguments: list[str] | None = None, *, prog: str = "ds_quant_report") -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plan"]:
        from ds_quant.cli import plan

        return plan.main(arguments[1:], prog=f"{prog} plan")
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("config", nargs="?", help="a DeepSpeed JSON; the report then says what it will do")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of the ds_quant section and stop")
    parser.add_argument("--for", dest="way", choices=WAYS, help="print the config for this front end and exit")
    parser.add_argument("--output", help="with --for: the file to write instead")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help='with --for: the value of an "auto", as JSON'
    )
    options = parser.parse_args(arguments)
    if options.way and not options.config:
        parser.error("--for: got no config; allowed: one; fix: name a DeepSpeed JSON before it")
    if not options.way and (options.output or options.set):
        parser.error("--output and --set: got no --for; allowed: with --for only; fix: add it")
    if options.way:
        return _write_for(options)
    if options.schema:
        schema.show()
        return 0
    _print("installed", [(name, found or "not installed") for name, found in versions().items()])
    rows, problems = environment()
    _print("this machine", rows)
    if options.config:
        try:
            rows, refused = explain(options.config)
            _print(options.config, rows)
            problems += refused
        except ConfigError as error:
            problems += str(error).splitlines()
    for problem in problems:
        print(f"REFUSED {problem}")
    return 1 if problems else 0


def _write_for(options: argparse.Namespace) -> int:
    values = {}
    try:
        for given in options.set:
            key, _, text = given.partition("=")
            try:
                values[key.replace(".", "__")] = json.loads(text)
            except json.JSONDecodeError as error:
                raise fail("--set", given, "KEY=VALUE with a JSON value", "write for example --set lr=0.001") from error
        raw = read_deepspeed_config(options.config)
        QuantConfig.load(raw)
        config, lines = config_for(raw, options.way, values)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    text = json.dumps(config, indent=2)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
    else:
        print(text)
    for line in lines:
        print(line, file=sys.stderr)
    return 0


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(f"{title}:")
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    print()


if __name__ == "__main__":
    sys.exit(main())
