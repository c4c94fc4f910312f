"""Inputs that several layers share are quantized and held once, and anew once they were written to."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.linear_oracle import IN, OUT, W8A8G8_INT8
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_quant
from ds_quant.linear.convert import convert


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, OUT, bias=False) for _ in range(3))

    def forward(self, x, between=lambda x: None):
        y = self.q(x)
        between(x)
        return y + self.k(x) * self.v(x)


def attention(**changes):
    torch.manual_seed(0)
    model = Attention()
    convert(model, {**W8A8G8_INT8, **changes})
    return model


def held(model, x):
    """Bytes between forward and backward that are no parameters, each memory once."""
    found = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = torch.stack([model.q(x), model.k(x), model.v(x)]).sum()  # saves nothing but the layers' own
    return y, sum(size for address, size in found.items() if address not in parameters)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_shared_input_is_quantized_and_held_once(quantizer_calls, autocast):
    model = attention(gradient={"bits": 8})
    x = torch.randn(64, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, size = held(model, x)
    assert quantizer_calls["quantize_input"] == 1
    assert size == 64 * IN + 64 * 4
    y.backward()
    shared = [x.grad, *(parameter.grad for parameter in model.parameters())]
    x.grad = None
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.stack([layer(x.view_as(x)) for layer in (model.q, model.k, model.v)]).sum().backward()
    assert quantizer_calls["quantize_input"] == 4, "of three tensors, though of the same memory"
    for a, b in zip(shared, [x.grad, *(parameter.grad for parameter in model.parameters())], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("changes", [{"activation": None}, {"backward_operands": "original"}], ids=str)
def test_an_unquantized_input_is_held_in_the_dtype_of_autocast(changes):
    layer = attention(**changes).q
    x = torch.randn(64, IN, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        y = layer(x)
    assert [tensor.dtype for tensor in saved if tensor.numel() == x.numel()] == [torch.bfloat16]
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_an_input_whose_memory_comes_back_is_quantized_anew():
    """A tensor that is handed other memory time and again meets the first one's address, with other elements."""
    layer = attention().q
    x = torch.randn(64, IN)
    seen, again = set(), 0
    for _ in range(30):
        again += x.data_ptr() in seen
        seen.add(x.data_ptr())
        with torch.no_grad():
            assert torch.equal(layer(x), layer(x.clone()))
        x.data = torch.randn(64, IN)
    assert again, "no address came back: nothing was tested"


def test_an_input_that_was_written_to_is_quantized_anew(quantizer_calls):
    model = attention()

    def in_place(x):
        x.mul_(2)

    def through_a_view(x):
        x.view(-1)[:5].zero_()

    def other_storage(x):
        x.data = x.data * 2

    for number, edit in enumerate((in_place, through_a_view, other_storage), start=1):
        x = torch.randn(5, IN)
        quantizer_calls["quantize_input"] = 0
        with torch.no_grad():
            got = model(x.clone(), edit)
            changed = x.clone()
            edit(changed)
            want = model.q(x) + model.k(changed) * model.v(changed)
        assert torch.equal(got, want), edit.__name__
        assert quantizer_calls["quantize_input"] == 4, number


def test_freed_inputs_are_not_found_again(quantizer_calls):
    """New tensors get the addresses and ids of freed ones."""
    layer = attention().q
    seen, again = set(), 0
    for number in range(1, 31):
        x = torch.randn(64, IN)
        again += x.data_ptr() in seen
        seen.add(x.data_ptr())
        layer(x)
        assert quantizer_calls["quantize_input"] == number
        del x
    assert again, "no address came back: nothing was tested"


def test_codes_die_with_their_input():
    layer = attention().q
    x = torch.randn(5, IN)
    with torch.no_grad():
        layer(x)
    (entry,) = layer._shared_inputs._entries
    codes = weakref.ref(entry.codes.codes)
    del entry, x
    gc.collect()
    assert not layer._shared_inputs._entries
    assert codes() is None


def test_layers_that_quantize_otherwise_do_not_share():
    model = attention()
    other = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8_INT8, "activation": {"bits": 3}})
    other.configure_quantization(other.quant_config, other.step_key, 0, model.q._shared_inputs)
    x = torch.randn(5, IN)
    model.q(x)
    alone = ds_quant.QuantLinear(IN, OUT, config=other.quant_config)
    alone.load_state_dict(other.state_dict())
    assert torch.equal(other(x), alone(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bf16 = model.k(x)
    assert not torch.equal(in_bf16, model.k(x))


def test_aliases_that_hooks_hand_on_are_one_input(quantizer_calls):
    """As ZeRO-3 does it: each layer gets a tensor of its own, which lives no longer than its call."""
    model = attention(gradient={"bits": 8})
    for layer in (model.q, model.k, model.v):
        layer.register_forward_pre_hook(lambda module, args: tuple(x.view_as(x) for x in args))
        layer.watch_input()
        layer.watch_input()
    x = torch.randn(64, IN, requires_grad=True)
    _, size = held(model, x)
    assert quantizer_calls["quantize_input"] == 1
    assert size == 64 * IN + 64 * 4
    with torch.no_grad():
        model(x.clone(), lambda x: x.mul_(2))
    assert quantizer_calls["quantize_input"] == 3
    model.q.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    doubled = model.q(x)
    assert quantizer_calls["quantize_input"] == 4
    assert torch.equal(doubled, model.q.forward(x * 2)), "an input that a hook replaced is no alias"
    assert copy.deepcopy(model).q._arriving_input is not model.q._arriving_input


def test_stochastic_inputs_are_drawn_by_each_layer(quantizer_calls):
    model = attention(activation={"bits": 8, "rounding": "stochastic"})
    model(torch.randn(5, IN))
    assert quantizer_calls["quantize_input"] == 3


def test_inference_leaves_nothing_that_training_could_not_use():
    model = attention()
    x = torch.randn(5, IN, requires_grad=True)
    with torch.inference_mode():
        model(x)
        model(torch.randn(5, IN))
    model(x).sum().backward()


def test_checkpointed_layers_share_too(quantizer_calls):
    model = attention(gradient={"bits": 8})
    x = torch.randn(5, IN, requires_grad=True)
    checkpoint(lambda x: model(x.tanh()), x, use_reentrant=False).sum().backward()
    assert quantizer_calls["quantize_input"] == 2, "in the forward and in its repetition"
