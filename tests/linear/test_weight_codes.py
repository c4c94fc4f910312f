"""Codes of weights are made once a step, and anew wherever a weight was written."""

import copy
import pickle

import pytest
import torch
from helpers.linear_oracle import IN, OUT, W8A8G8_INT8
from torch import nn

import ds_quant
from ds_quant.linear import int8, modules
from ds_quant.linear.convert import convert, step_key_of
from ds_quant.linear.operands import quantize_weight
from ds_quant.linear.weight_codes import WeightCodes


class Raw(torch.optim.Optimizer):
    """Writes as kernels do that are handed addresses: no version moves."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


OPTIMIZERS = {
    "raw": Raw,
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, foreach=False),
    "adamw, foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "adamw, fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "QuantAdamW": lambda params: ds_quant.QuantAdamW(params, lr=0.1, exp_avg={"bits": 8}, exp_avg_sq={"bits": 8}),
}


def trained(optimizer, steps=3, accumulation=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 16), nn.GELU(), nn.Linear(16, OUT))
    convert(model, W8A8G8_INT8)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulation):
            step_key_of(model).set(number, micro)
            loss = model(torch.full((4, IN), 0.3 * micro + 0.1 * number)).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_quantized_once_a_step(monkeypatch, quantizer_calls, optimizer):
    losses, weights = trained(optimizer)
    assert quantizer_calls["quantize_weight"] == 2 * 3, "layers times steps"
    monkeypatch.setattr(WeightCodes, "may_keep", staticmethod(lambda weight: False))
    want_losses, want_weights = trained(optimizer)
    assert quantizer_calls["quantize_weight"] == 2 * 3 + 2 * 9, (
        "once a micro batch, and as often in the backward but uncounted"
    )
    assert losses == want_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, want_weights, strict=True))


def test_a_stale_code_would_be_seen(monkeypatch):
    """The control of the test above: without the epoch, the optimizer that moves no version trains with old codes."""
    right = trained("raw")
    monkeypatch.setattr("ds_quant.linear.weight_codes._epoch", 0)
    monkeypatch.setattr(
        WeightCodes, "get", lambda self, weight, quantize: self.__dict__.setdefault("x", quantize(weight))
    )
    assert trained("raw")[0] != right[0]


def edits():
    def data(module):
        module.weight.data.mul_(2)
        ds_quant.weights_changed()

    def new_storage(module):
        module.weight.data = module.weight.data * 2

    def new_parameter(module):
        module.weight = nn.Parameter(module.weight.detach() * 2)

    def in_place(module):
        with torch.no_grad():
            module.weight[0, 0] = 9.0

    def through_a_view(module):
        with torch.no_grad():
            module.weight.view(-1)[3:5].zero_()

    def loaded(module):
        module.load_state_dict({key: value * 3 for key, value in module.state_dict().items()})

    def other_dtype(module):
        module.bfloat16().float()

    return [data, new_storage, new_parameter, in_place, through_a_view, loaded, other_dtype]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_edited_weights_are_quantized_anew(edit):
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    x = torch.randn(3, IN)
    before = module(x)
    edit(module)
    twin = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    twin.load_state_dict(module.state_dict())
    after = module(x)
    assert torch.equal(after, twin(x))
    assert not torch.equal(after, before)


def test_evaluation_reads_and_keeps_no_codes(quantizer_calls):
    """So that weights may be exchanged for an average by any means, and back."""
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    x = torch.randn(3, IN)
    first = module(x)
    module.eval()
    module.weight.data.mul_(2)
    doubled = module(x)
    assert not torch.equal(doubled, first)
    module.weight.data.div_(2)
    assert torch.equal(module.train()(x), first)
    assert quantizer_calls["quantize_weight"] == 2
    with torch.inference_mode():
        module(x)
    assert quantizer_calls["quantize_weight"] == 3
    module(torch.randn(2, IN, requires_grad=True)).sum().backward()  # no codes that inference made


def test_the_backward_has_the_codes_of_its_forward():
    module = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8_INT8, "gradient": {"bits": 8}})
    x = torch.randn(3, IN, requires_grad=True)
    module(x).sum().backward()
    want, x.grad = x.grad, None
    y = module(x)
    ds_quant.weights_changed()
    module(torch.randn(1, IN))
    y.sum().backward()
    assert torch.equal(x.grad, want)
    y = module(x)
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("edit", [None, *edits()], ids=lambda edit: edit and edit.__name__)
def test_codes_that_came_with_a_weight_are_multiplied_until_it_is_edited(monkeypatch, edit):
    """As ZeRO-3 fetches a weight, for which a layer keeps no codes of its own; in the forward and the backward."""
    module = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8_INT8, "gradient": {"bits": 8}})
    monkeypatch.setattr(WeightCodes, "may_keep", staticmethod(lambda weight: False))
    codes = quantize_weight(module.weight, module._quant_plan)
    found = []

    def quantize(*args, **kwargs):
        found.append(args)
        return quantize_weight(*args, **kwargs)

    for place in (modules, int8):
        monkeypatch.setattr(place, "quantize_weight", quantize)
    x = torch.randn(3, IN)

    def step():
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.sum().backward()
        return y.detach(), leaf.grad

    want = step()
    assert module._weight_codes.wanted
    module._weight_codes.receive(module.weight, codes)
    if edit is not None:
        edit(module)
        want = None
    found.clear()
    got = step()
    assert len(found) == (0 if edit is None else 2)
    module._weight_codes.drop()
    for one, other in zip(got, want or step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.thorough
def test_a_compiled_optimizer_ends_the_epoch():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    x = torch.randn(3, IN)
    for _ in range(2):
        module(x).sum().backward()
        before = module(x)
        compiled()
        assert not torch.equal(module(x), before)


def test_a_weight_whose_memory_comes_back_is_quantized_anew():
    layer = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    x = torch.randn(3, IN)
    seen, again = set(), 0
    for _ in range(30):
        again += layer.weight.data_ptr() in seen
        seen.add(layer.weight.data_ptr())
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
        layer.weight.data = torch.randn(OUT, IN)
    assert again, "no address came back: nothing was tested"


def test_copies_keep_no_codes_of_others():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    x = torch.randn(3, IN)
    module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._weight_codes is not module._weight_codes
        assert twin._weight_codes._codes is None
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, W8A8G8_INT8)
    twin = copy.deepcopy(model)
    assert twin[0]._shared_inputs is twin[1]._shared_inputs is not model[0]._shared_inputs
