import copy
import inspect

import pytest
import torch
from torch import nn

from ds_quant.config import ConfigError, OptimizerConfig
from ds_quant.optim import QuantAdamW
from ds_quant.optim.kinds import FIXED, IMPLEMENTATIONS
from ds_quant.optim.setup import (
    ParameterNames,
    adopt,
    builder,
    bytes_a_parameter,
    check_granularity,
    describe_moments,
    json_hyperparameters,
)
from ds_quant.optim.state import QuantizedState


def config(first=8, second=8, **options):
    objects = {"exp_avg": first, "exp_avg_sq": second}
    objects = {name: {"bits": value} if isinstance(value, int) else value for name, value in objects.items() if value}
    return OptimizerConfig.parse({**objects, **options})


def section(kind="AdamW", **params):
    return {"optimizer": {"type": kind, "params": params}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


# ---- the JSON's optimizer section


def test_hyperparameters_are_those_of_the_section():
    raw = section(lr=0.1, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3)
    before = copy.deepcopy(raw)
    assert json_hyperparameters(raw) == {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    assert raw == before
    for kind in ("Adam", "adamw", "ADAM"):
        assert json_hyperparameters(section(kind, lr=0.1, weight_decay=0))["lr"] == 0.1


def test_weight_decay_defaults_to_that_of_the_implementation_that_deepspeed_takes():
    from deepspeed.ops.adam import FusedAdam

    params = [nn.Parameter(torch.zeros(1))]
    torch_default = torch.optim.AdamW(params).defaults
    fused_default = inspect.signature(FusedAdam).parameters["weight_decay"].default
    assert fused_default != torch_default["weight_decay"]
    for raw in (
        section(),
        section("Adam"),
        section(torch_adam=False),
        {"optimizer": {"type": "AdamW", "params": None}},
    ):
        assert json_hyperparameters(raw) == {"weight_decay": fused_default}
    assert json_hyperparameters(section(torch_adam=True)) == {"weight_decay": torch_default["weight_decay"]}
    ours = QuantAdamW(params, exp_avg=None, exp_avg_sq=None).defaults
    assert {key: torch_default[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        key: ours[key] for key in ("lr", "betas", "eps", "weight_decay")
    }


@pytest.mark.parametrize("key", IMPLEMENTATIONS)
def test_keys_that_choose_an_implementation_are_passed_over(key):
    for value in (True, False, None):
        assert set(json_hyperparameters(section(**{key: value}))) == {"weight_decay"}


@pytest.mark.parametrize("key", FIXED)
def test_keys_that_change_the_function_must_be_as_quantadamw_has_them(key):
    json_hyperparameters(section("Adam", **{key: FIXED[key]}))
    message = rf"optimizer.params.{key}: got {str(not FIXED[key]).lower()}; allowed: {str(FIXED[key]).lower()} with "
    with pytest.raises(ConfigError, match=message):
        json_hyperparameters(section("Adam", **{key: not FIXED[key]}))


def test_fixed_keys():
    assert FIXED == {
        "adam_w_mode": True,
        "amsgrad": False,
        "bias_correction": True,
        "differentiable": False,
        "fp32_optimizer_states": True,
        "maximize": False,
    }
    # DeepSpeed decouples the weight decay of "AdamW" whatever this says.
    json_hyperparameters(section("AdamW", adam_w_mode=False))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"optimizer: got null; allowed: an optimizer of type Adam, AdamW, .*; fix: add \"optimizer\""),
        ({"optimizer": {}}, r"optimizer: got \{\}; "),
        ({"optimizer": {"params": {}}}, r"optimizer: got "),
        ({"optimizer": "AdamW"}, r'optimizer: got "AdamW"; '),
        (section("Lamb"), r'optimizer.type: got "Lamb"; allowed: "Adam", "AdamW", "Lion", .*; fix: set "AdamW"'),
        (section("sgd"), r'optimizer.type: got "sgd"; '),
        (section("OneBitAdam"), r'optimizer.type: got "OneBitAdam"; '),
        (
            section(momentum=0.9),
            r"optimizer.params.momentum: got 0.9; allowed: lr, betas, .*maximize.*; fix: remove it",
        ),
        (section(learning_rate=0.1), r"optimizer.params.learning_rate: got 0.1; "),
    ],
)
def test_other_sections_are_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        json_hyperparameters(raw)


# ---- which parameters keep 32 bits


def test_patterns_choose_trainable_parameters():
    names = ParameterNames(Model(), ["norm.*", "*.bias"])
    assert list(names.excluded) == ["layers.0.bias", "layers.1.bias", "norm.weight", "norm.bias"]
    assert (names.num_excluded, names.num_elements) == (16, 40 + 2 * 20 + 8)
    assert ParameterNames(Model(), []).excluded == {}


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["embed"], r"ds_quant.optimizer.exclude: got the pattern 'embed', .*no trainable parameter.*'embed.weight'"),
        (["frozen.*"], r"got the pattern 'frozen.\*'"),
        (["norm.*", "lm_head.weight"], r"got the pattern 'lm_head.weight'"),
        (["*"], r"ds_quant.optimizer.exclude: got \[\"\*\"\]; allowed: patterns that leave a parameter to quantize; "),
        (["*.weight", "*.bias"], r"allowed: patterns that leave a parameter"),
    ],
)
def test_patterns_that_match_nothing_or_all_are_refused(exclude, message):
    with pytest.raises(ConfigError, match=message):
        ParameterNames(Model(), exclude)


def test_sizes_of_partitioned_parameters_are_their_whole_ones():
    model = Model()
    model.embed.weight.ds_numel = 4000
    assert ParameterNames(model, ["embed.*"]).num_excluded == 4000


def test_without_patterns_parameters_are_passed_on_as_they_are():
    model = Model()
    for given in (None, model.parameters(), [{"params": list(model.parameters())}]):
        assert ParameterNames(model, []).split(given) is given


@pytest.mark.parametrize("given", ["none", "iterator", "list", "named"])
def test_parameters_are_split_into_two_groups(given):
    model = Model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    argument = {
        "none": None,
        "iterator": iter(trainable),
        "list": trainable,
        "named": [(name, p) for name, p in model.named_parameters() if p.requires_grad],
    }[given]
    quantized, excluded = ParameterNames(model, ["norm.*"]).split(argument)
    assert (quantized["name"], excluded["name"]) == ("params", "params-32-bit-moments")
    optimizer = QuantAdamW([quantized, excluded], exp_avg={"bits": 8}, exp_avg_sq={"bits": 8})
    sets = [set(map(id, group["params"])) for group in optimizer.param_groups]
    assert sets[1] == {id(model.norm.weight), id(model.norm.bias)}
    assert sets[0] == {id(p) for p in trainable} - sets[1]
    assert [group["exp_avg"] is None for group in optimizer.param_groups] == [False, True]
    assert [group["exp_avg_sq"] is None for group in optimizer.param_groups] == [False, True]


def test_groups_are_split_and_keep_their_options():
    model = Model()
    embed, layers, norm = model.embed.weight, list(model.layers.parameters()), list(model.norm.parameters())
    groups = [
        {"params": [embed, *norm], "lr": 0.5, "name": "first"},
        {"params": iter(layers), "weight_decay": 0.0},
        {"params": norm[0:0]},
    ]
    before = [dict(group) for group in groups]
    found = ParameterNames(model, ["norm.*"]).split(groups)
    shown = [{**group, "params": len(group["params"])} for group in found]
    none = {"exp_avg": None, "exp_avg_sq": None}
    assert shown == [
        {"params": 1, "lr": 0.5, "name": "first"},
        {"params": 2, "lr": 0.5, "name": "first-32-bit-moments", **none},
        {"params": 4, "weight_decay": 0.0},
    ]
    assert groups == before
    assert found[1]["params"][0] is norm[0]
    # As torch, a group may name a single tensor.
    single = ParameterNames(model, ["norm.weight"]).split([{"params": norm[0]}, {"params": embed}])
    assert [(group["params"][0] is param) for group, param in zip(single, (norm[0], embed), strict=True)] == [
        True,
        True,
    ]
    assert [len(group["params"]) for group in single] == [1, 1]
    assert "exp_avg" in single[0]
    assert "exp_avg" not in single[1]


def test_groups_of_a_live_optimizer_are_marked():
    model = Model()
    others = [model.embed.weight, *model.layers.parameters()]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": model.norm.parameters()}, {"params": []}])
    ParameterNames(model, ["norm.*"]).mark(optimizer)
    assert ["exp_avg" in group for group in optimizer.param_groups] == [False, True, False]
    assert optimizer.param_groups[1]["exp_avg"] is optimizer.param_groups[1]["exp_avg_sq"] is None
    mixed = torch.optim.AdamW([{"params": others[1:]}, {"params": [others[0], *model.norm.parameters()]}])
    message = r"exclude: got .*norm.weight in parameter group 1, beside .*; allowed: groups of one kind.*; fix: give "
    with pytest.raises(ConfigError, match=message):
        ParameterNames(model, ["norm.*"]).mark(mixed)


def test_an_optimizer_or_what_makes_one_is_adopted():
    model = Model()
    names = ParameterNames(model, ["norm.*"])

    def make(params):
        return torch.optim.AdamW(params)

    groups = names.split(None)
    live = make(groups)
    for optimizer in (adopt(config(4, 8), names, live), adopt(config(4, 8), names, make)(names.split(None))):
        assert type(optimizer) is QuantAdamW
        assert [group["exp_avg"] and group["exp_avg"]["bits"] for group in optimizer.param_groups] == [4, None]
    assert type(live) is QuantAdamW


def test_the_builder_passes_everything_on():
    model = Model()
    optimizer = builder(config(4, 8), {"lr": 0.3, "betas": (0.5, 0.6)})(model.norm.parameters())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["exp_avg"]["bits"], group["exp_avg_sq"]["bits"]) == (
        0.3,
        (0.5, 0.6),
        4,
        8,
    )


# ---- granularity, and what is told


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_scales_of_whole_parameters_need_stage_0(granularity):
    moment = {"bits": 8, "map": "linear", "granularity": granularity}
    for name, wanted in (("exp_avg", config(moment, 8)), ("exp_avg_sq", config(None, moment))):
        check_granularity(wanted, 0)
        for stage in (1, 2, 3):
            message = (
                rf'ds_quant.optimizer.{name}.granularity: got "{granularity}"; allowed: "block" at ZeRO stage {stage}'
            )
            with pytest.raises(ConfigError, match=message):
                check_granularity(wanted, stage)
    check_granularity(config(), 3)


def test_moments_are_described_in_a_line():
    assert describe_moments(config(4, 8)) == (
        "exp_avg 4-bit power per block of 128, stochastic; exp_avg_sq 8-bit float per block of 256, stochastic"
    )
    channel = {"bits": 8, "map": "linear", "granularity": "channel", "rounding": "stochastic"}
    assert describe_moments(config(channel, None)) == "exp_avg 8-bit linear per channel, stochastic; exp_avg_sq 32-bit"


@pytest.mark.parametrize(
    ("first", "second"), [(8, 8), (4, 8), (4, 4), (None, 8), ({"bits": 4, "block_size": 32}, None)]
)
def test_bytes_a_parameter_are_those_of_the_state(first, second):
    wanted = config(first, second)
    param = nn.Parameter(torch.zeros(4096))
    param.grad = torch.zeros(4096)
    optimizer = builder(wanted, {})([param])
    optimizer.step()
    assert optimizer.state_bytes() / 4096 == bytes_a_parameter(wanted)
    moments = [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")]
    assert [type(m) is QuantizedState for m in moments] == [first is not None, second is not None]
    tensor = config({"bits": 4, "map": "linear", "granularity": "tensor"}, None)
    assert bytes_a_parameter(tensor) == 4.5
