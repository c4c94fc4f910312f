""" "auto" in a DeepSpeed JSON: filled, derived, left, or refused."""

import copy
import json

import pytest
from config_files import W8, check_parts, write

from ds_quant.config import ConfigError, resolve_auto, unresolved_auto

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
    "ds_quant": {"linear": W8},
}
VALUES = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1.0,
    "bf16": True,
    "fp16": False,
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "warmup_num_steps": 10,
}


def test_resolve_auto_fills_derives_and_drops():
    before = copy.deepcopy(AUTO)
    resolved = resolve_auto(AUTO, world_size=2, **VALUES)
    assert resolved == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}},
        "zero_optimization": {"stage": 1},
        "ds_quant": {"linear": W8},
    }
    assert unresolved_auto(resolved) == []
    assert before == AUTO


def test_a_given_value_wins_over_derivation_and_default():
    given = {"eps": 1e-6, "warmup_max_lr": 2e-3, "warmup_min_lr": 1e-5, "reduce_bucket_size": 1000}
    resolved = resolve_auto(AUTO, **VALUES, **given)
    assert resolved["optimizer"]["params"]["eps"] == 1e-6
    assert resolved["scheduler"]["params"]["warmup_max_lr"] == 2e-3
    assert resolved["scheduler"]["params"]["warmup_min_lr"] == 1e-5
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 1000
    assert resolved["train_batch_size"] == 12


def test_unresolved_auto_names_the_paths():
    resolved = resolve_auto(AUTO, lr=1e-3)
    assert unresolved_auto(resolved) == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "optimizer.params.betas",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_num_steps",
    ]


def test_deepspeeds_own_auto_is_resolved():
    config = {
        "data_types": {"keep_in_fp32_modules": "auto"},
        "pipeline": {"stages": "auto"},
        "expert_parallel": {"top_k": "auto"},
        "zero_optimization": {"zenflow": {"select_strategy": "auto"}, "stage": "auto"},
        "ds_quant": {"linear": "auto"},
    }
    assert unresolved_auto(config) == ["zero_optimization.stage"]


def test_full_paths_and_ambiguous_names():
    config = {"fp16": {"enabled": "auto"}, "wandb": {"enabled": "auto"}, "train_batch_size": "auto"}
    resolved = resolve_auto(config, fp16__enabled=False, wandb__enabled=True, train_batch_size=3)
    assert resolved == {"fp16": {"enabled": False}, "wandb": {"enabled": True}, "train_batch_size": 3}
    with pytest.raises(ConfigError, match=r"name it in full: fp16__enabled or wandb__enabled"):
        resolve_auto(config, enabled=True)


def test_equal_values_pass_and_contradictions_do_not():
    config = {"gradient_clipping": 1.0, "optimizer": {"params": {"betas": [0.9, 0.95], "lr": 0.1}}}
    assert resolve_auto(config, gradient_clipping=1.0, betas=(0.9, 0.95)) == config
    with pytest.raises(ConfigError) as caught:
        resolve_auto(config, gradient_clipping=2.0, lr=0.2)
    first, second = str(caught.value).splitlines()
    check_parts(first, "gradient_clipping", "2.0", "1.0, as the config says", 'write "auto" there')
    check_parts(second, "optimizer.params.lr", "0.2", "0.1, as the config says", 'write "auto" there')


def test_a_value_without_a_key_is_an_error():
    with pytest.raises(ConfigError) as caught:
        resolve_auto(AUTO, weigth_decay=0.1)
    check_parts(str(caught.value), "weigth_decay", "0.1", "a key in the config", 'did you mean "weight_decay"?')
    with pytest.raises(ConfigError, match=r"^bf16: got true"):
        resolve_auto({"train_batch_size": 1}, bf16=True)
    assert resolve_auto({"train_batch_size": 1}, bf16=False) == {"train_batch_size": 1}
    # The section is not filled: "auto" means nothing there.
    with pytest.raises(ConfigError, match=r"^bits: got 8"):
        resolve_auto(AUTO, bits=8)


def test_batch_sizes_must_agree():
    with pytest.raises(ConfigError) as caught:
        resolve_auto(AUTO, world_size=2, train_batch_size=8, **VALUES)
    check_parts(str(caught.value), "train_batch_size", "8", "24 = 4 (micro batch) * 3", "world_size")
    assert resolve_auto(AUTO, world_size=2, train_batch_size=24, **VALUES)["train_batch_size"] == 24


def test_resolve_auto_reads_any_source(tmp_path):
    path = write(tmp_path / "ds.json", json.dumps(AUTO))
    assert resolve_auto(path, **VALUES) == resolve_auto(AUTO, **VALUES)
