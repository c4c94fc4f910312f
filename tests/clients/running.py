"""Runs a client twice, as it is and under ds_quant, and checks what the second run says and learns."""

import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import phases as after
import torch
from conftest import ROOT, free_port
from helpers.launching import launch

from ds_quant.base.checkpoint_files import read_checkpoint_file
from ds_quant.cli.report import main as ds_quant_report
from ds_quant.optim.state import QuantizedState

SCRIPTS = ROOT / "tests" / "clients" / "scripts"

ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {config}, zero3_init_flag: {init}}}
machine_rank: 0
num_machines: 1
num_processes: {ranks}
use_cpu: true
main_process_port: {port}
"""


@dataclass(frozen=True)
class Client:
    """A script that knows nothing of ds_quant, and how its users start it."""

    name: str
    script: str
    """A file in scripts/, or a module of an installed package."""
    arguments: tuple[str, ...]
    """`{assets}`, `{output}` and `{config}` are filled in."""
    model: str
    launcher: str
    ranks: int
    stage: int
    way: str
    """What `ds_quant_report --for` writes the config for."""
    recipe: str
    linears: int
    """How many linear modules each engine's model has for the recipe to quantize."""
    engines: int = 1
    """How many the script makes; the first one trains."""
    package: str = "transformers"
    """Whose version the table tells."""
    values: dict[str, str] = field(default_factory=dict)
    """What `ds_quant_report --set` sets."""
    stock_without: str = ""
    """A key that stock DeepSpeed fails on; the run in full precision leaves it out."""
    after: tuple[str, ...] = ()
    """Functions of `phases` that go on from the finished run."""

    @property
    def target(self):
        return [str(SCRIPTS / self.script)] if self.script.endswith(".py") else ["-m", self.script]


@dataclass
class Run:
    printed: str
    losses: list[float]
    seconds: float
    output: Path

    @property
    def report(self):
        """The lines of ds_quant."""
        return [line.partition("[ds_quant] ")[2] for line in self.printed.splitlines() if "[ds_quant] " in line]


def write_configs(client, folder):
    """(the config that ds_quant_report writes for the client, at its stage; the same without any of ds_quant)."""
    path, plain_path = folder / "quantized.json", folder / "plain.json"
    values = {"bf16": "false"} if client.way == "native" else {}
    values = [part for key, value in {**values, **client.values}.items() for part in ("--set", f"{key}={value}")]
    recipe = str(ROOT / "ds_configs" / f"{client.recipe}.json")
    assert ds_quant_report([recipe, "--for", client.way, "--output", str(path), *values]) == 0
    config = json.loads(path.read_text())
    config["zero_optimization"]["stage"] = client.stage
    if client.stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    path.write_text(json.dumps(config, indent=2))
    del config["ds_quant"], config["zero_optimization"]["ds_quant_required"]
    config.pop(client.stock_without, None)
    plain_path.write_text(json.dumps(config, indent=2))
    return path, plain_path


def command(client, config, enabled, folder):
    """(the command line up to the script's own arguments, what the environment needs beside it)."""
    port, ranks, python = free_port(), client.ranks, sys.executable
    quant = ["-m", "ds_quant"] if enabled else []
    if client.launcher == "python":
        # Stock DeepSpeed asks MPI for the ranks where no launcher has set them.
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [python, *quant, *client.target], ({} if enabled else one)
    if client.launcher == "deepspeed":
        words = [*quant, *client.target]
        words = ["--module", *words[1:]] if words[0] == "-m" else words
        return [python, "-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port, *words], {}
    if client.launcher == "torchrun":
        launcher = ["torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]
        return [python, "-m", *launcher, *quant, *client.target], {}
    yaml = folder / f"accelerate-{port}.yaml"
    yaml.write_text(ACCELERATE.format(config=config, init=str(client.stage == 3).lower(), ranks=ranks, port=port))
    return [python, "-m", "accelerate.commands.launch", "--config_file", yaml, *quant, *client.target], {}


def run(client, assets, folder, config, *, enabled, name, more=(), fails=False, timeout=300):
    """Run the client's script with output in folder/name."""
    output = folder / name
    own = {"trainer": ("--deepspeed", "{config}"), "native": ("--deepspeed", "--deepspeed_config", "{config}")}
    if client.launcher != "accelerate" and client.package != "lightning":
        more = (*own.get(client.way, ()), *more)
    words, environment = command(client, config, enabled, folder)
    filled = [part.format(assets=assets, output=output, config=config) for part in (*client.arguments, *more)]
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    started = time.perf_counter()
    status, printed = launch([*words, *filled], timeout=timeout, env=environment, cwd=folder, check=not fails)
    assert bool(status) == fails, printed
    return Run(printed, losses(printed, output), time.perf_counter() - started, output)


def run_and_check(client, assets, folder, *, beside_plain=True, phases=True):
    """(what was quantized and done, the run, the same without ds_quant or None). AssertionError where any is wrong."""
    config, plain_config = write_configs(client, folder)
    plain = run(client, assets, folder, plain_config, enabled=False, name="plain") if beside_plain else None
    quantized = run(client, assets, folder, config, enabled=True, name="quantized")
    facts = check_report(client, quantized.report, json.loads(config.read_text())["ds_quant"])
    check_moments_saved(quantized.output)
    check_losses(plain, quantized)

    def again(client, name, *more, config=config, fails=False):
        if isinstance(config, dict):
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**json.loads((folder / "quantized.json").read_text()), **config}))
            config = path
        return run(client, assets, folder, config, enabled=True, name=name, more=more, fails=fails)

    if client.stock_without and beside_plain:
        facts.append(f"full precision without {client.stock_without}, on which stock DeepSpeed fails")
    for phase in client.after if phases else ():
        facts.append(getattr(after, phase)(client, quantized, again))
    return facts, quantized, plain


def losses(printed, output):
    """Those that the Trainer keeps, or that the script prints."""
    states = sorted(output.rglob("trainer_state.json"), key=lambda path: json.loads(path.read_text())["global_step"])
    if states:
        return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]
    return [float(value) for value in re.findall(r"^step \d+: loss (\S+)$", printed, re.MULTILINE)]


def check_report(client, report, section):
    """What ds_quant reports to have quantized, in words; it must be what the section says."""
    facts = []
    counts = [int(found[1]) for line in report if (found := re.match(r"(\d+) linear modules quantized", line))]
    assert counts == ([client.linears] * client.engines if "linear" in section else []), report
    if "linear" in section:
        facts.append(" and ".join([f"{client.linears} linears"] * client.engines))
    moments = [line.partition(": ")[2] for line in report if line.startswith("AdamW's moments: ")]
    assert len(moments) == ("optimizer" in section), report
    for moment in section.get("optimizer", {}):
        assert f"{moment} {section['optimizer'][moment]['bits']}-bit" in moments[0], moments
    facts += ["moments of " + " and ".join(re.findall(r"(\d-bit)", line)) for line in moments]
    wire = [line for line in report if line.startswith("gradients cross the wire in ")]
    assert len(wire) == ("communication" in section), report
    assert ("there is one rank: nothing crosses a wire" in report) == (bool(wire) and client.ranks == 1), report
    if wire and client.ranks > 1:
        bits = section["communication"]["gradient"]["bits"]
        assert wire[0].startswith(f"gradients cross the wire in {bits} bits"), wire
        facts.append(f"gradients sent in {bits} bits")
    return facts


def check_moments_saved(output):
    """Checkpoints of the optimizer, where the script wrote some, hold codes."""
    for path in output.rglob("*optim_states.pt"):
        moments = list(saved_moments(read_checkpoint_file(str(path), mmap=True)))
        assert {isinstance(moment, QuantizedState) for moment in moments} == {True}, path


def saved_moments(state):
    if isinstance(state, dict):
        for key, value in state.items():
            if key in ("exp_avg", "exp_avg_sq") and isinstance(value, torch.Tensor):
                yield value
            else:
                yield from saved_moments(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from saved_moments(value)


def check_losses(plain, quantized):
    """The quantized run learns by other values, and as much as the plain one within a tenth."""
    assert len(quantized.losses) > 1
    assert all(map(math.isfinite, quantized.losses))
    learnt = quantized.losses[0] - quantized.losses[-1]
    assert learnt > 0.1, f"too little to compare by: {quantized.losses}"
    if plain is not None:
        assert not plain.report, "the control knows of ds_quant"
        assert len(plain.losses) == len(quantized.losses)
        assert plain.losses != quantized.losses
        assert abs(quantized.losses[-1] - plain.losses[-1]) < 0.1 * learnt, (plain.losses, quantized.losses)
