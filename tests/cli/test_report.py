"""`ds_quant_report` and `python -m ds_quant`, as a user calls them."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from ds_quant.__main__ import main as run_module
from ds_quant.__main__ import split_arguments
from ds_quant.cli.report import explain, main
from ds_quant.engine.extension_locks import STALE_SECONDS


def test_versions_and_seams(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert f"deepspeed     {version('deepspeed')}" in printed
    assert "MISSING" not in printed
    assert "DeepSpeedEngine.forward" in printed
    assert "accelerator" in printed
    for title in ("AdamW's steps", "operands and results of int8 products", "gradients on the wire"):
        assert f"{title} on cpu" in printed


def test_what_a_config_does(root, capsys):
    assert main([str(root / "ds_configs" / "w8a8g8.json")]) == 0
    printed = capsys.readouterr().out
    assert "W8 channel, A8 token, G8 outer stochastic for dW+dX (simulated)" in printed
    assert "the model's output heads" in printed
    assert "optimizer.params.lr" in printed
    rows, problems = explain(str(root / "ds_configs" / "baseline.json"))
    assert ("ds_quant section", "absent: a plain DeepSpeed run in full precision") in rows
    assert problems == []


def test_what_happens_to_the_moments(root):
    rows, problems = explain(str(root / "ds_configs" / "m4v8.json"))
    assert problems == []
    assert dict(rows)["AdamW's moments"].startswith("exp_avg 4-bit power per block of 128, ")
    assert dict(rows)["  bytes a parameter"] == "1.55 instead of 8"
    assert dict(rows)["  optimizer"] == "the config's optimizer section"
    rows, _ = explain(str(root / "ds_configs" / "w8a8.json"))
    assert dict(rows)["AdamW's moments"] == "32 bits"


def test_what_happens_on_the_wire(root):
    rows, problems = explain(str(root / "ds_configs" / "comm4.json"))
    assert problems == []
    assert dict(rows)["gradients on the wire"] == "4 bits in blocks of 128, error feedback"
    assert dict(rows)["  bytes an element"] == "0.531 instead of 4 or 2"
    assert dict(rows)["  by"] == "reduce-scatter, once a step"
    config = json.loads((root / "ds_configs" / "comm8.json").read_text())
    config["zero_optimization"] |= {"stage": 2, "reduce_scatter": False}
    assert dict(explain(config)[0])["  by"] == "all-reduce"
    config["sparse_gradients"] = True
    assert [problem.split(":")[0] for problem in explain(config)[1]] == ["sparse_gradients"]
    assert dict(explain(str(root / "ds_configs" / "w8a8.json"))[0])["gradients on the wire"] == "full precision"


def test_when_weights_cross_the_wire(root):
    config = json.loads((root / "ds_configs" / "wire8.json").read_text())
    assert dict(explain(config)[0])["  gathered"] == "once a step"
    config["zero_optimization"]["stage"] = 3
    rows, problems = explain(config)
    assert problems == []
    assert dict(rows)["  gathered"] == "before the forward and the backward of a layer"


def test_problems_of_the_moments(root):
    config = json.loads((root / "ds_configs" / "adam8.json").read_text())
    config["ds_quant"]["optimizer"] = {"exp_avg": {"bits": 8, "map": "linear", "granularity": "tensor"}}
    config["optimizer"]["type"] = "Lamb"
    _, problems = explain(config)
    assert [problem.split(":")[0] for problem in problems] == [
        "ds_quant.optimizer.exp_avg.granularity",
        "optimizer.type",
    ]
    del config["optimizer"]
    config["zero_optimization"]["stage"] = 0
    rows, problems = explain(config)
    assert problems == []
    assert dict(rows)["  optimizer"].startswith("none in the config: pass torch.optim.AdamW")


def test_states_of_other_optimizers(root):
    config = json.loads((root / "ds_configs" / "adam8.json").read_text())
    config["optimizer"] = {"type": "Lion", "params": {"lr": 1e-4}}
    assert "ds_quant.optimizer.exp_avg_sq: got" in explain(config)[1][0]
    config["ds_quant"]["optimizer"] = {"exp_avg": {"bits": 4}}
    config["checkpoint"] = {"load_universal": True}
    rows, problems = explain(config)
    assert dict(rows)["Lion's moments"] == "exp_avg 4-bit power per block of 128, stochastic"
    assert dict(rows)["  bytes a parameter"] == "0.53 instead of 4"
    assert [problem.split(":")[0] for problem in problems] == ["checkpoint.load_universal"]


def test_every_problem_of_a_config(root, tmp_path, capsys):
    config = json.loads((root / "ds_configs" / "w8a8.json").read_text())
    config["hybrid_engine"] = {"enabled": True}
    config["zero_optimization"]["zenflow"] = {}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "REFUSED hybrid_engine: " in printed
    assert "REFUSED zero_optimization.zenflow: " in printed
    config["ds_quant"]["linear"]["weight"]["bits"] = 9
    path.write_text(json.dumps(config))
    assert main([str(path)]) == 1
    assert "REFUSED ds_quant.linear.weight.bits: got 9" in capsys.readouterr().out
    assert main([str(tmp_path / "missing.json")]) == 1
    assert "missing.json: got no such file" in capsys.readouterr().out


def test_a_stale_lock_is_reported(tmp_path, monkeypatch, capsys):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    old = time.time() - STALE_SECONDS - 5
    for path in (lock, lock.parent):
        os.utime(path, (old, old))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert main([]) == 1
    assert f"REFUSED {lock}" in capsys.readouterr().out


def test_schema(capsys):
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"enabled", "linear", "optimizer", "communication"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["train.py", "--lr", "1"], ([], "train.py", False, ["--lr", "1"])),
        (["--local_rank=1", "train.py", "a"], (["--local_rank=1"], "train.py", False, ["a"])),
        (["-m", "pkg.train", "--x"], ([], "pkg.train", True, ["--x"])),
        (["--local_rank=0", "-m", "pkg"], (["--local_rank=0"], "pkg", True, [])),
        (["--local_rank=0"], (["--local_rank=0"], None, False, [])),
        ([], ([], None, False, [])),
        (["-m"], ([], None, True, [])),
    ],
)
def test_arguments_of_the_module(given, want):
    assert split_arguments(given) == want


def test_a_script_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ds_quant", "no_such.py"])
    assert run_module() == 2
    assert "got the script 'no_such.py', which is no file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ds_quant", "--local_rank=0"])
    assert run_module() == 2
    assert "got no script" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ds_quant", "--help"])
    assert run_module() == 0
    assert "usage: python -m ds_quant" in capsys.readouterr().out


SCRIPT = """
import sys
import neighbour
import deepspeed
print(__name__, sys.argv[1:], deepspeed.initialize.__module__, deepspeed.initialize.__closure__ is not None, __file__)
sys.exit(neighbour.STATUS)
"""


def test_an_unchanged_script_runs_with_ds_quant_enabled(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("STATUS = 7\n")
    for arguments in (["--local_rank=0", str(tmp_path / "train.py"), "--x"], ["--local_rank=0", "-m", "train", "--x"]):
        done = subprocess.run(
            [sys.executable, "-m", "ds_quant", *arguments],
            capture_output=True,
            text=True,
            timeout=400,
            cwd=tmp_path,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 7, done.stderr
        assert f"__main__ ['--local_rank=0', '--x'] deepspeed True {tmp_path}/train.py" in done.stdout
