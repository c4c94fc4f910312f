"""`linear.forward_full_precision_from` in an engine: which steps quantize, and what the others compute."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.linear.convert import coverage, step_key_of

W8, A8 = {"bits": 8}, {"bits": 8}
G8 = {"bits": 8, "rounding": "stochastic"}
FP8 = {"format": "fp8_e4m3"}
LINEARS = {
    "simulated": {"weight": {"bits": 4, "granularity": "block", "rounding": "stochastic"}, "activation": A8},
    "rotated": {
        "weight": {"format": "nvfp4"},
        "activation": {"format": "nvfp4", "rounding": "stochastic"},
        "gradient": {"format": "nvfp4"},
        "rotation": {"block_size": 16},
    },
    "int8": {"weight": W8, "activation": A8, "gradient": G8, "backend": "int8"},
    "fp8": {"weight": FP8, "activation": FP8, "gradient": {"format": "fp8_e5m2"}, "backend": "fp8"},
}
SWITCH, STEPS, MICRO_STEPS = 2, 4, 2


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


class Net(nn.Module):
    """Two linears and the head; the first one may be computed again in the backward."""

    def __init__(self, again=None):
        super().__init__()
        self.again = again
        self.up, self.down, self.head = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 5)

    def inner(self, x):
        return torch.nn.functional.gelu(self.up(x))

    def forward(self, x):
        inner = self.inner(x) if self.again is None else checkpoint(self.inner, x, use_reentrant=self.again)
        return self.head(self.down(inner))


def build(linear, again=None):
    torch.manual_seed(0)
    net = Net(again)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": MICRO_STEPS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"ds_quant_required": True, "stage": 1},
        "ds_quant": {"linear": {**copy.deepcopy(linear), "exclude": ["head"]}},
    }
    return ds_quant.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def train(engine, first, last):
    """The loss of every micro step, and the weights after the last one."""
    found = []
    for number in range(first * MICRO_STEPS, last * MICRO_STEPS):
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(number)).requires_grad_()
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found, [parameter.detach().clone() for parameter in engine.module.parameters()]


def assert_same(got, want):
    assert got[0] == want[0]
    assert all(map(torch.equal, got[1], want[1]))


def switched(linear, step=SWITCH):
    return {**linear, "forward_full_precision_from": step}


def without_operands(linear):
    """What layers compute from that step on, as a section of its own."""
    return {key: value for key, value in linear.items() if key not in ("weight", "activation", "rotation")}


@pytest.mark.parametrize("name", LINEARS)
def test_it_trains_as_without_the_key_before_and_as_without_the_operands_after(name, tmp_path, caplog):
    """Bit for bit, both, whatever the gradient's quantizer draws; and it goes on from checkpoints on either side."""
    linear = LINEARS[name]
    engine = build(switched(linear))
    early = train(engine, 0, SWITCH - 1)
    engine.save_checkpoint(tmp_path, "before")
    middle = train(engine, SWITCH - 1, SWITCH)
    engine.save_checkpoint(tmp_path, "at")
    assert caplog.messages.count("step 2: the forward is in full precision from here on") == 1
    late = train(engine, SWITCH, SWITCH + 1)
    engine.save_checkpoint(tmp_path, "after")
    last = train(engine, SWITCH + 1, STEPS)

    plain = build(linear)
    assert_same(train(plain, 0, SWITCH - 1), early)
    assert_same(train(plain, SWITCH - 1, SWITCH), middle)
    assert train(plain, SWITCH, SWITCH + 1)[0][0] != late[0][0], "the quantizers lose nothing"

    left = without_operands(linear)
    other = build(left) if "gradient" in left else build({"weight": W8, "activation": A8})
    if "gradient" not in left:  # then the layers are nn.Linear
        for layer in (other.module.up, other.module.down):
            layer.__class__ = nn.Linear
    other.load_checkpoint(tmp_path, "at")
    assert_same(train(other, SWITCH, SWITCH + 1), late)
    assert_same(train(other, SWITCH + 1, STEPS), last)

    for tag, first, rest in (
        ("before", SWITCH - 1, [middle, late, last]),
        ("at", SWITCH, [late, last]),
        ("after", SWITCH + 1, [last]),
    ):
        fresh = build(switched(linear))
        fresh.load_checkpoint(tmp_path, tag)
        for step, want in enumerate(rest, first):
            assert_same(train(fresh, step, step + 1), want)
    engine.load_checkpoint(tmp_path, "before")  # back over the step
    assert_same(train(engine, SWITCH - 1, SWITCH), middle)


@pytest.mark.parametrize("again", [False, True])
def test_recomputed_layers_are_those_of_their_forward(again):
    linear = switched(LINEARS["rotated"], 1)
    assert_same(train(build(linear, again), 0, 2), train(build(linear), 0, 2))
    # Also where the model was called for the next step, before the backward of this one.
    engine = build(linear, again)
    results = []
    for late in (False, True):
        step_key_of(engine.module).reach(0)
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        engine.module.zero_grad()
        loss = engine.module(x).square().mean()
        step_key_of(engine.module).reach(int(late))
        loss.backward()
        results.append((x.grad, engine.module.up.weight.grad.clone()))
    assert all(map(torch.equal, *results))


def test_evaluation_is_as_the_next_forward():
    engine = build(switched(LINEARS["simulated"]))
    x = torch.randn(6, 32)
    layer = engine.module.down
    assert layer.describe().endswith("forward in full precision from step 2 (simulated)")
    for step in range(3):
        engine.eval()
        with torch.no_grad():
            found = [engine.module(x), engine(x)]  # by itself first: what a step has left behind
            plain = copy.deepcopy(engine.module)
            for each in (plain.up, plain.down):
                each.__class__ = nn.Linear
            assert all(torch.equal(y, plain(x)) == (step >= SWITCH) for y in found)
        engine.train()
        train(engine, step, step + 1)
    assert layer.describe().endswith("forward in full precision since step 2 (simulated)")
    assert any("since step 2" in line for line in coverage(engine.module).lines())


def test_saved_activations_and_codes_of_weights():
    """From that step on X is held as it is, and no codes of the weight."""
    engine = build(switched({**LINEARS["int8"], "backward_operands": "quantized"}))
    layer, saved = engine.module.down, []
    for step in range(3):
        x = torch.randn(6, 48)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x).sum().backward()
        held = [t.dtype for t in saved if t.shape == (6, 48)]
        assert held == [torch.int8 if step < SWITCH else torch.float32]
        assert (layer._weight_codes._codes is None) == (step >= SWITCH)
        saved.clear()
        train(engine, step, step + 1)


@pytest.mark.parametrize("name", [pytest.param("simulated"), pytest.param("int8", marks=pytest.mark.slow)])
def test_compiled_as_one_graph_twice(name):
    """fullgraph, one compilation on each side of the step, none at the others."""
    engine = build(switched(LINEARS[name]))
    key, layer = step_key_of(engine.module), engine.module.down
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(STEPS):
        key.set(step)
        key.reach(step)
        x = torch.randn(6, 48)
        assert torch.equal(compiled(x), layer(x))
        assert counter.frame_count == (1 if step < SWITCH else 2)


@pytest.mark.parametrize("key", ["forward_full_precision_from", "weight.oscillation_reset"])
def test_a_model_without_an_engine_is_refused_in_training_alone(key):
    net, linear, got = Net(), switched(LINEARS["simulated"]), "2"
    if key == "weight.oscillation_reset":
        linear, got = {"weight": {"bits": 4, "oscillation_reset": {"every": 9, "watched_steps": 3}}}, '{"every": 9'
    ds_quant.convert(net, linear)
    x = torch.randn(3, 32)
    with pytest.raises(ConfigError, match=rf"{key}: got {got}.*; allowed: training with an engine"):
        net(x)
    with torch.no_grad():
        net(x)
    net.eval()(x)


def test_copies_and_pickles_stay_where_they_are():
    net = Net()
    ds_quant.convert(net, switched(LINEARS["simulated"], 1))
    step_key_of(net).reach(1)
    x = torch.randn(3, 48)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.down(x), nn.functional.linear(x, net.down.weight, net.down.bias))
