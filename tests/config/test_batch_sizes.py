"""What is said about batch sizes where DeepSpeed's own error is a TypeError or an assertion of three numbers."""

import deepspeed
import pytest
import torch
from torch import nn

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.config.batch_sizes import check_ranks

SECTION = {"linear": {"weight": {"bits": 8}, "exclude": []}}
CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"ds_quant_required": True, "stage": 1},
    "ds_quant": SECTION,
}


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_auto_when_a_stage_3_model_is_built(key):
    deepspeed.init_distributed()
    config = {**CONFIG, "zero_optimization": {"stage": 3}, key: "auto"}
    with pytest.raises(TypeError):
        deepspeed.zero.Init(config_dict_or_path=config)
    ds_quant.enable()
    with pytest.raises(ConfigError, match=rf'zero.Init: {key}: got "auto"; allowed: numbers.*resolve_auto'):
        deepspeed.zero.Init(config_dict_or_path=config)


def test_zero_init_knows_the_ranks_when_it_checks_batch_sizes(monkeypatch):
    """accelerate has started torch's process group for CPUs, and DeepSpeed's communication waits for somebody."""
    knows = []
    original = deepspeed.runtime.config.DeepSpeedConfig.__init__

    def noting(self, *args, **kwargs):
        knows.append(deepspeed.comm.is_initialized())
        original(self, *args, **kwargs)

    monkeypatch.setattr(deepspeed.runtime.config.DeepSpeedConfig, "__init__", noting)
    deepspeed.init_distributed()
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
    assert torch.distributed.is_initialized()
    ds_quant.enable()
    deepspeed.zero.Init(config_dict_or_path={**CONFIG, "zero_optimization": {"stage": 3}})
    assert knows == [True]


def test_a_batch_computed_for_one_rank_of_two(monkeypatch):
    """As accelerate computes it for CPU ranks that it takes for the only ones."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigError) as caught:
        ds_quant.initialize(model=net, model_parameters=net.parameters(), config=CONFIG)
    assert str(caught.value).startswith(
        "train_batch_size: got 8; allowed: 16 = train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 2 x "
        "2 ranks; fix: "
    )
    assert type(net[0]) is nn.Linear


def test_which_batches_pass():
    check_ranks(CONFIG, 1, on_cpu=True)
    check_ranks({**CONFIG, "train_batch_size": 16}, 2, on_cpu=True)
    check_ranks({"train_batch_size": 8}, 2, on_cpu=True)
    with pytest.raises(ConfigError, match="--use_cpu"):
        check_ranks(CONFIG, 2, on_cpu=True)
    with pytest.raises(ConfigError) as caught:
        check_ranks(CONFIG, 2, on_cpu=False)
    assert "--use_cpu" not in str(caught.value)
