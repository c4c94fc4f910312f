"""The commands of `ds_quant diagnose` on checkpoints that the launcher trained: GPT-2 on two ranks, and a Llama."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.launching import run_ranks
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ds_quant
from ds_quant.cli import diagnose
from ds_quant.cli.shared.run_folder import read_metrics
from ds_quant.diagnostics.folder import read_file
from ds_quant.diagnostics.measurement import Measurement

SCRIPT = ROOT / "launchers" / "pretrain.py"
SMALL = "n_embd=64,n_layer=2,n_head=2"
LINEAR = {"weight": {"bits": 4}, "activation": {"bits": 8}, "gradient": {"bits": 8}}
NAMES = ("c_attn", "c_proj", "c_fc", "c_proj")


def train(place: Path, corpus: Path) -> Path:
    """A run of launchers/pretrain.py with three checkpoints, on two ranks."""
    config = json.loads((ROOT / "ds_configs" / "w8a8.json").read_text())
    config["zero_optimization"]["stage"] = 2
    config["ds_quant"] = {"linear": LINEAR, "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}}
    place.with_suffix(".json").write_text(json.dumps(config))
    flags = {
        "preset": "tiny-gpt2", "config_overrides": SMALL, "vocab_size": 320, "context_length": 32,
        "global_batch_size": 4, "max_eval_sequences": 4, "logging_steps": 1, "disable_tqdm": "true", "max_steps": 9,
        "warmup_steps": 1, "eval_steps": 9, "save_steps": 3, "save_total_limit": 3, "learning_rate": 0.01,
        "train_file": corpus, "validation_fraction": 0.2, "output_dir": place,
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    run_ranks(SCRIPT, "--deepspeed", place.with_suffix(".json"), *arguments, timeout=200)
    return place


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "gpt2", corpus)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """Random weights in full precision, with outlier channels planted in front of the first layer's attention."""
    place = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 80.0
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(gpt2 / "model").save_pretrained(place)
    return place


class Commands:
    """Runs commands in this process, on the corpus, into a folder."""

    def __init__(self, corpus: Path, output: Path, capsys: pytest.CaptureFixture[str]):
        self.corpus, self.output, self.capsys = corpus, output, capsys

    def __call__(self, command: str, *arguments: Any, code: int = 0, text: bool = True) -> str:
        flags = ["--text_file", self.corpus, "--batch_size", 2, "--batches", 2] if text else []
        words = [command, *flags, "--output", self.output, *arguments]
        assert diagnose.main([str(word) for word in words]) == code
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.out if code == 0 else printed.err

    def found(self, kind: str) -> list[Measurement]:
        return read_file(self.output / f"{kind}.json")


@pytest.fixture
def commands(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(corpus, tmp_path / "out", capsys)


def steps_of(run: Path) -> list[Path]:
    return [run / f"checkpoint-{step}" for step in (3, 6, 9)]


@pytest.mark.distributed
def test_outliers_are_those_that_were_planted_and_they_persist(commands: Commands, llama: Path) -> None:
    said = commands("outliers", llama, llama, "--persistence", "--quantizers", "off")
    first, second = commands.found("outliers")
    found = {row["layer"]: row["indices"] for row in second.rows if row["outliers"]}
    assert found == {f"model.layers.0.self_attn.{name}_proj": "7" for name in "qkv"}
    assert second.scalars["always_outliers"] == 3
    assert second.scalars["kept_share"] == 1
    assert "3 input channels" in said
    assert first.rows == second.rows
    assert first.settings["text"] == str(commands.corpus)
    assert first.settings["tokens"] == 2 * 2 * 32
    assert first.settings["quantizers"] == "off"
    names = sorted(path.name for path in commands.output.iterdir())
    assert names == ["outliers.csv", "outliers.json", "outliers.png"]


@pytest.mark.distributed
def test_gpt2_gives_every_measurement_with_its_step_and_layers(commands: Commands, gpt2: Path) -> None:
    commands("outliers", gpt2, "--no_pictures")
    (found,) = commands.found("outliers")
    layers = [f"transformer.h.{n}.{part}.{name}" for n in range(2) for part, name in
        zip(("attn", "attn", "mlp", "mlp"), NAMES, strict=True)]  # fmt: skip
    assert [row["layer"] for row in found.rows] == [*layers, "lm_head"]
    assert found.step == 9
    assert found.settings["name"] == "gpt2"
    commands("quantization-error", gpt2)
    (found,) = commands.found("quantization_error")
    assert {(row["operand"], row["bits"]) for row in found.rows} == {("weight", 4), ("activation", 8)}
    assert [row["layer"] for row in found.rows if row["operand"] == "weight"] == layers
    assert 0.05 < found.scalars["weight_relative_l2"] < 0.2  # 4 bits: a step is a seventh of the largest
    assert found.scalars["activation_relative_l2"] < 0.02
    commands("gradient-error", gpt2)
    (found,) = commands.found("gradient_error")
    assert [row["layer"] for row in found.rows] == layers
    assert 0 < found.scalars["relative_l2"] < 0.1
    assert "png" not in "".join(path.name for path in commands.output.glob("outliers*"))


@pytest.mark.distributed
def test_any_quantizer_of_gradients_can_be_asked_about(commands: Commands, llama: Path, tmp_path: Path) -> None:
    asked = [json.dumps({"bits": bits, "granularity": "token"}) for bits in (8, 4)]
    commands("gradient-error", llama, "--gradient", asked[0], "--gradient", asked[1], "--seed", "3")
    eight, four = commands.found("gradient_error")
    assert eight.scalars["relative_l2"] < four.scalars["relative_l2"]
    assert "G8 token" in eight.settings["quantizers"]
    assert "G4 token" in four.settings["quantizers"]
    commands("gradient-error", llama, "--wire", '{"bits": 4}', "--overwrite")
    (wire,) = commands.found("gradient_error")
    assert wire.settings["wire"]["bits"] == 4
    assert 0 < wire.scalars["relative_l2"] < 0.3
    assert "a quantizer of gradients" in commands("gradient-error", llama, "--overwrite", code=2)
    said = commands("gradient-error", llama, "--gradient", '{"bits": 9}', "--overwrite", code=2)
    assert "an integer from 2 to 8" in said
    trained = tmp_path / "trained"
    shutil.copytree(llama, trained)
    config = json.loads((llama / "config.json").read_text())
    config["ds_quant"] = {"linear": {"gradient": {"bits": 4, "used_for": ["weight"]}}}
    (trained / "config.json").write_text(json.dumps(config))
    commands("gradient-error", trained, "--overwrite")
    (own,) = commands.found("gradient_error")
    assert len(own.rows) == 14  # without lm_head, which training leaves alone
    assert {row["quantized"] for row in own.rows} == {"G4 outer for dW (simulated)"}
    with pytest.raises(SystemExit) as left:
        commands("gradient-error", llama, "--gradient", "8 bits")
    assert left.value.code == 2


@pytest.mark.distributed
def test_norms_come_with_the_runs_own(commands: Commands, gpt2: Path, tmp_path: Path) -> None:
    commands("gradient-norms", gpt2)
    parameters, history = commands.found("gradient_norms")
    logged = [row["grad_norm"] for row in read_metrics(gpt2 / "metrics.csv") if row["grad_norm"] is not None]
    assert [row["norm"] for row in history.rows] == logged
    assert len(logged) == 9
    assert parameters.scalars["norm"] > 0
    assert len(list(commands.output.glob("*.png"))) == 2
    alone = tmp_path / "alone"
    shutil.copytree(gpt2 / "model", alone)
    assert "no metrics.csv" in commands("gradient-norms", alone, "--overwrite")
    assert len(commands.found("gradient_norms")) == 1


@pytest.mark.distributed
def test_sharpness_and_landscape_repeat_themselves_and_leave_the_checkpoint_alone(
    commands: Commands, gpt2: Path, llama: Path
) -> None:
    before = load_file(llama / "model.safetensors")
    for kind, arguments in (("sharpness", ()), ("landscape", ("--points", 3, "--span", 0.1, "--dimensions", 2))):
        commands(kind, gpt2, llama, *arguments)
        first = commands.found(kind)
        commands(kind, gpt2, llama, *arguments, "--overwrite")
        again = commands.found(kind)
        assert [found.rows for found in first] == [found.rows for found in again]
        assert [found.settings["name"] for found in first] == ["gpt2", "llama"]
    after = load_file(llama / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    commands("landscape", llama, "--points", 3, "--span", 0.1, "--dimensions", 2, "--seed", 1, "--overwrite")
    assert commands.found("landscape")[0].rows != again[1].rows


@pytest.mark.distributed
def test_moments_of_two_ranks_are_whole_parameters(commands: Commands, gpt2: Path) -> None:
    commands("moments", gpt2, "--format", '{"bits": 8, "map": "linear", "granularity": "channel"}', text=False)
    (found,) = commands.found("moments")
    assert found.step == 9
    tensors = load_file(gpt2 / "model" / "model.safetensors")
    counted = sum(tensor.numel() for name, tensor in tensors.items() if name != "lm_head.weight")  # tied
    assert found.settings["elements"] == counted
    (label,) = found.settings["formats"]
    assert label == "8-bit linear per channel"
    commands("moments", *steps_of(gpt2), "--moment", "exp_avg", "--overwrite", text=False)
    assert [one.step for one in commands.found("moments")] == [3, 6, 9]


@pytest.mark.parametrize("moments", [None, {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}])
def test_moments_of_stage_0_stand_beside_the_weights(
    commands: Commands, tmp_path: Path, moments: dict[str, Any] | None, single_rank: None
) -> None:
    model = torch.nn.Linear(64, 8)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 0, "ds_quant_required": True},
        "ds_quant": {"optimizer": moments} if moments else {"linear": {"weight": {"bits": 8}}},
    }
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    x = torch.randn(4, 64)
    engine.backward(engine(x).square().mean())
    engine.step()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    engine.save_checkpoint(checkpoint, tag="global_step1")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    commands("moments", tmp_path / "run" / "checkpoint-1", "--format", '{"bits": 8, "map": "linear"}', text=False)
    (found,) = commands.found("moments")
    assert (found.step, found.settings["elements"]) == (1, 64 * 8 + 8)
    moment = engine.optimizer.state[model.weight]["exp_avg_sq"]
    largest = math.floor(math.log2(float(moment.max())))
    assert found.rows[-1]["bin"] == f"2^{largest}"


@pytest.mark.distributed
def test_moments_of_what_has_none(commands: Commands, gpt2: Path, llama: Path, tmp_path: Path) -> None:
    for place in (gpt2 / "model", llama):
        assert "without optimizer states" in commands("moments", place, code=2, text=False)
    assert "no such folder" in commands("moments", tmp_path / "no", code=2, text=False)
    broken = tmp_path / "run" / "checkpoint-9"
    shutil.copytree(gpt2 / "checkpoint-9", broken)
    next((broken / "global_step9").glob("*rank_1*optim_states.pt")).unlink()
    assert "is missing" in commands("moments", broken, code=2, text=False)
    assert not commands.output.exists()


@pytest.mark.distributed
def test_oscillation_over_checkpoints(commands: Commands, gpt2: Path, llama: Path) -> None:
    said = commands("oscillation", *steps_of(gpt2), text=False)
    first, second, third = commands.found("oscillation")
    assert "changed" not in first.scalars
    assert 0 < second.scalars["changed"] < 1
    assert 0 <= third.scalars["reversed"] <= third.scalars["changed"]
    assert [found.step for found in (first, second, third)] == [3, 6, 9]
    assert "go back the way" in said
    assert commands.output.joinpath("oscillation.csv").read_text().count("\n") == 1 + 3 * 8

    def refused(*arguments: Any) -> str:
        return commands("oscillation", *arguments, "--overwrite", code=2, text=False)

    old, _, new = steps_of(gpt2)
    assert "two or more" in refused(old)
    assert "change their order" in refused(new, old)
    assert "--quantizers" in refused(old, new, "--quantizers", "off")
    assert "other layers" in refused(old, llama, "--quantizers", ROOT / "ds_configs" / "w4_channel.json")
    assert commands.found("oscillation") == [first, second, third]


@pytest.mark.distributed
def test_quantizers_of_a_json_are_put_in_their_place(commands: Commands, llama: Path) -> None:
    assert "--quantizers" in commands("quantization-error", llama, code=2)
    assert not commands.output.exists()
    commands("quantization-error", llama, "--quantizers", ROOT / "ds_configs" / "w4_channel.json")
    (found,) = commands.found("quantization_error")
    assert {row["bits"] for row in found.rows} == {4}
    assert found.settings["quantizers"] == "w4_channel"
    # Of gradients where there is a backward.
    config = commands.output.parent / "gradient.json"
    config.write_text(json.dumps({"ds_quant": {"linear": {"gradient": {"format": "nvfp4", "granularity": "block"}}}}))
    assert "without meaning" not in commands("gradient-error", llama, "--quantizers", config)
    (found,) = commands.found("gradient_error")
    assert {row["quantized"] for row in found.rows} == {"G nvfp4 block for dW+dX (simulated)"}
    assert "no linear.activation" in commands(
        "quantization-error", llama, "--quantizers", config, "--overwrite", code=2
    )


@pytest.mark.distributed
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    commands: Commands, gpt2: Path, llama: Path, tmp_path: Path
) -> None:
    assert "2 to 32" in commands("outliers", llama, "--context_length", "64", code=2)
    assert "1 or more" in commands("outliers", llama, "--batches", "0", code=2)
    assert "two or more" in commands("outliers", llama, "--persistence", code=2)
    assert "positive number" in commands("outliers", llama, "--num_std", "0", code=2)
    assert "no such file" in commands("outliers", llama, "--quantizers", tmp_path / "no.json", code=2).lower()
    assert "no such folder" in commands("outliers", tmp_path / "no", code=2)
    assert "odd" in commands("landscape", llama, "--points", "4", code=2)
    assert "float32" in commands("sharpness", llama, "--dtype", "bfloat16", code=2)
    assert "positive" in commands("sharpness", llama, "--rho", "-1", code=2)
    assert "above 1" in commands("gradient-norms", gpt2, "--factor", "1", code=2)
    few = tmp_path / "few.txt"
    few.write_text("def f")
    assert "0 sequences of 32" in commands("outliers", llama, "--text_file", few, code=2, text=False)
    assert "no such file" in commands("outliers", llama, "--text_file", tmp_path / "no.txt", code=2, text=False)
    cut, other, bare = (tmp_path / name for name in ("cut", "other", "bare"))
    shutil.copytree(llama, cut)
    (cut / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-100])
    assert "cut short" in commands("outliers", cut, code=2)
    shutil.copytree(llama, other)
    shutil.copy(gpt2 / "model" / "model.safetensors", other)
    assert "allowed" in commands("outliers", other, code=2)
    shutil.copytree(llama, bare)
    for file in bare.glob("token*"):
        file.unlink()
    assert "without a tokenizer" in commands("outliers", bare, code=2)
    assert not commands.output.exists()


@pytest.mark.distributed
def test_files_of_an_earlier_measurement_are_not_replaced_unasked(commands: Commands, llama: Path) -> None:
    commands("outliers", llama, "--no_pictures")
    before = (commands.output / "outliers.json").read_bytes()
    assert "--overwrite" in commands("outliers", llama, code=2)
    assert (commands.output / "outliers.json").read_bytes() == before
    file = commands.output / "file"
    file.write_text("")
    commands.output = file
    assert "a folder" in commands("outliers", llama, code=2)
