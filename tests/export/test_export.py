"""ds_quant_export: what was trained is what is served, bit for bit, and what cannot be served is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ds_quant.cli.export import main
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.export import export, stored_weight
from ds_quant.export.serving_format import serving_format
from ds_quant.linear import QuantLinear
from ds_quant.linear.convert import convert
from ds_quant.numerics.format import named_format, quantize_to
from ds_quant.numerics.integer import dequantize, quantize

W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GATED = {**SIZES, "intermediate_size": 104, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GATED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GATED, "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, GATED),
    "opt": (OPTForCausalLM, OPTConfig, {**SIZES, "ffn_dim": 104, "word_embed_proj_dim": 64, "dropout": 0.0}),
}
IDS = torch.arange(24).reshape(2, 12)


def build(name="llama", dtype=torch.float32, **overrides):
    """A random model whose weights are far from uniform, so that every row has a scale of its own."""
    torch.manual_seed(0)
    cls, config, sizes = MODELS[name]
    model = cls(config(**{**sizes, **overrides}))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.empty(module.out_features, 1).log_normal_(0, 1)
    return model.to(dtype).eval()


def saved(folder, linear=None, name="llama", shard="1GB", **build_with):
    """A checkpoint as our training leaves it: written by save_pretrained, with the section."""
    model = build(name, **build_with)
    if linear is not None:
        convert(model, linear)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def trained(folder, linear=None):
    """Our own model of a checkpoint in fp32, with its quantizers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if linear is not None:
        convert(model, linear)
    return model


def served(folder, **how):
    """What transformers and compressed-tensors make of an export, after the forward that decodes the weights."""
    how.setdefault("dtype", torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    model.eval()(IDS)
    return model


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def weights_are_trainings(model, reference):
    """Every quantized weight of `model` against the fake-quantized one of `reference`; returns how many."""
    count = 0
    for name, module in reference.named_modules():
        if isinstance(module, QuantLinear):
            w = module.quant_config.weight
            granularity = {"channel": "row", "tensor": "tensor", "block": "block"}[w.granularity]
            if w.format:
                rule = w.scale_rule or "floor"
                fmt = named_format(w.format, granularity, block_rows=w.block_rows, scale_rule=rule)
                q = quantize_to(module.weight, fmt)
            else:
                q = quantize(module.weight, w.bits, granularity=granularity, block_size=w.block_size)
            found = model.get_submodule(name).weight
            # As it is, or where compressed-tensors decodes in bf16, rounded to that.
            expected = dequantize(q, torch.bfloat16 if w.format == "nvfp4" else torch.float32)
            assert torch.equal(found, expected.to(found.dtype)), name
            count += 1
    return count


# ---- what is served


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


def server_activation(x):
    """The dynamic scale of compressed-tensors: absmax / 127.5 of each row, codes -128 to 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round() * scale


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


@pytest.mark.parametrize("format", ["compressed-tensors", "bf16"])
def test_what_is_served_generates_with_its_cache(format, tmp_path):
    """Hugging Face's Trainer writes `"use_cache": false` into what it saves."""
    source = saved(tmp_path / "model", W8A8, use_cache=False)
    assert json.loads((source / "config.json").read_text())["use_cache"] is False
    export(source, tmp_path / "out", format=format)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache is True


def test_inputs_without_a_batch_dimension_share_a_scale_in_compressed_tensors(tmp_path):
    """What docs/export.md says of OPT, whose fc1 is called with [tokens, features]; it fails when that is fixed."""
    source = saved(tmp_path / "model", W8A8, "opt")
    export(source, tmp_path / "out")
    fc1 = served(tmp_path / "out").model.decoder.layers[0].fc1
    seen = []
    fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dim()))
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7).unsqueeze(1)
    with torch.no_grad():
        by_token = F.linear(server_activation(x), fc1.weight, fc1.bias)
        assert relative(fc1(x.unsqueeze(0))[0], by_token) < 1e-5
        assert relative(fc1(x), by_token) > 1e-3
    model = served(tmp_path / "out")
    model.model.decoder.layers[0].fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dim()))
    model(IDS)
    assert seen == [3, 2, 2]


def test_patterns_choose_the_layers(tmp_path):
    linear = {**W8A8, "include": ["*.mlp.*"], "exclude": ["*.1.mlp.down_proj"]}
    source = saved(tmp_path / "model", linear)
    report = export(source, tmp_path / "out")
    assert len(report.modules) == 5
    assert {"model.layers.1.mlp.down_proj", "lm_head", "model.layers.0.self_attn.q_proj"} <= set(report.ignored)
    model, reference = served(tmp_path / "out"), trained(source, linear)
    assert weights_are_trainings(model, reference) == 5
    down = "model.layers.1.mlp.down_proj"
    assert torch.equal(model.get_submodule(down).weight, reference.get_submodule(down).weight)


@pytest.mark.parametrize("exclude", [None, []], ids=["head-left-out", "head-quantized"])
def test_a_tied_output_embedding(exclude, tmp_path):
    linear = {"weight": {"bits": 8}, "exclude": exclude}
    source = saved(tmp_path / "model", linear, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    export(source, tmp_path / "out")
    model, reference = served(tmp_path / "out"), trained(source, linear)
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (exclude is None)
    assert weights_are_trainings(model, reference) == (14 if exclude is None else 15)
    assert relative(model(IDS).logits, reference(IDS).logits) < 1e-5


def test_a_tie_saved_under_the_name_of_the_output_embedding(tmp_path):
    linear = {"weight": {"bits": 8}, "exclude": []}
    source = saved(tmp_path / "model", linear, tie_word_embeddings=True)
    reference = trained(source, linear)
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "out")
    model = served(tmp_path / "out")
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert weights_are_trainings(model, reference) == 15


def test_shards_stay_shards(tmp_path):
    source = saved(tmp_path / "model", W8A8, shard="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    whole = saved(tmp_path / "whole", W8A8)
    export(source, tmp_path / "out")
    export(whole, tmp_path / "out-whole")
    assert {p.name for p in source.glob("model*")} == {p.name for p in (tmp_path / "out").glob("model*")}
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    expected = load_file(tmp_path / "out-whole" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert weights_are_trainings(served(tmp_path / "out"), trained(source, W8A8)) == 14


def test_the_linears_take_half_the_bytes_of_bf16(tmp_path):
    for linear, low, high in ((W8A8, 0.5, 0.54), ({"weight": {"bits": 4}}, 0.25, 0.30)):
        shape = {"hidden_size": 256, "intermediate_size": 512, "dtype": torch.bfloat16}
        source = saved(tmp_path / "model", linear, **shape)
        report = export(source, tmp_path / "out")
        sizes = {}
        for folder in (source, tmp_path / "out"):
            stored = load_file(folder / "model.safetensors")
            sizes[folder] = sum(t.nbytes for k, t in stored.items() if k.rpartition(".")[0] in report.modules)
        share = sizes[tmp_path / "out"] / sizes[source]
        assert low < share < high
        assert report.stored_bytes == sizes[tmp_path / "out"]
        assert f"{share:.1%}" in report.lines()[0]
        shutil.rmtree(tmp_path / "out")


def test_generation_and_the_files_beside_the_weights(tmp_path):
    from tokenizers import Tokenizer, models

    source = saved(tmp_path / "model", W8A8)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(source)
    (source / "optimizer.pt").write_bytes(b"of training")
    (source / "global_step4").mkdir()
    report = export(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in source.iterdir()} - {"optimizer.pt", "global_step4"}
    assert not any("tokenizer" in note for note in report.notes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = served(tmp_path / "out", dtype="auto")
    prompt = torch.tensor([tokenizer.convert_tokens_to_ids(["w3", "w4", "w5"])])
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer.shape == (1, 11)


def test_plain_bf16_has_no_quantizers(tmp_path):
    source = saved(tmp_path / "model", W8A8, shard="100KB")
    export(source, tmp_path / "out", format="bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "ds_quant")
    assert not hasattr(model.config, "quantization_config")
    for name, parameter in trained(source).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16())


def test_plain_bf16_of_what_no_server_quantizes(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32))
    convert(model, {"activation": {"bits": 4, "granularity": "tensor"}})
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", format="bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


def test_what_only_training_uses_is_ignored_with_a_word(tmp_path):
    linear = {**W8A8, "gradient": {"bits": 8, "rounding": "stochastic"}, "backend": "int8"}
    source = saved(tmp_path / "model", linear)
    report = export(source, tmp_path / "out")
    assert "of training only, and left behind: gradient, backend int8" in report.lines()
    assert weights_are_trainings(served(tmp_path / "out"), trained(source, W8A8)) == 14


def test_rows_of_zeros(tmp_path):
    source = saved(tmp_path / "model", W8A8)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][3] = 0
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "out")
    model = served(tmp_path / "out")
    assert weights_are_trainings(model, trained(source, W8A8)) == 14
    assert model(IDS).logits.isfinite().all()


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
        assert running.wait(timeout=60) == 128 + signal.SIGTERM
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
        "sys.exit(main(sys.argv[1:]))"
    )
    for format, code in (("compressed-tensors", 2), ("bf16", 0)):
        command = [sys.executable, "-c", program, source, tmp_path / "out", "--format", format]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
        assert done.returncode == code, done.stderr
        if code:
            assert "fix: pip install 'ds_quant[export]'" in done.stderr
