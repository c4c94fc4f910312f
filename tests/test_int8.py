"""Backend int8: its products by their definition, that they are integer ones, what is kept of weights and inputs."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from functorch.compile import make_boxed_func
from linear_oracle import IN, OUT, assert_within, expected, random_case, run
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ds_quant
from ds_quant import linear as linear_module
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.conversion import convert, remove_forward_counter, step_key_of
from ds_quant.kernels import int8_matmul, ops
from ds_quant.weight_codes import WeightCodes

W8A8G8 = {
    "weight": {"bits": 8},
    "activation": {"bits": 8},
    "gradient": {"bits": 8, "rounding": "stochastic"},
    "backend": "int8",
}
WEIGHTS = {"none": None, "8 channel": {"bits": 8}, "4 tensor": {"bits": 4, "granularity": "tensor"}}
ACTIVATIONS = {"none": None, "8 token": {"bits": 8}, "5 tensor": {"bits": 5, "granularity": "tensor"}}
GRADIENTS = [None, {"bits": 8}, {"bits": 4}, {"bits": 8, "granularity": "tensor"}]
DTYPES = (torch.float32, torch.bfloat16)


def allowed_configs():
    uses = (["weight"], ["input"], ["weight", "input"])
    for weight, activation, gradient, used_for, operands in itertools.product(
        WEIGHTS.values(), ACTIVATIONS.values(), GRADIENTS, uses, ("quantized", "original")
    ):
        if gradient is None and used_for != uses[0]:
            continue
        config = {"weight": weight, "activation": activation, "backward_operands": operands, "backend": "int8"}
        config["gradient"] = gradient and {**gradient, "used_for": used_for}
        config = {key: value for key, value in config.items() if value is not None}
        try:
            LinearConfig.parse(config)
        except ConfigError:
            continue  # nothing to quantize, or a scale that would stay on the contraction axis
        yield config


CONFIGS = list(allowed_configs())


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_three_products(dtype, layout):
    """Integer products carry no error but that of two scales, a bias and one rounding; all allowed configurations."""
    assert len(CONFIGS) > 80
    for config in CONFIGS:
        seed = int(torch.randint(2**31, ()).item())
        x, w, bias, g = random_case(dtype, seed)
        y, dx, dw, db = run(config, x, w, bias, g, layout)
        case = f"{config} {dtype} {layout} seed {seed}"
        for got, want, name in zip((y, dx, dw), expected(x, w, bias, g, config, dtype), "y dX dW".split(), strict=True):
            assert got.dtype == dtype
            assert_within(got, want, f"{name} of {case}")
        assert torch.equal(db, g.sum(0)), case


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_computes_the_same(dtype, layout, rounding):
    """Bit for bit: sums of this size are exact in fp32, and both draw the same random bits."""
    for config in CONFIGS:
        operands = [name for name in ("weight", "activation", "gradient") if name in config]
        if len(operands) < 2 or config["backward_operands"] == "original":
            continue
        for name in ("activation", "gradient"):
            if name in config:
                config = {**config, name: {**config[name], "rounding": rounding}}
        x, w, bias, g = random_case(dtype, int(torch.randint(2**31, ()).item()))
        torch.manual_seed(0)
        got = run(config, x, w, bias, g, layout)
        torch.manual_seed(0)
        want = run({**config, "backend": "simulated"}, x, w, bias, g, layout)
        integer = ds_quant.QuantLinear(1, 1, config=config)._quant_plan.both_quantized
        for name, a, b in zip(("Y", "dX", "dW", "db"), got, want, strict=True):
            if name in integer or name == "db":
                assert torch.equal(a, b), f"{name} of {config}"


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_contractions_beyond_int32(layout):
    """Tokens in dW and output features in dX, all operands at their largest code."""
    long = int8_matmul.MAX_CONTRACTION + 5000
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}, "backend": "int8"}
    for tokens, out in ((long, 2), (3, long)):
        if layout == "linear":
            module = ds_quant.QuantLinear(3, out, bias=False, config=config)
        else:
            module = ds_quant.QuantConv1D(out, 3, config=config)
        with torch.no_grad():
            module.weight.fill_(1.0)
        x = torch.ones(tokens, 3, requires_grad=True)
        module(x).backward(torch.ones(tokens, out))
        assert torch.allclose(x.grad, torch.full_like(x, float(out)), rtol=1e-6, atol=0)
        assert torch.allclose(module.weight.grad, torch.full_like(module.weight, float(tokens)), rtol=1e-6, atol=0)


# ---- whole models


class Products(TorchDispatchMode):
    """Counts products of matrices: integer ones, and the sizes of the second operand of floating ones."""

    def __init__(self):
        super().__init__()
        self.integer, self.floating = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.integer += name == "_int_mm"
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn_linear"):
            matrices = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() >= 2]
            self.floating.append(tuple(tuple(matrix.shape[-2:]) for matrix in matrices))
        return func(*args, **(kwargs or {}))


def tiny(kind, **changes):
    """Attention of 4 heads of 6 features over 7 tokens: none of its products has the sizes of a linear layer."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, attn_implementation="sdpa", **changes,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=16, attn_implementation="sdpa", **changes
    )
    return GPT2LMHeadModel(config)


def step(model, call, tokens, key_step=1):
    """The loss and all gradients of one step of `call`, which is the model or the model compiled."""
    if key_step is not None:
        step_key_of(model).set(key_step)
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    logits = call(input_ids=tokens).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


TOKENS = torch.arange(21).reshape(3, 7)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("operands", ["W8A8G8", "W8A8", "W8A8 with lm_head", "W8"])
def test_no_linear_runs_in_floating_point_silently(kind, operands):
    model = tiny(kind)
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}, "backend": "int8"}
    for name, there in (("activation", "A8" in operands), ("gradient", "G8" in operands)):
        if not there:
            del config[name]
    if "lm_head" in operands:
        config["exclude"] = []
    names = convert(model, config)
    modules = dict(model.named_modules())
    sizes = {frozenset(modules[name].weight.shape) for name in names}
    with Products() as forward:
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    with Products() as backward:
        loss.backward()
    products = modules[names[0]]._quant_plan.both_quantized
    assert products == {"W8A8G8": ("Y", "dX", "dW"), "W8": ()}.get(operands, ("Y",))
    assert forward.integer == len(names) * ("Y" in products)
    assert backward.integer == len(names) * (("dX" in products) + ("dW" in products))

    def of_linears(found):
        return [shapes for shapes in found.floating if any(frozenset(shape) in sizes for shape in shapes)]

    assert len(of_linears(forward)) == len(names) * ("Y" not in products)
    if "dX" in products:
        assert not of_linears(backward)
    else:
        assert len(of_linears(backward)) >= len(names)
    text = ", ".join(products) or "no product, each has an unquantized operand"
    assert modules[names[0]].describe().endswith(f"(int8: {text})")


@pytest.mark.parametrize("counts_itself", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiled_models(kind, counts_itself):
    """One graph, in which every product is an integer one; not compiled anew for another step's random bits.

    `counts_itself`: as a model does that no engine tells the step.
    """
    changes = {"attention_dropout": 0.0} if kind == "llama" else {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}
    model = tiny(kind, **changes)
    names = convert(model, W8A8G8)
    if not counts_itself:
        remove_forward_counter(model)
    numbers = (None,) * 3 if counts_itself else (1, 2, 3)
    want = [step(model, model, TOKENS, number) for number in numbers]
    step_key_of(model).set(0)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    got = [step(model, compiled, TOKENS, number) for number in numbers]
    for first, second in zip(itertools.chain(*want), itertools.chain(*got), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got[0][1], got[1][1]), "two steps drew the same bits"
    assert len(graphs) == 2 + counts_itself, "the hook that counts, a forward and a backward"
    for graph, products in zip(graphs[-2:], (1, 2), strict=True):
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(torch.ops.ds_quant.scaled_matmul.default) == products * len(names)
    assert step_key_of(model).step == 3


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing(kind, use_reentrant):
    model = tiny(kind).train()
    convert(model, W8A8G8)
    want = step(model, model, TOKENS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for a, b in zip(step(model, model, TOKENS), want, strict=True):
        assert torch.equal(a, b)


# ---- weights


@pytest.fixture
def count(monkeypatch):
    """Calls of the quantizers of weights and inputs, by name."""
    calls = {"quantize_weight": 0, "quantize_input": 0}

    def counting(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(linear_module, name, counting(name, getattr(linear_module, name)))
    return calls


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
    convert(model, W8A8G8)
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
def test_weights_are_quantized_once_a_step(monkeypatch, count, optimizer):
    losses, weights = trained(optimizer)
    assert count["quantize_weight"] == 2 * 3, "layers times steps"
    monkeypatch.setattr(WeightCodes, "may_keep", staticmethod(lambda weight: False))
    want_losses, want_weights = trained(optimizer)
    assert count["quantize_weight"] == 2 * 3 + 2 * 9, "once a micro batch, and as often in the backward but uncounted"
    assert losses == want_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, want_weights, strict=True))


def test_a_stale_code_would_be_seen(monkeypatch):
    """The control of the test above: without the epoch, the optimizer that moves no version trains with old codes."""
    right = trained("raw")
    monkeypatch.setattr("ds_quant.weight_codes._epoch", 0)
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
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    x = torch.randn(3, IN)
    before = module(x)
    edit(module)
    twin = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    twin.load_state_dict(module.state_dict())
    after = module(x)
    assert torch.equal(after, twin(x))
    assert not torch.equal(after, before)


def test_evaluation_reads_and_keeps_no_codes(count):
    """So that weights may be exchanged for an average by any means, and back."""
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    x = torch.randn(3, IN)
    first = module(x)
    module.eval()
    module.weight.data.mul_(2)
    doubled = module(x)
    assert not torch.equal(doubled, first)
    module.weight.data.div_(2)
    assert torch.equal(module.train()(x), first)
    assert count["quantize_weight"] == 2
    with torch.inference_mode():
        module(x)
    assert count["quantize_weight"] == 3
    module(torch.randn(2, IN, requires_grad=True)).sum().backward()  # no codes that inference made


def test_the_backward_has_the_codes_of_its_forward():
    module = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8, "gradient": {"bits": 8}})
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


def test_copies_keep_no_codes_of_others():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    x = torch.randn(3, IN)
    module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._weight_codes is not module._weight_codes
        assert twin._weight_codes._codes is None
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, W8A8G8)
    twin = copy.deepcopy(model)
    assert twin[0]._shared_inputs is twin[1]._shared_inputs is not model[0]._shared_inputs


def test_a_compiled_optimizer_ends_the_epoch():
    module = ds_quant.QuantLinear(IN, OUT, config=W8A8G8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    x = torch.randn(3, IN)
    for _ in range(2):
        module(x).sum().backward()
        before = module(x)
        compiled()
        assert not torch.equal(module(x), before)


# ---- inputs


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
    convert(model, {**W8A8G8, **changes})
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
def test_a_shared_input_is_quantized_and_held_once(count, autocast):
    model = attention(gradient={"bits": 8})
    x = torch.randn(64, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, size = held(model, x)
    assert count["quantize_input"] == 1
    assert size == 64 * IN + 64 * 4
    y.backward()
    shared = [x.grad, *(parameter.grad for parameter in model.parameters())]
    x.grad = None
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.stack([layer(x.view_as(x)) for layer in (model.q, model.k, model.v)]).sum().backward()
    assert count["quantize_input"] == 4, "of three tensors, though of the same memory"
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


def test_a_weight_whose_memory_comes_back_is_quantized_anew():
    layer = attention().q
    x = torch.randn(3, IN)
    seen, again = set(), 0
    for _ in range(30):
        again += layer.weight.data_ptr() in seen
        seen.add(layer.weight.data_ptr())
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
        layer.weight.data = torch.randn(OUT, IN)
    assert again, "no address came back: nothing was tested"


def test_an_input_that_was_written_to_is_quantized_anew(count):
    model = attention()

    def in_place(x):
        x.mul_(2)

    def through_a_view(x):
        x.view(-1)[:5].zero_()

    def other_storage(x):
        x.data = x.data * 2

    for number, edit in enumerate((in_place, through_a_view, other_storage), start=1):
        x = torch.randn(5, IN)
        count["quantize_input"] = 0
        with torch.no_grad():
            got = model(x.clone(), edit)
            changed = x.clone()
            edit(changed)
            want = model.q(x) + model.k(changed) * model.v(changed)
        assert torch.equal(got, want), edit.__name__
        assert count["quantize_input"] == 4, number


def test_freed_inputs_are_not_found_again(count):
    """New tensors get the addresses and ids of freed ones."""
    layer = attention().q
    seen, again = set(), 0
    for number in range(1, 31):
        x = torch.randn(64, IN)
        again += x.data_ptr() in seen
        seen.add(x.data_ptr())
        layer(x)
        assert count["quantize_input"] == number
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
    other = ds_quant.QuantLinear(IN, OUT, config={**W8A8G8, "activation": {"bits": 3}})
    other.configure_quantization(other.quant_config, other.step_key, 0, model.q._shared_inputs)
    x = torch.randn(5, IN)
    model.q(x)
    alone = ds_quant.QuantLinear(IN, OUT, config=other.quant_config)
    alone.load_state_dict(other.state_dict())
    assert torch.equal(other(x), alone(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bf16 = model.k(x)
    assert not torch.equal(in_bf16, model.k(x))


def test_aliases_that_hooks_hand_on_are_one_input(count):
    """As ZeRO-3 does it: each layer gets a tensor of its own, which lives no longer than its call."""
    model = attention(gradient={"bits": 8})
    for layer in (model.q, model.k, model.v):
        layer.register_forward_pre_hook(lambda module, args: tuple(x.view_as(x) for x in args))
        layer.watch_input()
        layer.watch_input()
    x = torch.randn(64, IN, requires_grad=True)
    _, size = held(model, x)
    assert count["quantize_input"] == 1
    assert size == 64 * IN + 64 * 4
    with torch.no_grad():
        model(x.clone(), lambda x: x.mul_(2))
    assert count["quantize_input"] == 3
    model.q.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    doubled = model.q(x)
    assert count["quantize_input"] == 4
    assert torch.equal(doubled, model.q.forward(x * 2)), "an input that a hook replaced is no alias"
    assert copy.deepcopy(model).q._arriving_input is not model.q._arriving_input


def test_stochastic_inputs_are_drawn_by_each_layer(count):
    model = attention(activation={"bits": 8, "rounding": "stochastic"})
    model(torch.randn(5, IN))
    assert count["quantize_input"] == 3


def test_inference_leaves_nothing_that_training_could_not_use():
    model = attention()
    x = torch.randn(5, IN, requires_grad=True)
    with torch.inference_mode():
        model(x)
        model(torch.randn(5, IN))
    model(x).sum().backward()


def test_checkpointed_layers_share_too(count):
    model = attention(gradient={"bits": 8})
    x = torch.randn(5, IN, requires_grad=True)
    checkpoint(lambda x: model(x.tanh()), x, use_reentrant=False).sum().backward()
    assert count["quantize_input"] == 2, "in the forward and in its repetition"


def test_operators_are_named_in_profiles():
    model = attention()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.randn(5, IN, requires_grad=True)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"ds_quant::quantize_rows", "ds_quant::quantize_both", "ds_quant::epilogue", "aten::_int_mm"} <= names
    assert ops.span.__module__ == "ds_quant.kernels.spans"
