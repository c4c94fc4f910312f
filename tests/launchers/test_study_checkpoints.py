"""The loss of models that other commands of the study start from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from studying import checkpoints


def test_every_sequence_counts_alike() -> None:
    values = torch.randn(7)

    def model(input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        assert not torch.is_grad_enabled()
        return SimpleNamespace(loss=values[labels[:, 0]].mean())

    batches = [{"input_ids": rows[:, None], "labels": rows[:, None]} for rows in torch.arange(7).split([3, 3, 1])]
    assert checkpoints.loss(model, batches) == pytest.approx(float(values.mean()), abs=1e-6)
