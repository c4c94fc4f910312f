"""Backend int8: its products by their definition, that they are integer ones, what is kept of weights and inputs."""

import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.linear_oracle import IN, OUT, W8A8G8_INT8, assert_within, expected, random_case, run
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ds_quant
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.kernels.int8.matmul import MAX_CONTRACTION
from ds_quant.linear.convert import convert, remove_forward_counter, step_key_of

WEIGHTS = {"none": None, "8 channel": {"bits": 8}, "4 tensor": {"bits": 4, "granularity": "tensor"}}
ACTIVATIONS = {
    "none": None,
    "8 token": {"bits": 8},
    "5 tensor": {"bits": 5, "granularity": "tensor"},
    "8 token full": {"bits": 8, "range": "full"},
    "4 tensor full": {"bits": 4, "granularity": "tensor", "range": "full"},
}
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
    """Bit for bit: sums of this size are exact in fp32, and both draw the same random bits.

    But for Y of activations in the full range in fp32, which `simulated` multiplies as a server does.
    """
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
            full = config.get("activation", {}).get("range") == "full"
            as_served = name == "Y" and dtype == torch.float32 and full
            if (name in integer and not as_served) or name == "db":
                assert torch.equal(a, b), f"{name} of {config}"


@pytest.mark.parametrize("full", [False, True], ids=["127", "-128"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_contractions_beyond_int32(layout, full):
    """Tokens in dW and output features in dX, all operands at their largest code."""
    long = MAX_CONTRACTION + 5000
    activation = {"bits": 8, "range": "full"} if full else {"bits": 8}
    config = {"weight": {"bits": 8}, "activation": activation, "gradient": {"bits": 8}, "backend": "int8"}
    for tokens, out in ((long, 2), (3, long)):
        if layout == "linear":
            module = ds_quant.QuantLinear(3, out, bias=False, config=config)
        else:
            module = ds_quant.QuantConv1D(out, 3, config=config)
        with torch.no_grad():
            module.weight.fill_(1.0)
        x = torch.full((tokens, 3), -127.5 if full else 1.0, requires_grad=True)
        module(x).backward(torch.ones(tokens, out))
        assert torch.allclose(x.grad, torch.full_like(x, float(out)), rtol=1e-6, atol=0)
        value = -128.0 * tokens if full else float(tokens)  # -127.5 has the code -128 and the scale 1
        assert torch.allclose(module.weight.grad, torch.full_like(module.weight, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(40, 64, 1), (1, 64, 48), (40, 1, 48), (1, 1, 1), (1, 64, 1)]
)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_one_feature_or_one_token(layout, tokens, inputs, outputs):
    """A score head, say. The transposed operand of dW is then a column of one row, which torch._int_mm misreads."""
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}, "backend": "int8"}
    results = []
    for backend in ("int8", "simulated"):
        torch.manual_seed(0)
        if layout == "linear":
            module = ds_quant.QuantLinear(inputs, outputs, config={**config, "backend": backend})
        else:
            module = ds_quant.QuantConv1D(outputs, inputs, config={**config, "backend": backend})
        module = module.bfloat16()
        x = torch.randn(tokens, inputs, dtype=torch.bfloat16, requires_grad=True)
        y = module(x)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), x.grad, module.weight.grad))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


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
def test_no_linear_runs_in_floating_point_silently(kind, operands, with_integer_units):
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
@pytest.mark.thorough
def test_compiled_models(kind, counts_itself):
    """One graph, in which every product is an integer one; not compiled anew for another step's random bits.

    `counts_itself`: as a model does that no engine tells the step.
    """
    changes = {"attention_dropout": 0.0} if kind == "llama" else {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}
    model = tiny(kind, **changes)
    names = convert(model, W8A8G8_INT8)
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
    convert(model, W8A8G8_INT8)
    want = step(model, model, TOKENS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for a, b in zip(step(model, model, TOKENS), want, strict=True):
        assert torch.equal(a, b)


def test_operators_are_named_in_profiles(with_integer_units):
    model = ds_quant.QuantLinear(IN, OUT, config=W8A8G8_INT8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.randn(5, IN, requires_grad=True)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"ds_quant::quantize_rows", "ds_quant::quantize_both", "ds_quant::epilogue", "aten::_int_mm"} <= names
