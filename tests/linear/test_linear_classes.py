"""Subclasses of linear layers: which are converted, which are told as what they are, what the JSON can name."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import ds_quant
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.convert import convert, coverage, step_key_of
from ds_quant.linear.linear_classes import SAME_PRODUCTS

W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}


class Plain(nn.Linear):
    def extra_repr(self):
        return "plain"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Spelt(nn.Linear):
    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class SpeltConv1D(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


class Routed(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


class Dropped(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def quantized_alike(module, reference, x):
    convert(wrapped := nn.Sequential(reference), W8A8)
    step_key_of(wrapped)
    return torch.equal(module(x), reference(x))


def test_an_inherited_forward_is_converted():
    model = nn.Sequential(nn.Linear(6, 4), Plain(6, 4))
    reference = nn.Linear(6, 4)
    reference.load_state_dict(model[1].state_dict())
    assert convert(model, W8A8) == ["0", "1"]
    assert isinstance(model[1], Plain)
    assert isinstance(model[1], ds_quant.QuantizedModule)
    assert model[1].extra_repr() == "plain"
    assert quantized_alike(model[1], reference, torch.randn(3, 6))


def test_a_converted_subclass_is_copied_and_pickled():
    model = nn.Sequential(Plain(6, 4))
    convert(model, W8A8)
    x = torch.randn(3, 6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(again[0]) is type(model[0])
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("path", SAME_PRODUCTS)
def test_the_classes_that_are_said_to_compute_the_same(path):
    module, _, name = path.rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    for bias in (True, False):
        layer, x = cls(6, 4, bias=bias), torch.randn(2, 3, 6)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("backend", ["simulated", "int8"])
def test_falcon_is_converted(backend):
    config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    model = FalconForCausalLM(config)
    names = convert(model, {**W8A8, "backend": backend})
    assert names == [name for name, module in model.named_modules() if isinstance(module, FalconLinear)]
    assert len(names) == 4
    assert coverage(model).heads == ["lm_head"]
    # Its layers add to the outputs of their linears in place.
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_a_changed_forward_is_found_out(monkeypatch):
    monkeypatch.setattr(FalconLinear, "forward", Doubled.forward)
    model = nn.Sequential(nn.Linear(4, 4), FalconLinear(4, 4))
    assert convert(model, W8A8) == ["0"]
    assert "forward of FalconLinear fails" in coverage(model).obstacles["1"]


@pytest.mark.parametrize("cls", [Doubled, Routed, Spelt])
def test_a_forward_of_its_own_is_told(cls):
    model = nn.Sequential(nn.Linear(4, 4), cls(4, 4))
    assert convert(model, W8A8) == ["0"]
    assert type(model[1]) is cls
    line = next(line for line in coverage(model).lines() if "1.weight" in line)
    assert f"{cls.__name__} has a forward of its own" in line
    assert "register_module" in line
    assert "include_classes" in line


def test_layers_that_a_class_swap_would_not_reach():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.lazy = nn.LazyLinear(4)
            self.patched, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)
            self.patched.forward = self.patched.forward

    model = Model()
    assert convert(model, W8A8) == ["plain"]
    reasons = coverage(model).obstacles
    assert "nn.MultiheadAttention" in reasons["attention.out_proj"]
    assert "replaced on the object" in reasons["patched"]
    assert "(yet)" in reasons["lazy"]
    with pytest.raises(ConfigError, match="multiplies by the weight itself"):
        convert(nn.Sequential(nn.MultiheadAttention(4, 2)), W8A8)


@pytest.mark.parametrize("name", ["Spelt", f"{__name__}.Spelt"])
def test_include_classes(name):
    model = nn.Sequential(nn.Linear(6, 6), Spelt(6, 4))
    reference = nn.Linear(6, 4)
    reference.load_state_dict(model[1].state_dict())
    section = {**W8A8, "include_classes": [name]}
    assert convert(model, section) == ["0", "1"]
    assert convert(model, section) == ["0", "1"]
    assert quantized_alike(model[1], reference, torch.randn(3, 6))


def test_include_classes_of_conv1d():
    model = nn.Sequential(SpeltConv1D(4, 6))
    reference = Conv1D(4, 6)
    reference.load_state_dict(model[0].state_dict())
    assert convert(model, {**W8A8, "include_classes": ["SpeltConv1D"]}) == ["0"]
    assert quantized_alike(model[0], reference, torch.randn(3, 6))


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (nn.Linear(3, 3), "Absent", "its linear layers are of type Linear"),
        (nn.LayerNorm(3), "LayerNorm", "no subclass of nn.Linear"),
        (Doubled(3, 3), "Doubled", "gives something else"),
        (Routed(3, 3), "Routed", "gives something else"),
        (Dropped(3, 3), "Dropped", "gives something else"),
    ],
)
def test_include_classes_that_are_refused(module, name, reason):
    model = nn.Sequential(nn.Linear(2, 2), module)
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match=rf"include_classes: got \"{name}\".*{reason}.*fix"):
        convert(model, {**W8A8, "include_classes": [name]})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [["a b"], [""], ["*Linear"], "Spelt", [1]])
def test_include_classes_takes_names(value):
    with pytest.raises(ConfigError, match=r"ds_quant\.linear\.include_classes"):
        LinearConfig.parse({**W8A8, "include_classes": value})


def test_a_layer_on_the_meta_device():
    section = {**W8A8, "gradient": {"bits": 8, "rounding": "stochastic"}}
    for backend in ("simulated", "int8"):
        with torch.device("meta"):
            inside = ds_quant.QuantLinear(4, 6, config={**section, "backend": backend})
        given = ds_quant.QuantLinear(4, 6, device="meta", config={**section, "backend": backend})
        for layer in (inside, given):
            layer(torch.empty(2, 4, device="meta", requires_grad=True)).sum().backward()
            layer.to_empty(device="cpu").load_state_dict(nn.Linear(4, 6).state_dict())
            assert layer(torch.ones(2, 4)).shape == (2, 6)
