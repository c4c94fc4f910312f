"""Layers that are called several times: other random bits each time, and the same ones when computed again."""

import sys
import types

import pytest
import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import CheckpointFunction
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_quant
from ds_quant.linear import recomputation
from ds_quant.linear.convert import convert, step_key_of
from ds_quant.linear.recomputation import follow_reentrant

STOCHASTIC = {
    "weight": {"bits": 4, "rounding": "stochastic"},
    "activation": {"bits": 4, "rounding": "stochastic"},
    "gradient": {"bits": 4, "rounding": "stochastic"},
}
INT8 = {**STOCHASTIC, "weight": {"bits": 8}, "backend": "int8"}
SECTIONS = {"simulated": STOCHASTIC, "int8": INT8}
SIZE = 8
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"ds_quant_required": True, "stage": 1},
    "ds_quant": {"linear": STOCHASTIC},
}


def plainly(function, x):
    return function(x)


def by_deepspeed(function, x):
    follow_reentrant(CheckpointFunction)
    outputs = []
    CheckpointFunction.apply(function, outputs, x)
    return outputs[0]


WAYS = {
    "plain": plainly,
    "reentrant": lambda function, x: checkpoint(function, x, use_reentrant=True),
    "not reentrant": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "nested": lambda function, x: checkpoint(
        lambda y: checkpoint(function, y, use_reentrant=False), x, use_reentrant=True
    ),
    "deepspeed": by_deepspeed,
}


class Repeats(nn.Module):
    """One block three times, each checkpointed; its linear layer is called twice in a block, another one once."""

    def __init__(self):
        super().__init__()
        self.shared, self.once = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.way = plainly

    def block(self, x):
        return torch.tanh(self.shared(torch.tanh(self.shared(x)))) + x

    def forward(self, x):
        for _ in range(3):
            x = self.way(self.block, x)
        return self.once(x)


def built(section, way="plain"):
    torch.manual_seed(0)
    model = Repeats()
    convert(model, section)
    model.way = WAYS[way]
    return model


def rows():
    return torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()


def trained(model, call=None, steps=2):
    """Outputs and gradients of some steps."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        x = rows()
        y = (model if call is None else call)(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
    return found


def assert_same(first, second):
    """Up to the order in which the gradients of a parameter are added up: reentrant checkpointing has its own."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.layer(x), self.layer(x)


@pytest.mark.parametrize(("backend", "compiled"), [("simulated", False), ("int8", False), ("int8", True)])
@pytest.mark.thorough
def test_calls_of_one_forward_draw_different_bits(backend, compiled):
    torch.manual_seed(0)
    model = Twice()
    convert(model, SECTIONS[backend])
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = rows()
    first, second = call(x)
    assert not torch.equal(first, second)
    gradients = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (first, second)]
    assert not torch.equal(*gradients)
    # The first call's bits are those of a layer that is called once.
    step_key_of(model).set(1)
    assert torch.equal(first, model.layer(x))


@pytest.mark.parametrize("backend", SECTIONS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_recomputation_draws_the_bits_of_each_call(backend, way):
    assert_same(trained(built(SECTIONS[backend])), trained(built(SECTIONS[backend], way)))


@pytest.mark.thorough
def test_compiled_calls_draw_the_same_bits_without_a_graph_for_each_step():
    """Under checkpointing, as compiled code has it too."""
    torch._dynamo.reset()
    want = trained(built(STOCHASTIC), steps=3)
    model = built(STOCHASTIC, "not reentrant")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = trained(model, compiled, steps=1)
    after_one_step = len(graphs)
    found += trained(model, compiled, steps=2)
    assert_same(want, found)
    assert len(graphs) == after_one_step > 0


@pytest.mark.parametrize("way", WAYS)
def test_two_forwards_before_one_backward(way):
    """As preference training calls its policy: each forward has its own bits, also when computed again."""
    results = []
    for used in ("plain", way):
        model = built(STOCHASTIC, used)
        first, second = model(rows()), model(rows())
        assert not torch.equal(first, second)
        (first.square().sum() + second.square().sum()).backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert_same(*results)
    assert step_key_of(model).step == 2, "recomputation left the step elsewhere"


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_tells_forwards_of_one_micro_step_apart(single_rank, way):
    """The second of two forwards before a backward has bits of its own, also when computed again after an evaluation.
    Evaluations and a forward that fails leave those of training as they are."""
    results = []
    for used in ("plain", way):
        model = built(STOCHASTIC, used)
        engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
        plain = engine(rows())
        assert not torch.equal(plain, engine(rows()))
        engine.backward(plain.square().sum())
        engine.step()
        with pytest.raises(RuntimeError):
            engine(torch.zeros(1, SIZE + 1))
        first = engine(rows())
        engine.eval()
        with torch.no_grad():
            evaluated = engine(rows())
            assert torch.equal(evaluated, engine(rows()))
        engine.train()
        second = engine(rows())
        assert torch.equal(first, evaluated), "the first forward of a micro step has the bits of the micro step"
        assert not torch.equal(first, second)
        engine.backward(first.square().sum() + second.square().sum())
        engine.step()
        results.append([first.detach(), second.detach(), *(p.detach().clone() for p in model.parameters())])
    assert_same(*results)


def test_evaluation_draws_the_same_bits_each_time():
    model = built(STOCHASTIC).eval()
    assert torch.equal(model(rows()), model(rows()))


OLD = "_checkpoint_without_reentrant_generator"


@pytest.mark.parametrize("names", [(f"{OLD}_impl", OLD), (OLD,)], ids=["2.14", "2.13"])
def test_the_generator_of_each_torch_is_followed(names, monkeypatch):
    """The one that checkpointing calls, also where another module has taken it over by name."""

    def generator(fn, *args):
        return fn

    torchs, taken = (types.SimpleNamespace(**dict.fromkeys(names, generator)) for _ in range(2))
    torchs.CheckpointFunction = type("CheckpointFunction", (), {"forward": generator})
    monkeypatch.setattr(recomputation, "checkpoint", torchs)
    monkeypatch.setitem(sys.modules, recomputation._COMPOSABLE, taken)
    recomputation.follow.__wrapped__()
    for module in (torchs, taken):
        assert isinstance(getattr(module, names[0])(len), recomputation.Again)
        assert all(getattr(module, name)(len) is len for name in names[1:]), "it calls the first one"
    delattr(torchs, names[0])
    if len(names) == 1:
        with pytest.raises(ImportError, match=f"has no {OLD}"):
            recomputation.follow.__wrapped__()
