"""What of a model is exported, and how: ties, shards, bytes, plain bf16, generation."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_exports import IDS, W8A8, relative, saved, served, server_activation, trained, weights_are_trainings
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ds_quant.export import export
from ds_quant.linear.convert import convert


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
