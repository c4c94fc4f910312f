"""A checkpoint as a model: which folder stands for which model, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
import types

import pytest
import torch
from conftest import ROOT
from evaluate_files import W8A8, section, write_json, write_model
from helpers.launching import run_ranks
from helpers.samples import write_corpus
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import ds_quant
from ds_quant.cli.shared import loaded_model, opened_model
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.export import export


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A W8A8 run."""
    return write_model(tmp_path_factory.mktemp("models") / "run", W8A8)


@pytest.fixture
def model(trained, tmp_path):
    """A copy of its model, to be broken."""
    return shutil.copytree(trained / "model", tmp_path / "model")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 19)[None]).logits


def test_trained_off_and_other(trained, tmp_path):
    other = write_json(tmp_path / "w4.json", section({"weight": {"bits": 4}}))
    plain = AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    expected = {"off": logits(plain)}
    ds_quant.convert(plain, W8A8)
    expected["trained"] = logits(plain)
    for quantizers in ("trained", "off", other):
        loaded = loaded_model.load_model(trained, quantizers=quantizers)
        assert not loaded.model.training
        assert loaded.trained == LinearConfig.parse(W8A8)
        if quantizers == other:
            assert loaded.linear == LinearConfig.parse({"weight": {"bits": 4}})
            assert not torch.equal(logits(loaded.model), expected["trained"])
        else:
            assert (loaded.linear is None) == (quantizers == "off")
            assert torch.equal(logits(loaded.model), expected[quantizers])


def test_the_forward_of_the_step_at_which_weights_were_saved(model, tmp_path):
    """Quantized before linear.forward_full_precision_from, plain from it on, refused where no file knows the step."""
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", config | {"ds_quant": {"linear": {**W8A8, "forward_full_precision_from": 30}}})
    for step in (29, 30):
        write_json(tmp_path / "summary.json", {"steps": step})
        loaded = loaded_model.load_model(model)
        assert (loaded.linear, loaded.step) == (LinearConfig.parse(W8A8) if step < 30 else None, step)
        plain = AutoModelForCausalLM.from_pretrained(model).eval()
        if step < 30:
            ds_quant.convert(plain, W8A8)
        assert torch.equal(logits(loaded.model), logits(plain))
        (note,) = loaded.notes
        assert f"saved at step {step}, " + ("before" if step < 30 else "after") in note
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"forward_full_precision_from: got .*no file that tells the step"):
        loaded_model.load_model(model)
    other = write_json(tmp_path / "w4.json", section({"weight": {"bits": 4}, "forward_full_precision_from": 1}))
    loaded = loaded_model.load_model(model, quantizers=other)
    assert loaded.linear == LinearConfig.parse({"weight": {"bits": 4}})
    assert "without meaning in an evaluation: linear.forward_full_precision_from" in loaded.notes[0]


def test_nothing_is_reset_in_an_evaluation(model, tmp_path):
    """Which has no steps: of the model's own quantizers, and of others."""
    reset = {"every": 30, "watched_steps": 9}
    config = json.loads((model / "config.json").read_text())
    trained = {**W8A8, "weight": {**W8A8["weight"], "oscillation_reset": reset}}
    write_json(model / "config.json", config | {"ds_quant": {"linear": trained}})
    assert loaded_model.load_model(model).linear == LinearConfig.parse(W8A8)
    other = write_json(tmp_path / "w4.json", section({"weight": {"bits": 4, "oscillation_reset": reset}}))
    loaded = loaded_model.load_model(model, quantizers=other)
    assert loaded.linear == LinearConfig.parse({"weight": {"bits": 4}})
    assert "without meaning in an evaluation: linear.weight.oscillation_reset" in loaded.notes[0]


@pytest.fixture(scope="module")
def zero_3(tmp_path_factory):
    """A W8A8 run of two ranks at ZeRO-3 that has gathered its weights for its checkpoints."""
    folder = tmp_path_factory.mktemp("zero-3")
    config = json.loads((ROOT / "ds_configs" / "w8a8.json").read_text())
    config["zero_optimization"] |= {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    command = (
        *(ROOT / "launchers/pretrain.py", "--deepspeed", write_json(folder / "zero-3.json", config)),
        *("--config_overrides", "num_hidden_layers=1,hidden_size=32,intermediate_size=64", "--vocab_size", 320),
        *("--context_length", 32, "--global_batch_size", 4, "--train_file", write_corpus(folder / "corpus.jsonl")),
        *("--validation_fraction", 0.2, "--max_eval_sequences", 4, "--output_dir", folder / "run"),
        *("--max_steps", 4, "--save_steps", 2, "--save_total_limit", 2, "--bf16", "true"),
    )
    run_ranks(*command, timeout=280)
    return folder / "run"


@pytest.mark.distributed
def test_a_run_stands_for_its_model_and_else_for_its_newest_whole_checkpoint(zero_3, tmp_path):
    run = shutil.copytree(zero_3, tmp_path / "run")
    final = loaded_model.load_model(run)
    assert (final.name, final.folder, final.step) == ("run", run / "model", 4)
    assert final.model.dtype == torch.bfloat16
    shutil.rmtree(run / "model")
    newest = loaded_model.load_model(run)
    assert (newest.name, newest.step) == ("run/checkpoint-4", 4)
    assert torch.equal(logits(final.model), logits(newest.model))
    (run / "checkpoint-4" / "model.safetensors").unlink()
    assert loaded_model.load_model(run).name == "run/checkpoint-2"
    (run / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(ds_quant.ConfigError, match="a broken checkpoint"):
        loaded_model.load_model(run)


@pytest.mark.distributed
def test_zero_3_without_gathered_weights_gives_those_of_the_forward(zero_3, tmp_path):
    alone = shutil.copytree(zero_3 / "checkpoint-4", tmp_path / "checkpoint-4")
    # As without "stage3_gather_16bit_weights_on_model_save".
    for name in ("model.safetensors", "manifest.json"):
        (alone / name).unlink()
    parts = loaded_model.load_model(alone)
    whole = loaded_model.load_model(zero_3 / "checkpoint-4")
    assert parts.linear == whole.linear is not None
    assert parts.model.dtype == torch.bfloat16
    assert not parts.model.training
    own, other = parts.model.state_dict(), whole.model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert torch.equal(logits(parts.model), logits(whole.model))
    cut = next(alone.glob("*/*rank_1*optim_states.pt"))
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(ds_quant.ConfigError, match="was cut short"):
        loaded_model.load_model(alone)


def test_an_export_is_run_as_the_server_runs_it(trained, tmp_path):
    export(trained / "model", tmp_path / "exported")
    loaded = loaded_model.load_model(tmp_path / "exported")
    assert loaded.linear is None
    server = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto").eval()
    assert torch.equal(logits(loaded.model), logits(server))
    # docs/export.md: the server's scale of activations is not that of the training.
    assert not torch.equal(logits(loaded.model), logits(loaded_model.load_model(trained).model))
    assert not torch.equal(logits(loaded.model), logits(loaded_model.load_model(trained, quantizers="off").model))
    with pytest.raises(ds_quant.ConfigError, match="its weights are codes already"):
        loaded_model.load_model(tmp_path / "exported", quantizers="off")


def test_dtype_is_as_saved_or_as_asked_for(tmp_path):
    run = write_model(tmp_path / "half", W8A8, step=1, dtype=torch.bfloat16)
    assert loaded_model.load_model(run).model.dtype == torch.bfloat16
    assert loaded_model.load_model(run, dtype=torch.float32).model.dtype == torch.float32


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text()) | changes
    write_json(model / "config.json", config)


def shorten(path, length=200):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda m: shutil.rmtree(m), "no such folder"),
        (lambda m: (m / "config.json").unlink(), "a folder without config.json"),
        (lambda m: shorten(m / "config.json"), 'config.json: got "broken JSON'),
        (lambda m: (m / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda m: shorten(m / "model.safetensors", 5000), "cut short"),
        (lambda m: edit_config(m, num_hidden_layers=3), "files with no model.layers.2"),
        (lambda m: edit_config(m, num_hidden_layers=1), "files with the surplus model.layers.1"),
        (lambda m: edit_config(m, intermediate_size=48), "files with another shape of model.layers.0.mlp"),
        (lambda m: edit_config(m, num_hidden_layers="two"), "refuses"),
        (lambda m: edit_config(m, architectures=["NoModel"]), "a causal language model"),
        (lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), "a model in gptq"),
        (lambda m: edit_config(m, ds_quant={"linear": {"weigth": {"bits": 8}}}), "weigth"),
        (lambda m: shorten(m / "tokenizer.json"), "a tokenizer that cannot be loaded"),
    ],
)
def test_a_broken_model_is_refused(model, broken, said):
    broken(model)
    with pytest.raises(ds_quant.ConfigError) as caught:
        loaded_model.load_model(model)
    assert said in str(caught.value)
    assert "fix" in str(caught.value)


def test_a_missing_shard_is_refused(trained, tmp_path):
    loaded_model.load_model(trained, quantizers="off").model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(
        logits(loaded_model.load_model(tmp_path / "m").model), logits(loaded_model.load_model(trained).model)
    )
    shards[-1].unlink()
    with pytest.raises(ds_quant.ConfigError, match="no such file"):
        loaded_model.load_model(tmp_path / "m")


def test_a_model_of_another_kind_is_refused(tmp_path):
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ds_quant.ConfigError, match="a causal language model"):
        loaded_model.load_model(tmp_path)


def test_a_model_that_does_not_fit_is_refused(trained, monkeypatch):
    need = sum(t.numel() * 4 for t in loaded_model.load_model(trained, quantizers="off").model.parameters())
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: types.SimpleNamespace(available=free))
        if fits:
            loaded_model.load_model(trained, device="cpu")
        else:
            with pytest.raises(ds_quant.ConfigError, match="a model that fits into memory"):
                loaded_model.load_model(trained, device="cpu")


def test_a_model_without_tokenizer_is_loaded_without(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert loaded_model.load_model(model).tokenizer is None


def test_what_a_folder_is_called():
    names = {"runs/a/model": "a", "runs/a/checkpoint-7": "a/checkpoint-7", "models/gpt2": "gpt2"}
    for folder, name in names.items():
        assert opened_model.short_name(loaded_model.Path(folder)) == name
