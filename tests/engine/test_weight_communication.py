"""What a live engine says of weights that it is to gather in few bits, and cannot."""

import pytest
import torch
from torch import nn

import ds_quant
from ds_quant.config import ConfigError

CODES = {"mode": "codes"}


@pytest.fixture(autouse=True)
def _job(single_rank):
    """One rank without a launcher."""


def start(model, weight, linear=None, **overrides):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "ds_quant": {
            "linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, **(linear or {})},
            "communication": {"weight": weight},
        },
        **overrides,
    }
    return ds_quant.initialize(model=model, config=config)[0]


class Tied(nn.Module):
    """Of two layers, one has the weight of an embedding, and the other is one in which weights are frozen."""

    def __init__(self, with_frozen=True):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)
        self.head.weight = self.embedding.weight
        if with_frozen:
            self.frozen = nn.Linear(8, 8)
            self.frozen.weight.requires_grad = False


def test_a_model_without_a_weight_for_quantized_layers_alone_is_refused():
    with pytest.raises(ConfigError, match=r"communication\.weight\.mode: got \"codes\"; .* mode \"difference\""):
        start(Tied(), CODES, {"exclude": []})


def test_an_optimizer_that_gathers_otherwise_is_refused():
    overrides = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(ConfigError, match=r"got \"BF16_Optimizer\"; .* remove data_types\.grad_accum_dtype"):
        start(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), CODES, **overrides)


def test_what_is_sent_how_is_said(caplog):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Embedding(4, 16))
    with caplog.at_level("INFO", logger="ds_quant"):
        engine = start(model, CODES)
    assert "codes that layers compute with, in 8 bits: 50.0% of the trainable elements" in caplog.text
    assert "in their dtype, since not only quantized layers read them: 1.weight" in caplog.text
    engine.gather_weights()
    assert engine.ds_quant_weight_communication.summary()["weight_wire_bytes_per_step"] is None


def test_engines_without_have_the_method(caplog):
    config = {"train_micro_batch_size_per_gpu": 2, "ds_quant": {"linear": {"weight": {"bits": 8}}}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    engine = ds_quant.initialize(model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config=config)[0]
    engine.gather_weights()
    assert isinstance(engine.module[0].weight, torch.nn.Parameter)


STAGE_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def test_stage_3_refuses_and_says_the_same(caplog):
    """But that there frozen weights are gathered, too."""
    with pytest.raises(ConfigError, match=r"communication\.weight\.mode: got \"codes\""):
        start(Tied(with_frozen=False), CODES, {"exclude": []}, **STAGE_3)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight.requires_grad = False
    with caplog.at_level("INFO", logger="ds_quant"):
        engine = start(model, CODES, {"exclude": []}, **STAGE_3)
    assert "codes that layers compute with, in 8 bits: 100.0% of the elements" in caplog.text
    engine.gather_weights()
    assert engine.ds_quant_weight_communication.summary()["weight_wire_bytes_per_step"] is None


def test_another_engine_gathers_parameters_by_its_own_ways():
    """And not by those of an engine that does not hear of its steps."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    first = start(model, CODES, {"exclude": []}, **STAGE_3)
    replaced = model[0].weight.all_gather
    plain = {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "exclude": []}}
    start(model, CODES, ds_quant=plain, **STAGE_3)
    assert model[0].weight.all_gather is replaced.__wrapped__
    assert not hasattr(model[0].weight, "ds_quant_methods")
    assert first.module is model
