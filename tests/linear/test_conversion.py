"""In-place conversion: which modules, what stays as it was, what is refused, and what the coverage says."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.linear.convert import check_still_converted, convert, coverage, remove_forward_counter, step_key_of
from ds_quant.linear.step_key import CountForwards

W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}
STOCHASTIC = {**W8A8, "gradient": {"bits": 8, "rounding": "stochastic"}}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def llama(**overrides):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **overrides}))


def gpt2(**overrides):
    torch.manual_seed(0)
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32, "bos_token_id": 0}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**config, **drop, **overrides}))


def tokens(rows=2, length=12):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_everything_but_the_output_embedding(make):
    model = make()
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    linears = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    assert convert(model, W8A8) == linears
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert type(model.lm_head) is nn.Linear
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_quantizers_change_the_loss_a_little():
    model = llama()
    plain = model(input_ids=tokens(), labels=tokens()).loss
    convert(model, W8A8)
    quantized = model(input_ids=tokens(), labels=tokens()).loss
    assert plain != quantized
    assert abs(plain - quantized) < 0.01


def test_a_tied_output_embedding_stays_tied():
    model = gpt2()
    names = convert(model, {**W8A8, "exclude": []})
    assert "lm_head" in names
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in gpt2().parameters())
    found = coverage(model)
    assert found.share == 1.0
    assert set(found.embeddings) == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_output_embedding_is_found_by_role_and_by_name():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()
            self.head = nn.ModuleDict({"lm_head": nn.Linear(4, 4)})

    names = convert(Wrapper(), W8A8)
    assert "inner.lm_head" not in names
    assert "head.lm_head" not in names
    assert "inner.model.layers.0.mlp.up_proj" in names


def test_include_exclude_and_filter():
    assert convert(llama(), {**W8A8, "include": ["*.mlp.*"], "exclude": ["*.up_proj"]}) == [
        f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "down_proj")
    ]
    model = llama()
    names = convert(model, W8A8, filter=lambda name, module: "layers.0" in name and module.in_features == 32)
    assert names
    assert all("layers.0" in name for name in names)
    assert "model.layers.0.mlp.down_proj" not in names


@pytest.mark.parametrize(
    ("patterns", "key", "hint"),
    [
        ({"exclude": ["lm_haed"]}, "exclude", "'lm_head'"),
        ({"exclude": ["*.mlp"]}, "exclude", "'model.layers.0.mlp.gate_proj'"),
        ({"include": ["mlp"]}, "include", "'model.layers.0.mlp.gate_proj'"),
        ({"exclude": ["*.embed_tokens"]}, "exclude", "fix"),
        ({"exclude": ["lm_head", "*.norm"]}, "exclude", "fix"),
    ],
)
def test_a_pattern_that_matches_nothing(patterns, key, hint):
    with pytest.raises(ConfigError, match=rf"ds_quant\.linear\.{key}: got the pattern") as caught:
        convert(llama(), {**W8A8, **patterns})
    assert hint in str(caught.value)


def test_models_that_cannot_be_converted():
    with pytest.raises(ConfigError, match="without any linear layer"):
        convert(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), W8A8)
    with pytest.raises(ConfigError, match="leave none of 15"):
        convert(llama(), {**W8A8, "exclude": ["*"]})
    model = llama()
    convert(model, W8A8)
    assert convert(model, W8A8) == convert(model, W8A8)
    with pytest.raises(ConfigError, match="converted before as W8 channel"):
        convert(model, {"weight": {"bits": 4}})


def test_register_module():
    class ScaledLinear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class QuantScaledLinear(ds_quant.QuantizedModule, ScaledLinear):
        def forward(self, x):
            return 2 * self.quantized_forward(x)

    with pytest.raises(ConfigError, match="derives from QuantizedModule"):
        ds_quant.register_module(ScaledLinear, ds_quant.QuantLinear)
    ds_quant.register_module(ScaledLinear, QuantScaledLinear)
    model = nn.Sequential(ScaledLinear(5, 5))
    x = torch.randn(4, 5)
    want = model(x)
    assert convert(model, W8A8) == ["0"]
    got = model(x)
    assert not torch.equal(want, got)
    # 8 bits a side: half a step of each operand, |x| and |w| at most their absmax, over 5 terms, times 2.
    bound = 2 * 5 * 2 * 0.5 / 127 * 1.01 * x.abs().max() * model[0].weight.abs().max()
    assert (want - got).abs().max() <= bound


def test_a_convolution_is_no_fused_expert():
    model = nn.Sequential(nn.Conv1d(3, 3, 2), nn.Linear(4, 4))
    assert convert(model, W8A8) == ["1"]
    assert coverage(model).left_out == {"0.weight": (3, 3, 2)}


def test_coverage_counts():
    model = llama()
    convert(model, {**W8A8, "exclude": ["*.layers.1.*", "lm_head"]})
    found = coverage(model)
    block = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48
    assert found.covered_numel == block
    assert found.matmul_numel == 2 * block + 96 * 32
    assert found.share == block / (2 * block + 96 * 32)
    assert list(found.embeddings) == ["model.embed_tokens.weight"]
    assert set(found.left_out) == {"lm_head.weight"} | {
        f"{name}.weight" for name, m in model.named_modules() if "layers.1" in name and isinstance(m, nn.Linear)
    }
    assert set(found.converted.values()) == {"W8 channel, A8 token (simulated)"}
    assert any("left in full precision: lm_head.weight [96, 32]" in line for line in found.lines())


def test_a_head_that_was_resized_is_converted_again():
    section = {"weight": {"bits": 8, "rounding": "stochastic"}, "exclude": []}
    model = llama()
    names = convert(model, section)
    model.resize_token_embeddings(100, mean_resizing=False)
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ConfigError, match=r"1 quantized modules replaced.*'lm_head'"):
        check_still_converted(model, names)
    assert convert(model, section) == names
    assert type(model.lm_head) is ds_quant.QuantLinear
    assert model.lm_head.out_features == 100
    # As if it had been converted with this size: the same random bits, from the same key.
    fresh = llama(vocab_size=100)
    fresh.load_state_dict(model.state_dict())
    convert(fresh, section)
    step_key_of(fresh).reseed(step_key_of(model).seed, 0)
    assert torch.equal(fresh.eval()(tokens()).logits, model.eval()(tokens()).logits)
    assert sum(isinstance(hook, CountForwards) for hook in model._forward_pre_hooks.values()) == 1


def test_what_a_filter_left_out_stays_so():
    model = llama()
    names = convert(model, W8A8, filter=lambda name, module: "layers.0" in name)
    assert convert(model, W8A8) == names
    with pytest.raises(ConfigError, match="a filter that leaves none of 15"):
        convert(llama(), W8A8, filter=lambda name, module: False)


def test_replaced_modules_are_noticed():
    model = llama()
    names = convert(model, W8A8)
    check_still_converted(model, names)
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 48)
    with pytest.raises(ConfigError, match=r"1 quantized modules replaced.*model.layers.1.mlp.up_proj"):
        check_still_converted(model, names)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_save_pretrained_round_trip(make, tmp_path):
    plain, model = make(), make()
    plain.save_pretrained(tmp_path / "plain")
    section = {**STOCHASTIC, "exclude": []}
    convert(model, section)
    model.save_pretrained(tmp_path / "quantized")
    assert json.loads((tmp_path / "quantized/config.json").read_text())["ds_quant"] == {"linear": section}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert again.config.ds_quant["linear"]["weight"] == {"bits": 8}
    for (name, a), (other, b) in zip(again.state_dict().items(), reference.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    # Plain from_pretrained evaluates without quantizers, and a converted one with them.
    x = tokens()
    assert torch.equal(again(x).logits, reference(x).logits)
    convert(again, section)
    assert torch.equal(again(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradient_checkpointing_changes_nothing(make, reentrant):
    results = []
    for recompute in (False, True):
        model = make().train()
        convert(model, {**STOCHASTIC, "activation": {"bits": 8, "rounding": "stochastic"}})
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_model_without_an_engine_counts_its_training_forwards():
    model = llama()
    convert(model, STOCHASTIC)
    key = step_key_of(model)
    assert key is not None
    model.train()(tokens())
    model(tokens())
    assert key.step == 2
    model.eval()(tokens())
    with torch.no_grad():
        model.train()(tokens())
    assert key.step == 2
    remove_forward_counter(model)
    model(tokens())
    assert key.step == 2
    nearest = llama()
    convert(nearest, W8A8)
    nearest.train()(tokens())
    assert step_key_of(nearest).step == 0


def test_layers_draw_different_bits():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2)))
    model[1].load_state_dict(model[0].state_dict())
    convert(model, {"weight": {"bits": 4, "rounding": "stochastic"}})
    x = torch.eye(8)
    assert not torch.equal(model[0](x), model[1](x))


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    convert(model, {**W8A8, "exclude": ["2"]})
    found = coverage(model)
    assert (found.covered_numel, found.matmul_numel) == (16, 24)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize(
    ("blocks", "ends", "left"),
    [
        (4, {"last": 0.15}, (3,)),
        (4, {"last": 0.25}, (3,)),
        (4, {"first": 0.3, "last": 0.1}, (0, 1, 3)),
        (10, {"last": 0.3}, (7, 8, 9)),  # 0.3 * 10 is a little more than 3 in binary
        (2, {"first": 0.5}, (0,)),
    ],
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_blocks_at_the_ends_are_left_out(make, blocks, ends, left):
    model = make(**{"num_hidden_layers" if make is llama else "n_layer": blocks})
    prefix = "model.layers" if make is llama else "transformer.h"
    config = {**W8A8, "exclude_blocks": ends}
    names = convert(model, config)
    assert {int(name.split(".")[2]) for name in names} == set(range(blocks)) - set(left)
    plain = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    assert {name.rpartition(".")[0].split(".")[2] for name in plain if name.startswith(prefix)} == {*map(str, left)}
    assert type(model.lm_head) is nn.Linear, "output heads are left out as before"
    assert convert(model, config) == names
    assert len(names) == (7 if make is llama else 4) * (blocks - len(left))


def test_every_stack_has_its_own_ends():
    stack = lambda: nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(4))  # noqa: E731
    model = nn.ModuleDict({"encoder": stack(), "decoder": stack(), "between": nn.Linear(4, 4)})
    names = convert(model, {**W8A8, "exclude_blocks": {"last": 0.25}})
    kept = [f"{part}.{block}.{layer}" for part in ("encoder", "decoder") for block in range(3) for layer in (0, 2)]
    assert names == [*kept, "between"]


def test_blocks_that_are_not_there():
    with pytest.raises(ConfigError, match=r"exclude_blocks: got .*; allowed: with a model that has repeated blocks"):
        convert(nn.ModuleDict({"a": nn.Linear(4, 4)}), {**W8A8, "exclude_blocks": {"last": 0.1}})
    with pytest.raises(ConfigError, match=r"allowed: shares that leave one of the 2 blocks of 'model.layers'"):
        convert(llama(), {**W8A8, "exclude_blocks": {"first": 0.1, "last": 0.1}})
