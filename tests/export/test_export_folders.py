"""The folder that is exported and the one that is written; the command."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from small_exports import W8A8, saved

from ds_quant.cli.export import main
from ds_quant.config import ConfigError
from ds_quant.export import export

# ---- what is no checkpoint, or not a whole one


def test_folders_that_are_no_checkpoint(tmp_path):
    source = saved(tmp_path / "run" / "model", W8A8)
    with pytest.raises(ConfigError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"config.json.*name one of the folders in it: model"):
        export(tmp_path / "run", tmp_path / "out")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "latest").write_text("global_step4")
    with pytest.raises(ConfigError, match="DeepSpeed's own files alone"):
        export(raw, tmp_path / "out")
    shutil.copyfile(source / "config.json", raw / "config.json")
    with pytest.raises(ConfigError, match="stage3_gather_16bit_weights_on_model_save"):
        export(raw, tmp_path / "out")
    (raw / "config.json").write_text('{"architectures": ')
    with pytest.raises(ConfigError, match="broken JSON"):
        export(raw, tmp_path / "out")
    export(source, tmp_path / "done")
    with pytest.raises(ConfigError, match="a model in compressed-tensors already"):
        export(tmp_path / "done", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "of another save", "index"])
def test_shards_that_are_missing_or_broken(damage, tmp_path):
    source = saved(tmp_path / "model", W8A8, shard="100KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "of another save":
        save_file({"model.other": torch.zeros(3)}, shard)
    else:
        shard = source / "model.safetensors.index.json"
        shard.write_text("{}")
    with pytest.raises(ConfigError, match=f"{shard.name}: got .*; allowed: .*; fix: copy"):
        export(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"files with no model.layers.2"),
        ({"num_hidden_layers": 1}, r"files with the surplus model.layers.1"),
        (
            {"intermediate_size": 96},
            r"another shape of model.layers.0.mlp.down_proj.weight \(\[64, 104\] instead of \[64, 96\]\) and 5",
        ),
        ({"architectures": ["NoSuchModel"]}, r"architectures: got \[\"NoSuchModel\"\]"),
        ({"hidden_size": "wide"}, r"values that LlamaForCausalLM cannot be built from"),
    ],
)
def test_weights_of_another_config(change, message, tmp_path):
    source = saved(tmp_path / "model", W8A8)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        export(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- the folder that is written


def test_out_is_new_or_empty(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    out = tmp_path / "out"
    out.mkdir()
    export(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for place in (out, source, out / "config.json"):
        with pytest.raises(ConfigError, match="allowed: a new or an empty folder"):
            export(source, place)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ConfigError, match="no such folder"):
        export(source, tmp_path / "nowhere" / "out")
    assert out.stat().st_mode == source.stat().st_mode
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of a file stands in for the disk: the system refuses the write in the same place."""
    source = saved(tmp_path / "model", W8A8)
    program = (
        "import resource, signal, sys; from ds_quant.cli.export import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr
    assert "model.safetensors could not be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_signal_leaves_nothing(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    # Stopped while it writes: the second file's tensors are never read to their end.
    program = (
        "import sys, time; from ds_quant.cli.export import main; from ds_quant.export import exporter\n"
        "def slow(name, *rest):\n    print(name, flush=True); time.sleep(60)\n"
        "exporter.encode = slow; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, source, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline().startswith("model.layers")
        assert len(list(tmp_path.iterdir())) == 2
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=200) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command(tmp_path, capsys):
    source = saved(tmp_path / "model", W8A8)
    assert main([str(source), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "int-quantized: 14 linear modules" in printed
    assert "as they were: lm_head" in printed
    assert "holds no tokenizer" in printed
    assert main([str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("ds_quant_export: ")


def test_without_the_package(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    program = (
        "import sys; sys.modules['compressed_tensors'] = None; from ds_quant.cli.export import main\n"
        "print(*[main([*sys.argv[1:], '--format', format]) for format in ('compressed-tensors', 'bf16')])"
    )
    command = [sys.executable, "-c", program, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    assert done.stdout.splitlines()[-1] == "2 0", done.stderr
    assert "fix: pip install 'ds_quant[export]'" in done.stderr
