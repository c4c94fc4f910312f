from __future__ import annotations

import pytest
import torch
from accelerate.utils import DummyOptim
from pretraining.arguments import ModelArguments
from pretraining.model import resolve_config
from pretraining.trainer import PretrainTrainer, decay_groups
from survival.errors import LaunchError
from transformers import AutoModelForCausalLM, Trainer

from ds_quant.planning.presets import PRESETS


def test_the_paper_model_without_a_network() -> None:
    config = resolve_config(ModelArguments(preset="paper"), vocab_size=50257, context_length=1024)
    assert (config.model_type, config.n_layer, config.n_head, config.n_embd) == ("gpt2", 12, 12, 768)
    assert (config.n_positions, config.vocab_size) == (1024, 50264)
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(124.4e6, rel=1e-3)  # tied, as in GPT-2


def test_the_llama_of_the_paper() -> None:
    config = resolve_config(ModelArguments(preset="paper-llama"), vocab_size=32000, context_length=1024)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (640, 24, 32000)
    assert config.attention_dropout == 0.1


def test_overrides_and_what_does_not_fit() -> None:
    tiny = ModelArguments(preset="tiny", config_overrides="num_hidden_layers=2,hidden_size=32")
    assert resolve_config(tiny, vocab_size=300, context_length=64).num_hidden_layers == 2
    with pytest.raises(LaunchError, match="config_overrides"):
        resolve_config(ModelArguments(preset="tiny", config_overrides="layers=2"), vocab_size=300, context_length=64)
    small = ModelArguments(preset="tiny", config_overrides="vocab_size=200")
    with pytest.raises(LaunchError, match="got 300 ids"):
        resolve_config(small, vocab_size=300, context_length=64)
    short = ModelArguments(preset="tiny", config_overrides="max_position_embeddings=32")
    with pytest.raises(LaunchError, match="at most the 32 positions"):
        resolve_config(short, vocab_size=300, context_length=64)


def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    args = ModelArguments(config_name=f"{tmp_path}/nowhere")
    with pytest.raises(LaunchError, match="from which no model configuration could be loaded"):
        resolve_config(args, vocab_size=300, context_length=64)


@pytest.mark.parametrize("preset", PRESETS)
def test_decay_falls_on_matrices_and_on_nothing_else(preset: str) -> None:
    overrides = "n_layer=2,n_embd=48" if "n_layer" in PRESETS[preset].model else "num_hidden_layers=2"
    config = resolve_config(
        ModelArguments(preset=preset, config_overrides=overrides), vocab_size=512, context_length=64
    )
    model = AutoModelForCausalLM.from_config(config)
    names = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    decayed, free = decay_groups(model, set(names))
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert free["weight_decay"] == 0.0
    assert "weight_decay" not in decayed, "the value of the JSON counts"
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_the_optimizer_of_the_json_gets_both_groups() -> None:
    config = resolve_config(ModelArguments(preset="tiny"), vocab_size=64, context_length=16)
    trainer = PretrainTrainer.__new__(PretrainTrainer)
    trainer.model = AutoModelForCausalLM.from_config(config)
    # What the Trainer's DeepSpeed integration has put there by then.
    trainer.optimizer = DummyOptim(params=list(trainer.model.parameters()))
    groups = trainer.create_optimizer().params
    assert [len(group["params"]) for group in groups] == [30, 9]
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
