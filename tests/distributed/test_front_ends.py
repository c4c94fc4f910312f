"""Every way into DeepSpeed, with two real ranks, at every ZeRO stage."""

import json
import math

import pytest
import torch
from common import VOCABULARY, batch, tiny_llama_config
from conftest import ROOT, free_port
from helpers.launching import PROGRAMS, deepspeed, launch, run_ranks
from native import ACCUMULATION, LR, ROWS, STEPS
from transformers import LlamaForCausalLM

import ds_quant
from ds_quant.base.number_formats import FORMATS

pytestmark = pytest.mark.distributed

CONFIG = ROOT / "ds_configs" / "w8a8g8.json"
STAGES = (0, 1, 2, 3)
TIMEOUT = 240
NUM_LINEARS = 14
NATIVE = [
    *((stage, dtype) for stage in STAGES for dtype in ("fp32", "bf16")),
    *((stage, dtype) for stage in (1, 3) for dtype in ("autocast", "offload")),
]


def reference_losses(section, num_steps):
    """The mean loss of each micro batch, from a plain torch loop over the batches of both ranks, in fp32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    if section:
        ds_quant.convert(model, section)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(num_steps):
        # DeepSpeed's WarmupCosineLR with two warm-up steps takes two steps at 0, then half of the rate.
        optimizer.param_groups[0]["lr"] = (0.0, 0.0, LR / 2)[step]
        optimizer.zero_grad()
        for micro in range(ACCUMULATION):
            data = batch(step * ACCUMULATION + micro, ROWS * 2)
            loss = model(input_ids=data, labels=data).loss
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    output = tmp_path_factory.mktemp("native") / "report.json"
    cases = [f"{stage}:{dtype}" for stage, dtype in NATIVE]
    run_ranks(PROGRAMS / "native.py", output, CONFIG, *cases, timeout=TIMEOUT)
    return json.loads(output.read_text())


@pytest.mark.parametrize(("stage", "dtype"), NATIVE)
def test_native_loop(native, stage, dtype):
    got = native[f"{stage}:{dtype}"]
    assert len(got["converted"]) == NUM_LINEARS
    assert got["key"] == [STEPS + 1, ACCUMULATION - 1]
    assert got["keys"] == [[100, 0], [100, 1]], "one seed for all ranks, and each rank's own number"
    section = ds_quant.QuantConfig.load(CONFIG).linear
    want = reference_losses(section, STEPS)
    plain = reference_losses(None, STEPS)
    # The first loss is deterministic: a mean of means in fp32, a few units of 2^-22 at 4.6. Later ones are not: two
    # ranks draw other bits for the gradients than one, which at 8 bits moves a loss far less than the steps do.
    full = dtype in ("fp32", "offload")
    tolerance = 2e-6 if full else 2**-8
    assert abs(got["losses"][0] - want[0]) < tolerance
    if full:
        assert abs(plain[0] - want[0]) > 2 * tolerance, "the reference cannot tell quantized from plain"
    for a, b in zip(got["losses"], want, strict=True):
        assert abs(a - b) < 0.01


@pytest.mark.parametrize(("stage", "dtype"), NATIVE)
def test_native_resume_is_exact(native, stage, dtype):
    """Stochastic rounding included: the losses after loading are those of the run that went on."""
    got = native[f"{stage}:{dtype}"]
    assert got["resumed"] == got["undisturbed"]
    assert len(set(got["resumed"])) > 1


def test_stages_agree(native):
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 2e-3)):
        for stage in STAGES[1:]:
            for a, b in zip(native[f"{stage}:{dtype}"]["losses"], native[f"0:{dtype}"]["losses"], strict=True):
                assert abs(a - b) < tolerance


NVFP4 = {"format": "nvfp4", "scale_rule": "four_six"}


def each_format():
    """Every format of the registry in one of three operands."""
    names = list(FORMATS)
    for first in range(0, len(names), 3):
        weight, activation, gradient = (names[(first + number) % len(names)] for number in range(3))
        groups = {} if FORMATS[gradient].block_size else {"granularity": "token"}
        yield (
            f"{weight} {activation} {gradient}",
            {
                "weight": {"format": weight},
                "activation": {"format": activation},
                "gradient": {"format": gradient, "rounding": "stochastic", **groups},
                "rotation": {"used_for": ["output"]},
            },
        )


LINEARS = {
    **dict(each_format()),
    "repairs of 4 bits": {
        "weight": NVFP4,
        "activation": {**NVFP4, "split_mean": True},
        "gradient": {"format": "nvfp4", "split_mean": True, "rounding": "ms_eden"},
        "rotation": {"block_size": 32, "signs": "drawn", "used_for": ["input", "weight"]},
    },
    "outliers, trust and dampening": {
        "weight": {"bits": 4, "trust_distance": 0.4, "dampening": 0.01},
        "activation": {"bits": 4, "outlier_share": 0.1},
        "gradient": {"bits": 8, "granularity": "token", "rounding": "stochastic"},
    },
    "fp8": {
        "weight": {"format": "fp8_e4m3"},
        "activation": {"format": "fp8_e4m3"},
        "gradient": {"format": "fp8_e5m2", "rounding": "stochastic"},
        "backend": "fp8",
    },
    "int8, then none": {
        "weight": {"bits": 8},
        "activation": {"bits": 8},
        "gradient": {"bits": 8, "rounding": "stochastic"},
        "backend": "int8",
        "forward_full_precision_from": STEPS + 1,
    },
}
QUICK = ("repairs of 4 bits", "outliers, trust and dampening", "int8, then none")


def first_loss(section, layers):
    """Of the first micro step, by a model that no engine drives; the ranks' inputs are quantized each by itself."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=layers)).eval()
    if section:
        ds_quant.convert(model, section)
    data = batch(0, ROWS * 2)
    with torch.no_grad():
        return sum(model(input_ids=part, labels=part).loss.item() for part in (data[::2], data[1::2])) / 2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LINEARS]
)
def test_formats_at_every_stage(tmp_path, name):
    """The stages agree as they do for integers, and a resumed run is the one that went on."""
    linear, layers = LINEARS[name], 1 if "rotation" in LINEARS[name] else 2  # they take the longest
    settings = json.loads(CONFIG.read_text())
    settings["ds_quant"]["linear"] = linear
    (tmp_path / "config.json").write_text(json.dumps(settings))
    output = tmp_path / "report.json"
    cases = [f"{stage}:fp32" for stage in STAGES]
    environment = {"LAYERS": str(layers)}
    run_ranks(PROGRAMS / "native.py", output, tmp_path / "config.json", *cases, timeout=TIMEOUT, env=environment)
    report = json.loads(output.read_text())
    want, plain = first_loss(linear, layers), first_loss(None, layers)
    for got in report.values():
        assert len(got["converted"]) == NUM_LINEARS // 2 * layers
        assert got["resumed"] == got["undisturbed"]
        assert got["losses"] == pytest.approx(report["0:fp32"]["losses"], abs=1e-5)
        assert got["undisturbed"] == pytest.approx(report["0:fp32"]["undisturbed"], abs=1e-4)
        assert abs(got["losses"][0] - want) < 2e-6 < abs(plain - want) / 2
        is_over = "forward_full_precision_from" in linear
        assert all(("since step" in text) == is_over for text in got["converted"].values())


ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {config}, zero3_init_flag: false}}
machine_rank: 0
num_machines: 1
num_processes: 2
use_cpu: true
main_process_port: {port}
"""

CASES = [*(f"{stage}:bf16" for stage in STAGES), "1:fp32", "3:fp32"]


def check(report):
    assert list(report) == CASES
    for case, got in report.items():
        stage, dtype = case.split(":")
        assert got["world_size"] == 2
        assert got["stage"] == int(stage)
        assert got["dtype"] == {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[dtype]
        assert len(got["converted"]) == NUM_LINEARS
        # An untrained model knows nothing: ln(vocabulary), give or take its initial weights.
        assert abs(got["losses"][0] - math.log(VOCABULARY)) < 0.05
        assert all(math.isfinite(loss) for loss in got["losses"])
    for case in CASES[1:3]:
        assert report[case]["losses"] == pytest.approx(report["0:bf16"]["losses"], abs=2e-3)


def test_trainer_under_deepspeed_as_a_module(tmp_path):
    """`deepspeed --module ds_quant SCRIPT` puts --local_rank before the script's name."""
    output = tmp_path / "report.json"
    program = PROGRAMS / "hf_trainer.py"
    _, printed = launch(deepspeed("--module", "ds_quant", program, output, CONFIG, *CASES), timeout=TIMEOUT)
    report = json.loads(output.read_text())
    check(report)
    section = json.loads(CONFIG.read_text())["ds_quant"]
    assert all(got["section"] == section for got in report.values())
    assert printed.count(f"[ds_quant] {NUM_LINEARS} linear modules quantized") == len(CASES)


@pytest.fixture
def with_communication(tmp_path):
    """CONFIG, with gradients quantized on the wire as well."""
    config = json.loads(CONFIG.read_text())
    config["ds_quant"]["communication"] = {"gradient": {"bits": 8}}
    path = tmp_path / "communication.json"
    path.write_text(json.dumps(config))
    return path


def check_communication(printed):
    assert printed.count("gradients cross the wire in 8 bits in blocks of 256") == len(CASES)


def test_trainer_under_accelerate(tmp_path, with_communication):
    output, yaml = tmp_path / "report.json", tmp_path / "accelerate.yaml"
    yaml.write_text(ACCELERATE.format(config=with_communication, port=free_port()))
    program, config = PROGRAMS / "hf_trainer.py", with_communication
    command = ["accelerate", "launch", "--config_file", yaml, "-m", "ds_quant", program, output, config, *CASES]
    _, printed = launch(command, timeout=TIMEOUT)
    check(json.loads(output.read_text()))
    check_communication(printed)


def test_raw_accelerate_loop(tmp_path, with_communication):
    output, yaml = tmp_path / "report.json", tmp_path / "accelerate.yaml"
    yaml.write_text(ACCELERATE.format(config=with_communication, port=free_port()))
    program = PROGRAMS / "raw_accelerate.py"
    command = ["accelerate", "launch", "--config_file", yaml, program, output, with_communication, *CASES]
    _, printed = launch(command, timeout=TIMEOUT)
    check(json.loads(output.read_text()))
    check_communication(printed)


def test_a_refused_config_ends_all_ranks(tmp_path):
    """The error comes once a rank, and nobody waits for anybody."""
    config = json.loads(CONFIG.read_text())
    config["ds_quant"]["linear"]["weight"]["bits"] = 9
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(config))
    program, output = PROGRAMS / "native.py", tmp_path / "report.json"
    status, printed = run_ranks(program, output, path, "1:fp32", timeout=120, check=False)
    assert status != 0
    assert "ds_quant.linear.weight.bits: got 9; allowed: " in printed
    assert not (tmp_path / "report.json").exists()
