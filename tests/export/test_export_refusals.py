"""Where an export takes the section from, and settings and models that no server follows."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_exports import GATED, W8A8, saved, served, trained, weights_are_trainings
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from ds_quant.config import ConfigError, LinearConfig
from ds_quant.export import export
from ds_quant.export.serving_format import serving_format
from ds_quant.linear.convert import convert

# ---- where the section comes from


def deepspeed_json(path, linear, **section):
    path.write_text(json.dumps({"train_batch_size": 8, "ds_quant": {"linear": linear, **section}}))
    return path


def test_the_section_from_a_deepspeed_json(tmp_path):
    source = saved(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"ds_quant: got null.*fix: name the DeepSpeed JSON.*--config"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", config=deepspeed_json(tmp_path / "ds.json", W8A8))
    assert weights_are_trainings(served(tmp_path / "out"), trained(source, W8A8)) == 14


def test_two_sections_have_to_agree(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    spelt_out = {"weight": {"bits": 8, "granularity": "channel"}, "activation": {"bits": 8, "granularity": "token"}}
    same = deepspeed_json(tmp_path / "same.json", spelt_out, optimizer={"exp_avg": {"bits": 8}})
    export(source, tmp_path / "out", config=same)
    other = deepspeed_json(tmp_path / "other.json", {"weight": {"bits": 8}})
    for format in ("compressed-tensors", "bf16"):
        with pytest.raises(ConfigError, match="fix: leave --config out") as error:
            export(source, tmp_path / "out2", config=other, format=format)
        assert 'other.json: got {"activation": null} in ds_quant.linear' in str(error.value)
    assert not (tmp_path / "out2").exists()


def test_a_section_that_is_switched_off_or_broken(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    config = json.loads((source / "config.json").read_text())
    for section, message in (
        ({"linear": W8A8, "enabled": False}, "a section with `linear`"),
        ({"linear": {"weight": {"bits": 9}}}, r"config.json: ds_quant: ds_quant.linear.weight.bits: got 9"),
    ):
        (source / "config.json").write_text(json.dumps({**config, "ds_quant": section}))
        with pytest.raises(ConfigError, match=message):
            export(source, tmp_path / "out")


# ---- what cannot be expressed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r"linear.weight: got null; allowed: a quantized weight"),
        ({"weight": {"bits": 4}}, r"weight.bits: got 4; allowed: 8 beside a quantized activation"),
        ({"weight": {"bits": 6}, "activation": None}, r"weight.bits: got 6; allowed: 4 or 8"),
        ({"weight": {"bits": 8, "symmetric": False}}, r"weight.symmetric: got false"),
        ({"weight": {"bits": 8, "rounding": "stochastic"}}, r'weight.rounding: got "stochastic"'),
        ({"weight": {"bits": 8, "granularity": "block"}}, r'weight.granularity: got "block"'),
        ({"activation": {"bits": 8, "split_mean": True}}, r"activation.split_mean: got true"),
        ({"activation": {"bits": 4, "outlier_share": 0.5}}, r"activation.outlier_share: got 0.5; allowed: absent"),
        ({"forward_full_precision_from": 9}, r"forward_full_precision_from: got 9; allowed: absent"),
        ({"rotation": {}}, r'rotation.used_for: got "output"; allowed: a forward without'),
        ({"activation": {"bits": 4}}, r"activation.bits: got 4; allowed: 8"),
        ({"activation": {"bits": 8, "granularity": "tensor"}}, r'activation.granularity: got "tensor"'),
        ({"activation": {"bits": 8, "granularity": "channel"}}, r'activation.granularity: got "channel"'),
        ({"activation": {"bits": 8, "granularity": "block"}}, r'activation.granularity: got "block"'),
        ({"activation": {"bits": 8, "symmetric": False}}, r"activation.symmetric: got false"),
        ({"activation": {"bits": 8, "rounding": "stochastic"}}, r'activation.rounding: got "stochastic"'),
        ({"activation": {"format": "fp8_e4m3"}}, r'activation.format: got "fp8_e4m3"; allowed: bits, beside'),
        ({"weight": {"format": "fp8_e4m3"}}, r"activation: got 8; allowed: format \"fp8_e4m3\", or none"),
        ({"weight": {"format": "nvfp4"}}, r"activation: got 8; allowed: none beside a weight in nvfp4"),
        ({"weight": {"format": "fp8_e5m2"}, "activation": None}, r'weight.format: got "fp8_e5m2"; allowed: fp8_e4m3, '),
        ({"weight": {"format": "nvint4"}, "activation": None}, r'weight.format: got "nvint4"; allowed: fp8_e4m3, '),
        (
            {"weight": {"format": "mxfp4", "rounding": "stochastic"}, "activation": None},
            r'weight.rounding: got "stochastic"; allowed: "nearest"',
        ),
        (
            {"weight": {"format": "fp8_e4m3", "granularity": "block"}, "activation": None},
            r'weight.granularity: got "block"; allowed: "channel" or "tensor"',
        ),
        (
            {
                "weight": {"format": "fp8_e4m3"},
                "activation": {"format": "fp8_e4m3", "granularity": "tensor"},
            },
            r'activation.granularity: got "tensor"; allowed: "token"',
        ),
    ],
)
def test_settings_that_no_server_follows(change, message):
    config = LinearConfig.parse({key: value for key, value in {**W8A8, **change}.items() if value is not None})
    with pytest.raises(ConfigError, match=f"{message}.*; fix: .*--format bf16"):
        serving_format(config)


def test_all_such_settings_are_said_at_once():
    config = LinearConfig.parse({"weight": {"bits": 5, "symmetric": False}, "activation": {"bits": 3}})
    with pytest.raises(ConfigError) as error:
        serving_format(config)
    assert len(str(error.value).splitlines()) == 3


def test_models_without_nn_linear(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32))
    convert(model, W8A8)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"transformer.h.0.attn.c_attn: got .*Conv1D.*allowed: nn.Linear"):
        export(tmp_path / "model", tmp_path / "out")
    experts = MixtralForCausalLM(MixtralConfig(**{**GATED, "num_hidden_layers": 1}, num_local_experts=2))
    convert(experts, {**W8A8, "exclude": ["*.experts", "lm_head"]})
    experts.save_pretrained(tmp_path / "experts")
    with pytest.raises(
        ConfigError, match=r"mlp.experts.gate_up_proj: got \"experts in one tensor .*fix: --format bf16"
    ):
        export(tmp_path / "experts", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_have_no_codes(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.up_proj.weight: got .*NaN"):
        export(source, tmp_path / "out")
    blocks = saved(tmp_path / "blocks", {"weight": {"bits": 4, "granularity": "block", "block_size": 16}})
    with pytest.raises(ConfigError, match=r"down_proj.weight: got \"rows of 104 in blocks of 16\""):
        export(blocks, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "model"]


def test_a_package_that_decodes_something_else(tmp_path, monkeypatch):
    """As a later version of compressed-tensors might: then nothing is written."""
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor as Compressor

    right = Compressor.decompress
    monkeypatch.setattr(
        Compressor, "decompress", lambda *stored: {"weight": right(*stored)["weight"].bfloat16().float()}
    )
    source = saved(tmp_path / "model", W8A8)
    with pytest.raises(
        ConfigError, match=r"down_proj.weight: got .other values after decoding with compressed-tensors"
    ):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
