"""Small models and text in place of those that the study keeps in files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from studying import checkpoints, plan
from studying.plan import Settings
from transformers import LlamaConfig, LlamaForCausalLM


def a_model() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False)).eval()


def some_text(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (count, 3, 9))]


def in_place_of_files(monkeypatch: pytest.MonkeyPatch, model: Any, more: Any, held_out: Any) -> None:
    """Let every run's model be `model`, trained on with the batches `more` and evaluated on `held_out`."""
    monkeypatch.setattr(Settings, "text", "a text")
    monkeypatch.setattr(plan, "steps", lambda key, settings: 162)
    monkeypatch.setattr(checkpoints, "load", lambda folder, settings: copy.deepcopy(model))
    monkeypatch.setattr(checkpoints, "more_text", lambda key, settings, steps: more)
    monkeypatch.setattr(checkpoints, "held_out_text", lambda key, settings: held_out)
