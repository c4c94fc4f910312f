"""Weights, scales and logits of an export are those of training, in each format that is served."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_exports import IDS, MODELS, W8A8, relative, saved, served, server_activation, trained, weights_are_trainings
from torch import nn

from ds_quant.config import ConfigError
from ds_quant.export import export, stored_weight
from ds_quant.linear import QuantLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_training_bit_for_bit(name, dtype, tmp_path):
    source = saved(tmp_path / "model", W8A8, name, dtype=dtype)
    report = export(source, tmp_path / "out")
    reference, model = trained(source, W8A8), served(tmp_path / "out")
    linears = [n for n, m in reference.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert report.modules == linears
    assert weights_are_trainings(model, reference) == len(linears)
    assert report.ignored == ["lm_head"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "ds_quant" not in config
    assert config["quantization_config"]["format"] == "int-quantized"
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for key, t in stored.items() if key.endswith("weight_scale")} == {torch.float32}
    assert {stored[f"{n}.weight"].dtype for n in linears} == {torch.int8}
    assert all(t.dtype == dtype for key, t in stored.items() if key.rpartition(".")[0] not in linears)


@pytest.mark.parametrize(
    "weight",
    [
        {"bits": 8},
        {"bits": 4},
        {"bits": 8, "granularity": "tensor"},
        {"bits": 4, "granularity": "block", "block_size": 16},
    ],
    ids=["w8", "w4", "w8-tensor", "w4-block"],
)
def test_weights_alone_give_the_logits_of_training(weight, tmp_path):
    sizes = {"intermediate_size": 112} if weight.get("granularity") == "block" else {}
    source = saved(tmp_path / "model", {"weight": weight}, **sizes)
    report = export(source, tmp_path / "out")
    assert report.format == "pack-quantized"
    reference, model = trained(source, {"weight": weight}), served(tmp_path / "out")
    assert weights_are_trainings(model, reference) == 14
    assert relative(model(IDS).logits, reference(IDS).logits) < 1e-5
    assert relative(trained(source)(IDS).logits, reference(IDS).logits) > 1e-3  # the quantizers do something


IN_BLOCKS = {"intermediate_size": 96}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("linear", "format", "bits"),
    [
        ({"weight": {"format": "fp8_e4m3"}}, "float-quantized", 8),
        ({"weight": {"format": "fp8_e4m3", "granularity": "tensor"}}, "float-quantized", 8),
        ({"weight": {"format": "mxfp8"}}, "mxfp8-quantized", 8),
        ({"weight": {"format": "mxfp8", "scale_rule": "up"}}, "mxfp8-quantized", 8),
        ({"weight": {"format": "mxfp6"}}, "mxfp6-pack-quantized", 6),
        ({"weight": {"format": "mxfp4"}}, "mxfp4-pack-quantized", 4),
        ({"weight": {"format": "nvfp4"}}, "nvfp4-pack-quantized", 4),
        ({"weight": {"format": "nvfp4", "block_rows": 16}}, "nvfp4-pack-quantized", 4),
        ({"weight": {"format": "nvfp4", "scale_rule": "four_six"}}, "nvfp4-pack-quantized", 4),
    ],
    ids=["fp8", "fp8-tensor", "mxfp8", "mxfp8-up", "mxfp6", "mxfp4", "nvfp4", "nvfp4-tiles", "nvfp4-four-six"],
)
def test_formats_of_floating_point(linear, format, bits, dtype, tmp_path):
    source = saved(tmp_path / "model", linear, dtype=dtype, **IN_BLOCKS)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][3] = 0
    stored["model.layers.0.mlp.up_proj.weight"][:, :32] = 0
    stored["model.layers.1.self_attn.q_proj.weight"].zero_()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    report = export(source, tmp_path / "out")
    assert report.format == format
    assert report.elements * bits // 8 <= report.stored_bytes < report.elements * (bits + 1.5) / 8
    is_fp8 = format == "float-quantized"
    words = f"dtype=torch.{'float32' if is_fp8 else 'bfloat16'}"
    assert sum(words in note for note in report.notes) == (dtype is (torch.bfloat16 if is_fp8 else torch.float32))
    reference = trained(source, linear)
    # In blocks compressed-tensors decodes to bf16, whatever the model is loaded in.
    model = served(tmp_path / "out", dtype=torch.float32 if is_fp8 else torch.bfloat16)
    assert weights_are_trainings(model, reference) == 14
    if is_fp8:
        assert relative(model(IDS).logits, reference(IDS).logits) < 1e-5
        assert relative(trained(source)(IDS).logits, reference(IDS).logits) > 1e-3  # the quantizers do something


def test_a_scale_that_no_reciprocal_gives_is_refused(tmp_path, monkeypatch):
    linear = {"weight": {"format": "nvfp4"}}
    source = saved(tmp_path / "model", linear, **IN_BLOCKS)
    monkeypatch.setattr(stored_weight, "_two_levels", lambda scale, _: [(scale.to(torch.float8_e4m3fn), scale[:1, 0])])
    with pytest.raises(ConfigError, match=r"weight: got .other values after decoding.*--format bf16"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_activation_scale_is_the_only_difference(name, tmp_path):
    source = saved(tmp_path / "model", W8A8, name)
    export(source, tmp_path / "out")
    model, reference = served(tmp_path / "out"), trained(source, W8A8)
    logits, ours = model(IDS).logits, reference(IDS).logits
    inputs = {}
    for n, module in model.named_modules():
        if isinstance(reference.get_submodule(n), QuantLinear):
            module.register_forward_hook(lambda m, a, y, n=n: inputs.update({n: (a[0], y)}))
    model(IDS)
    for n, (x, y) in inputs.items():
        # Each rounding errs by half a scale at most: (absmax/127 + absmax/127.5) / 2 for each input feature.
        linear = reference.get_submodule(n)
        absmax = x.abs().amax(-1, keepdim=True)
        weight = model.get_submodule(n).weight
        bound = absmax * (0.5 / 127 + 0.5 / 127.5) * weight.abs().sum(1)
        assert ((y - linear(x)).abs() <= bound * (1 + 1e-5)).all(), n
    # Our own model with the server's scale for activations gives the server's logits.
    for n in inputs:
        weight = model.get_submodule(n).weight.data
        linear = reference.get_submodule(n)
        linear.forward = lambda x, w=weight, b=linear.bias: F.linear(server_activation(x), w, b)
    assert relative(reference(IDS).logits, logits) < 1e-5
    assert 1e-4 < relative(logits, ours) < 0.1


FULL = {"weight": {"bits": 8}, "activation": {"bits": 8, "range": "full"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_activations_in_the_full_range_give_the_logits_of_training(name, dtype, tmp_path):
    """With the quantizer that compressed-tensors has, nothing is left that differs; OPT has a defect of its own."""
    source = saved(tmp_path / "model", FULL, name, dtype=dtype)
    export(source, tmp_path / "out")
    model, reference = served(tmp_path / "out"), trained(source, FULL)
    assert weights_are_trainings(model, reference) == 14
    for ids in (IDS, torch.randint(0, 96, (3, 50)), torch.randint(0, 96, (1, 1))):
        with torch.no_grad():
            logits, ours, narrow = model(ids).logits, reference(ids).logits, trained(source, W8A8)(ids).logits
        assert relative(logits, ours) < 1e-5
        assert relative(logits, narrow) > 1e-4
    prompt = IDS[:1, :5]
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **how), reference.generate(prompt, **how))


FP8 = {"weight": {"format": "fp8_e4m3"}, "activation": {"format": "fp8_e4m3"}}


@pytest.mark.parametrize(
    ("linear", "is_equal", "step"),
    [(FULL, True, 1 / 127), ({**FULL, "backend": "int8"}, False, 1 / 127), (FP8, False, 1 / 16)],
    ids=["simulated", "int8", "fp8"],
)
def test_each_layer_is_the_servers(linear, is_equal, step, tmp_path):
    """Given the same input: integers in the full range by `simulated` to the bit, and rounding errors apart where
    products are of codes. `step`: what an activation's rounding adds to it at most, relative to the largest."""
    source = saved(tmp_path / "model", linear, "qwen2")
    export(source, tmp_path / "out")
    model, reference = served(tmp_path / "out"), trained(source, linear)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(reference.get_submodule(name), QuantLinear):
            module.register_forward_hook(lambda m, a, y, name=name: inputs.update({name: (m, a[0], y)}))
    model(IDS)
    assert len(inputs) == 14
    for name, (module, x, y) in inputs.items():
        ours = reference.get_submodule(name)(x)
        if is_equal:
            assert torch.equal(ours, y), name
        # Each way rounds K products and their sum, two scales and the bias, to 2^-24 of their magnitudes.
        magnitude = F.linear(x.abs(), module.weight.abs()) * (1 + step) + (
            0 if module.bias is None else module.bias.abs()
        )
        assert ((ours - y).abs() <= 2 * (x.shape[-1] + 4) * 2.0**-24 * magnitude).all(), name


def test_each_server_is_named_by_the_range_that_it_has(tmp_path):
    for number, (linear, words) in enumerate(
        (
            (FULL, "absmax / 127.5 a token in training and in transformers"),
            (W8A8, "127.5 in transformers, whose logits"),
        )
    ):
        source = saved(tmp_path / f"model{number}", linear)
        assert sum(words in line for line in export(source, tmp_path / f"out{number}").lines()) == 1
    source = saved(tmp_path / "weights", {"weight": {"bits": 8}})
    assert not any("activations" in line for line in export(source, tmp_path / "out").lines())
