"""The shipped configs: the matrix is complete and as its script writes it, they differ in the section only, stock
DeepSpeed refuses each of them unless it is full precision, and each trains."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from studying.rows import all_rows
from sweeping import paper
from sweeping.matrix import shipped

from ds_quant.config import TRIPWIRE, QuantConfig, has_tripwire, resolve_auto, unresolved_auto
from ds_quant.config.deepspeed_json import TRIPWIRE_VALUE
from ds_quant.config.refusals import check_refusals

FILES = shipped(ROOT / "ds_configs")
NAMES = list(FILES)
QUANTIZED = [name for name in NAMES if name != "baseline"]

# Rows of the experiment matrix, as (bits, granularity, rest) by operand.
ROWS = {
    "w8_tensor": {"weight": (8, "tensor")},
    "w8_channel": {"weight": (8, "channel")},
    "w4_tensor": {"weight": (4, "tensor")},
    "w4_channel": {"weight": (4, "channel")},
    "a8_tensor": {"activation": (8, "tensor")},
    "a8_token": {"activation": (8, "token")},
    "a4_tensor": {"activation": (4, "tensor")},
    "a4_token": {"activation": (4, "token")},
    "a4_channel": {"activation": (4, "channel")},
    "a4_token_asymmetric": {"activation": (4, "token")},
    "g8_tensor": {"gradient": (8, "tensor")},
    "g8_token": {"gradient": (8, "token")},
    "g8_token_input": {"gradient": (8, "token")},
    "g4_tensor": {"gradient": (4, "tensor")},
    "g4_token": {"gradient": (4, "token")},
    "w8a8": {"weight": (8, "channel"), "activation": (8, "token")},
    "w8a8_full_range": {"weight": (8, "channel"), "activation": (8, "token")},
    "w8a8g8": {"weight": (8, "channel"), "activation": (8, "token"), "gradient": (8, "outer")},
}
PAPER_ROWS = {f"paper_{name}": row for name, row in ROWS.items() if name != "w8a8_full_range"} | {
    "paper_w8a8g8": {**ROWS["w8a8"], "gradient": (8, "token")}
}

BLOCK_8, BLOCK_4 = (8, "float", "block", 256, None), (4, "power", "block", 128, None)
LOG_4 = (4, "log", "block", 128, None)
TENSOR_8, CHANNEL_8 = (8, "linear", "tensor", None, "nearest"), (8, "linear", "channel", None, "nearest")
TENSOR_4, CHANNEL_4 = (4, *TENSOR_8[1:]), (4, *CHANNEL_8[1:])

# Rows on the moments: (exp_avg, exp_avg_sq), each (bits, map, granularity, block_size, rounding) or None.
MOMENT_ROWS = {
    "adam8": (BLOCK_8, BLOCK_8),
    "adam4": (BLOCK_4, LOG_4),
    "m4v8": (BLOCK_4, BLOCK_8),
    "w8a8_adam8": (BLOCK_8, BLOCK_8),
    "paper_m8_tensor": (TENSOR_8, None),
    "paper_m8_channel": (CHANNEL_8, None),
    "paper_m4_tensor": (TENSOR_4, None),
    "paper_m4_channel": (CHANNEL_4, None),
    "paper_v8_tensor": (None, TENSOR_8),
    "paper_v8_channel": (None, CHANNEL_8),
}
# Rows on the wire: (bits, block_size, error_feedback), beside the linear layers and moments of another row.
WIRE_ROWS = {
    "comm8": ((8, 256, False), None, None),
    "comm4": ((4, 128, True), None, None),
    "w8a8_adam8_comm8": ((8, 256, False), "w8a8", "adam8"),
    "all4": ((4, 128, True), "w8a8", "adam4"),
}
# Rows on integer units: linear layers, moments and wire of another row.
INT8_ROWS = {
    "w8a8_int8": ("w8a8", None, None),
    "w8a8g8_int8": ("w8a8g8", None, None),
    "full_int8": ("w8a8g8", "adam8", "comm8"),
}
# Rows of which weights cross the wire in few bits, too: another row, whose gradients, and what is said of the weights.
WEIGHT_ROWS = {
    "wire8": ("full_int8", "comm8", {"mode": "codes"}),
    "wire4": ("full_int8", "comm4", {"mode": "difference", "bits": 4}),
}
# What is recommended for three budgets: rows that have its linear layers, its moments, and what it sends.
RECOMMENDED = {
    "recommended_8bit": ("full_int8", "adam8", "wire8"),
    "recommended_4bit_states": ("full_int8", "m4v8", "wire4"),
    "recommended_4bit": (None, "m4v8", "wire4"),
}
# Rows whose training is looked at: a row of ROWS, and steps between two looks.
DIAGNOSED_ROWS = {"w8a8_diagnostics": ("w8a8", 20)}
STAGE_0 = [name for name in MOMENT_ROWS if name.startswith("paper_")]

VALUES = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": True,
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "warmup_num_steps": 2,
    "total_num_steps": 10,
}


def read(name):
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def load(name):
    return QuantConfig.load(FILES[name])


def test_the_matrix_is_complete():
    assert set(NAMES) == {
        "baseline",
        *ROWS,
        *PAPER_ROWS,
        *MOMENT_ROWS,
        *WIRE_ROWS,
        *INT8_ROWS,
        *WEIGHT_ROWS,
        *RECOMMENDED,
        *DIAGNOSED_ROWS,
    }
    assert len(list((ROOT / "ds_configs").rglob("*.json"))) == len(NAMES), "one name, one file"


def test_the_papers_matrix_is_what_its_script_writes(tmp_path):
    (tmp_path / "baseline.json").write_bytes(FILES["baseline"].read_bytes())
    paper.write(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.json")}
    folder = ROOT / "ds_configs"
    assert {folder / path for path in written} >= set((folder / "paper").iterdir())
    for path, content in written.items():
        assert (folder / path).read_bytes() == content, f"{path}: run python launchers/sweeping/paper.py"


@pytest.mark.parametrize("name", DIAGNOSED_ROWS)
def test_each_diagnosed_row_is_another_that_is_looked_at(name):
    quant, (linear, every) = load(name), DIAGNOSED_ROWS[name]
    assert quant.model_copy(update={"diagnostics": None}) == load(linear)
    assert quant.diagnostics.every == every
    assert quant.diagnostics.kinds is None


@pytest.mark.parametrize("name", WEIGHT_ROWS)
def test_each_row_with_weights_on_the_wire_is_another_but_for_them(name):
    quant, (other, wire, weight) = load(name), WEIGHT_ROWS[name]
    assert quant.communication.model_copy(update={"weight": None}) == load(wire).communication
    assert quant.model_copy(update={"communication": None}) == load(other).model_copy(update={"communication": None})
    assert quant.communication.weight.model_dump(exclude_unset=True) == weight


@pytest.mark.parametrize("name", RECOMMENDED)
def test_what_is_recommended_is_made_of_rows_that_were_measured(name):
    quant, (linear, moments, wire) = load(name), RECOMMENDED[name]
    assert quant.optimizer == load(moments).optimizer
    assert quant.communication == load(wire).communication
    if linear is not None:
        assert quant.linear == load(linear).linear
        return
    # Of the study, whose rows quantize the output layer, too.
    row = QuantConfig.load(json.loads(all_rows()["w4a4g4_nvfp4"].config)).linear
    assert row.exclude == ()
    assert quant.linear == row.model_copy(update={"exclude": None})


@pytest.mark.parametrize("name", INT8_ROWS)
def test_each_row_on_integer_units_is_another_but_for_the_backend(name):
    quant, (linear, moments, wire) = load(name), INT8_ROWS[name]
    assert quant.linear.backend == "int8"
    assert quant.linear.model_copy(update={"backend": "simulated"}) == load(linear).linear
    assert quant.optimizer == (load(moments).optimizer if moments else None)
    assert quant.communication == (load(wire).communication if wire else None)


@pytest.mark.parametrize("name", WIRE_ROWS)
def test_each_row_on_the_wire_says_what_its_name_says(name):
    quant, (expected, linear, moments) = load(name), WIRE_ROWS[name]
    gradient = quant.communication.gradient
    assert (gradient.bits, gradient.block_size, gradient.error_feedback) == expected
    assert (gradient.rounding, gradient.rotation, gradient.hierarchical) == ("nearest", "none", False)
    assert quant.linear == (load(linear).linear if linear else None)
    assert quant.optimizer == (load(moments).optimizer if moments else None)


@pytest.mark.parametrize("name", MOMENT_ROWS)
def test_each_moment_row_says_what_its_name_says(name):
    quant = QuantConfig.load(FILES[name])
    assert quant.communication is None
    assert quant.linear == (QuantConfig.load(ROOT / "ds_configs" / "w8a8.json").linear if "w8a8" in name else None)
    assert quant.optimizer.exclude == ()
    for moment, expected in zip((quant.optimizer.exp_avg, quant.optimizer.exp_avg_sq), MOMENT_ROWS[name], strict=True):
        found = None
        if moment is not None:
            block_size = moment.block_size if moment.granularity == "block" else None
            found = (moment.bits, moment.map, moment.granularity, block_size, moment.rounding)
        assert found == expected


@pytest.mark.parametrize("name", [*ROWS, *PAPER_ROWS])
def test_each_says_what_its_name_says(name):
    quant = QuantConfig.load(FILES[name])
    paper = name.startswith("paper_")
    linear = quant.linear
    assert quant.optimizer is None
    assert quant.communication is None
    found = {
        operand: (getattr(linear, operand).bits, getattr(linear, operand).granularity)
        for operand in ("weight", "activation", "gradient")
        if getattr(linear, operand)
    }
    assert found == (PAPER_ROWS if paper else ROWS)[name]
    assert linear.backend == "simulated"
    assert linear.backward_operands == ("original" if paper else "quantized")
    assert linear.include == ("*",)
    assert linear.exclude == (() if paper else None)
    if linear.activation:
        assert linear.activation.range == ("full" if name.endswith("full_range") else "narrow")
    for operand in found:
        assert getattr(linear, operand).symmetric is not name.endswith("asymmetric")
        stochastic = name == "w8a8g8" and operand == "gradient"
        assert getattr(linear, operand).rounding == ("stochastic" if stochastic else "nearest")
    if linear.gradient:
        products = ("weight",) if paper else ("weight", "input")
        assert linear.gradient.used_for == (("input",) if name.endswith("_input") else products)


def test_the_baseline_is_full_precision():
    assert "ds_quant" not in read("baseline")
    assert not QuantConfig.load(ROOT / "ds_configs" / "baseline.json").enabled


@pytest.mark.parametrize("name", QUANTIZED)
def test_they_differ_from_the_baseline_in_the_section_and_the_tripwire_only(name):
    config = read(name)
    del config["ds_quant"]
    assert config["zero_optimization"].pop(TRIPWIRE) == TRIPWIRE_VALUE
    if name in STAGE_0:  # whole parameters exist there only
        assert config["zero_optimization"]["stage"] == 0
        config["zero_optimization"]["stage"] = read("baseline")["zero_optimization"]["stage"]
    assert config == read("baseline")
    assert list(config) == list(read("baseline"))


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_each_resolves_at_any_world_size(name, world_size):
    resolved = resolve_auto(FILES[name], world_size=world_size, **VALUES)
    assert unresolved_auto(resolved) == []
    assert resolved["train_batch_size"] == 2 * world_size
    assert has_tripwire(resolved) is (name != "baseline")
    check_refusals(resolved, QuantConfig.load(resolved))


def test_their_autos_are_those_that_trainer_fills():
    assert unresolved_auto(read("w8a8")) == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_num_steps",
    ]


# ---- with DeepSpeed, all configs in one process


def run_with_deepspeed(script: str, configs: dict[str, dict], tmp_path: Path) -> dict:
    env = {
        # Where DeepSpeed builds its communication op, once: about a minute.
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    (tmp_path / "configs.json").write_text(json.dumps(configs), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "configs.json"), str(tmp_path / "out.json")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # There, since diagnostics write into the current folder.
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def resolved_configs() -> dict[str, dict]:
    return {name: resolve_auto(FILES[name], **VALUES) for name in NAMES}


STOCK = """
import json, sys
import deepspeed
import torch

results = {}
for name, config in json.load(open(sys.argv[1])).items():
    model = torch.nn.Linear(4, 4)
    try:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        results[name] = "accepted"
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
json.dump(results, open(sys.argv[2], "w"))
deepspeed.comm.destroy_process_group()
"""


@pytest.mark.timeout(500)
@pytest.mark.thorough
def test_stock_deepspeed_refuses_each_but_the_baseline(tmp_path):
    configs = resolved_configs()
    # The control: without the tripwire, stock DeepSpeed takes the section and would train in full precision.
    untripped = json.loads(json.dumps(configs["w8a8"]))
    del untripped["zero_optimization"][TRIPWIRE]
    results = run_with_deepspeed(STOCK, {**configs, "untripped": untripped}, tmp_path)
    assert results.pop("baseline") == "accepted"
    assert results.pop("untripped") == "accepted"
    assert set(results) == set(QUANTIZED)
    for name, result in results.items():
        assert result.startswith("ValidationError"), (name, result)
        assert TRIPWIRE in result
        assert TRIPWIRE_VALUE in result, "stock DeepSpeed's error tells what to do"


TRAIN = """
import json, sys
import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ds_quant
from ds_quant.optim.state import QuantizedState

results = {}
for name, config in json.load(open(sys.argv[1])).items():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32,
    ))
    before = model.lm_head.weight.detach().clone()
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens = torch.randint(128, (2, 16))
    losses = []
    for _ in range(4):  # the first steps of the warm-up have a learning rate of 0
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    results[name] = {
        "losses": losses,
        "moved": not torch.equal(before.to(engine.module.lm_head.weight.dtype), engine.module.lm_head.weight),
        "moments": sorted({
            f"{key} {value.blocks.code_map.bits}" if isinstance(value, QuantizedState) else f"{key} 32"
            for state in engine.basic_optimizer.state.values() for key, value in state.items() if key != "step"
        }),
        "reduces": hasattr(engine, "ds_quant_gradients"),
        "quantized": [n for n, m in engine.module.named_modules() if isinstance(m, ds_quant.QuantLinear)],
    }
json.dump(results, open(sys.argv[2], "w"))
deepspeed.comm.destroy_process_group()
"""


@pytest.mark.timeout(500)
@pytest.mark.thorough
def test_every_config_trains_a_step(tmp_path):
    results = run_with_deepspeed(TRAIN, resolved_configs(), tmp_path)
    assert set(results) == set(NAMES)
    for name, result in results.items():
        assert all(math.isfinite(loss) for loss in result["losses"]), (name, result)
        assert result["moved"], name
        # two layers of seven linears; the paper quantized lm_head too
        linear, moments_row = WIRE_ROWS.get(name, (None, None, None))[1:]
        row = WEIGHT_ROWS[name][0] if name in WEIGHT_ROWS else name
        linear, moments_row, wire = INT8_ROWS.get(row, (linear, moments_row, name if name in WIRE_ROWS else None))
        _, moments_row, wire = RECOMMENDED.get(name, (None, moments_row, wire))
        without = name == "baseline" or (name in MOMENT_ROWS and name != "w8a8_adam8")
        without |= name in WIRE_ROWS and not linear
        expected = 0 if without else 14 + name.startswith("paper_")
        assert len(result["quantized"]) == expected, (name, result["quantized"])
        assert ("lm_head" in result["quantized"]) is (name.startswith("paper_") and not without)
        moments = MOMENT_ROWS.get(moments_row or name, (None, None))
        assert result["reduces"] == bool(wire), name
        kinds = zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
        assert result["moments"] == [f"{key} {moment[0] if moment else 32}" for key, moment in kinds], name
    baseline = results.pop("baseline")["losses"]
    for name in {*ROWS, *PAPER_ROWS}:
        result = results[name]
        assert result["losses"] != baseline, f"{name} trained in full precision"
