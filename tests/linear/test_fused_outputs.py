"""Gradients of fused queries, keys and values, cut in three: by their definition, and what is refused."""

import deepspeed
import pytest
import torch
from helpers.linear_oracle import Side, assert_within, product
from torch import nn
from transformers.pytorch_utils import Conv1D

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.diagnostics.gradient_error import quantized_weight_gradient
from ds_quant.linear.convert import step_key_of

TOKENS, IN, OUT = 13, 37, 57
NAMES = {"tensor": "tensor", "token": "row"}


class Attention(nn.Module):
    """A fused projection in either layout, and the layer behind it."""

    def __init__(self, layout):
        super().__init__()
        self.c_attn = nn.Linear(IN, OUT) if layout == "linear" else Conv1D(OUT, IN)
        self.c_proj = nn.Linear(OUT, 8)

    def forward(self, x):
        return self.c_proj(self.c_attn(x))


def section(gradient, **more):
    return {"gradient": {"bits": 4, "granularity": "token", "split_qkv": ["*c_attn"], **gradient}, **more}


def gradients(model, x, g):
    """dX and dW [out, in] of `c_attn`, whose output gradient is g."""
    leaf, weight = x.clone().requires_grad_(), model.c_attn.weight
    weight.grad = None
    model.c_attn(leaf).backward(g)
    return leaf.grad, weight.grad if weight.shape[0] == OUT else weight.grad.t()


def in_parts(g, how):
    """G [tokens, out] as its parts are quantized, in fp64 [tokens, out]."""
    parts = [Side.quantized(part, how, NAMES[how["granularity"]]).values() for part in g.chunk(3, dim=1)]
    return torch.cat([part.expand(g.shape[0], -1) for part in parts], dim=1)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_products(dtype, layout):
    x, g = torch.randn(TOKENS, IN).to(dtype), torch.randn(TOKENS, OUT).to(dtype)
    g[:, :19] *= 100  # queries, beside which one scale would lose keys and values
    g[3] = 0
    others = (
        {},
        {"weight": {"bits": 4}, "activation": {"bits": 4}},
        {"weight": {"bits": 4}, "activation": {"bits": 4}, "backward_operands": "original"},
    )
    for gradient in ({}, {"granularity": "tensor"}, {"symmetric": False}, {"format": "fp4_e2m1", "bits": None}):
        for more in others:
            config = section(gradient, **more)
            how = {key: value for key, value in config["gradient"].items() if value is not None}
            config["gradient"] = how
            model = Attention(layout).to(dtype)
            ds_quant.convert(model, config)
            weight = model.c_attn.weight.detach()
            w = weight if layout == "linear" else weight.t()
            dx, dw = gradients(model, x, g)
            cut = in_parts(g, how)
            quantized = bool(more) and "backward_operands" not in more
            a, b = Side.plain(w.t()), Side.plain(x.t())
            if quantized:
                a = Side.quantized(w, more["weight"], "row", transposed=True)
                b = Side.quantized(x, more["activation"], "row", transposed=True)
            one = torch.ones((), dtype=torch.float64)
            what = f"{config} {dtype} {layout}"
            assert_within(dx, product(Side(cut, one, True), a, dtype), f"dX of {what}")
            assert_within(dw, product(Side(cut.t(), one, True), b, dtype), f"dW of {what}")


def test_each_part_keeps_its_own_steps():
    """Keys of a hundredth of the queries become 0 in 4 bits with one scale a token, and not with their own."""
    g, x = torch.ones(4, OUT), torch.randn(4, IN)
    g[:, 19:38] = 0.01
    kept = {}
    for patterns in (["*c_attn"], []):
        model = Attention("linear")
        ds_quant.convert(model, section({"split_qkv": patterns}))
        kept[bool(patterns)] = gradients(model, x, g)[1][19:38]
    assert not kept[False].any()
    torch.testing.assert_close(kept[True], (g.t() @ x)[19:38])


def test_the_other_layers_are_not_cut():
    x, g = torch.randn(TOKENS, IN), torch.randn(TOKENS, 8)
    found = []
    for patterns in (["*c_attn"], []):
        torch.manual_seed(0)
        model = Attention("linear")
        ds_quant.convert(model, section({"split_qkv": patterns}))
        model(x).backward(g)
        found.append([p.grad for p in model.c_proj.parameters()] + [model.c_attn.weight.grad])
    assert [torch.equal(a, b) for a, b in zip(*found, strict=True)] == [True, True, False]


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_stochastic_rounding(granularity):
    """Both neighbours of a value are drawn, others in each step, and the same again in the same one."""
    x, g = torch.eye(IN)[:TOKENS], torch.rand(TOKENS, OUT)
    g.view(TOKENS, 3, -1)[:, :, 0] = 1  # each scale is 1 / 7
    model = Attention("linear")
    ds_quant.convert(model, section({"rounding": "stochastic", "granularity": granularity}))
    draws = []
    for step in (1, 1, 2):
        step_key_of(model).set(step)
        draws.append(gradients(model, x, g)[1][:, :TOKENS].t() * 7)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    for drawn in draws:
        assert ((drawn - g * 7).abs() < 1).all()
        torch.testing.assert_close(drawn, drawn.round())
    assert (draws[0].round() > g * 7).any()
    assert (draws[0].round() < g * 7).any()


def test_the_diagnostic_sees_what_the_layer_does():
    x, g = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    for granularity in NAMES:
        model = Attention("linear")
        ds_quant.convert(model, section({"granularity": granularity}))
        _, dw = gradients(model, x, g)
        torch.testing.assert_close(quantized_weight_gradient(x, g, model.c_attn._quant_plan), dw)


def test_no_tokens_at_all():
    for granularity in NAMES:
        model = Attention("linear")
        ds_quant.convert(model, section({"granularity": granularity}))
        dx, dw = gradients(model, torch.zeros(0, IN), torch.zeros(0, OUT))
        assert dx.shape == (0, IN)
        assert not dw.any()


def test_what_models_refuse():
    for patterns, said in (
        (["*.q_proj"], "matches no quantized module of this model"),
        (["*c_attn", "*c_proj"], '"c_proj of 8 output features"; allowed: layers whose features make 3 equal parts'),
    ):
        model = Attention("linear")
        with pytest.raises(ConfigError, match=r"linear\.gradient\.split_qkv: got") as raised:
            ds_quant.convert(model, section({"split_qkv": patterns}))
        assert said in str(raised.value)
        assert type(model.c_attn) is nn.Linear
    with pytest.raises(ConfigError, match="absent for a layer by itself"):
        ds_quant.QuantLinear(IN, OUT, config=section({}))


def test_how_layers_describe_themselves():
    model = Attention("linear")
    ds_quant.convert(model, section({}))
    assert model.c_attn.describe() == "G4 token with q, k and v apart in *c_attn for dW+dX (simulated)"


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_every_zero_stage_trains_alike(layout, single_rank):
    def losses(stage, linear):
        config = {
            "train_micro_batch_size_per_gpu": TOKENS,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            # Below it stage 3 partitions nothing, and layers have their whole weights at all times.
            "zero_optimization": {"ds_quant_required": True, "stage": stage, "stage3_param_persistence_threshold": 0},
            "ds_quant": {"linear": linear},
        }
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = Attention(layout)
        for parameter in model.parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=stage == 3):
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 6)
        engine = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        found = []
        for step in range(4):
            loss = engine(torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(step))).square().mean()
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        engine.destroy()
        return found

    ds_quant.enable()
    try:
        split = section({"used_for": ["weight", "input"], "rounding": "stochastic"}, exclude=["c_proj"])
        whole = {**split, "gradient": {key: split["gradient"][key] for key in split["gradient"] if key != "split_qkv"}}
        # Sums of few numbers may be added in another order, which a draw near its threshold would enlarge.
        expected = pytest.approx(losses(0, split), rel=1e-4)
        for stage in (1, 2, 3):
            assert losses(stage, split) == expected
        assert losses(3, whole) != expected
    finally:
        ds_quant.disable()
