"""One training step of a model by many hands: floating-point formats, torchao and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import recipes, step_models, torchao_float8, torchao_int8
from ds_quant import convert, weights_changed

LR = 1e-5


class Step:
    """A model that is ready to be trained on one batch."""

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor,
        *,
        autocast: bool = False,
        compiled: bool = False,
        with_optimizer: bool = False,
        backend: str = "inductor",
    ):
        """batch: token ids [sequences, tokens]. backend: torch.compile's."""
        self.model = model
        self.compiled = compiled
        self._batch = batch
        self._autocast = autocast
        self._call = torch.compile(model, dynamic=False, backend=backend) if compiled else model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True) if with_optimizer else None

    def loss(self) -> Tensor:
        with torch.autocast(self._batch.device.type, torch.bfloat16) if self._autocast else nullcontext():
            return self._call(input_ids=self._batch, labels=self._batch).loss

    def run(self) -> None:
        """Forward, loss and backward, and the optimizer's step where there is one."""
        self.loss().backward()
        if self._optimizer is not None:
            self._optimizer.step()

    def clear(self) -> None:
        """Drop all gradients; what layers keep of weights is no longer true, as after a step of the optimizer."""
        self.model.zero_grad(set_to_none=True)
        weights_changed()


class Contender(NamedTuple):
    """A way to train, and how a model in fp32, a copy of its own, becomes what is trained."""

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    autocast: bool = False
    compiled: bool = False
    needs: str | None = None
    """The package that it comes from, if it is not ours."""

    def make(self, model: nn.Module, batch: Tensor, *, with_optimizer: bool, backend: str = "inductor") -> Step:
        return Step(
            self.prepare(copy.deepcopy(model)),
            batch,
            autocast=self.autocast,
            compiled=self.compiled,
            with_optimizer=with_optimizer,
            backend=backend,
        )


BASE = "bf16 parameters"


def contenders(backend: str, device: torch.device) -> list[Contender]:
    """All of them that are for the device, ours with this backend."""
    w8a8g8 = recipes.w8a8g8(backend)
    stochastic = recipes.w8a8g8(backend, rounding="stochastic")
    ours = {
        "W8A8": recipes.w8a8(backend),
        "W8A8G8": w8a8g8,
        "W8A8G8, stochastic G": stochastic,
        "W8A8G8, lm_head too": {**w8a8g8, "exclude": []},
        "W8A8G8, stochastic G, lm_head too": {**stochastic, "exclude": []},
    }
    return [
        Contender("fp32", lambda model: model),
        Contender("bf16 autocast", lambda model: model, autocast=True),
        Contender(BASE, _bf16),
        Contender(f"{BASE}, compiled", _bf16, compiled=True),
        Contender("torchao int8", _torchao, needs="torchao"),
        Contender("torchao int8, compiled", _torchao, compiled=True, needs="torchao"),
        *(_float8(recipe) for recipe in (torchao_float8.RECIPES if device.type == "cuda" else ())),
        *(Contender(f"ds_quant {name}", _ours(section)) for name, section in ours.items()),
        *([Contender("ds_quant W8A8, compiled", _ours(ours["W8A8"]), compiled=True)] if device.type == "cuda" else []),
        Contender("ds_quant W8A8G8, compiled", _ours(w8a8g8), compiled=True),
    ]


def _bf16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


def _ours(section: recipes.Section) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        convert(_bf16(model), section)
        return model

    return prepare


def _torchao(model: nn.Module) -> nn.Module:
    return torchao_int8.quantize_linears_(step_models.with_linears(_bf16(model)), _is_no_head)


def _float8(recipe: str) -> Contender:
    """Compiled only: eager, its casts are launches of their own, and nobody trains so."""

    def prepare(model: nn.Module) -> nn.Module:
        return torchao_float8.convert_linears_(step_models.with_linears(_bf16(model)), recipe, _is_no_head)

    return Contender(f"torchao float8 {recipe}, compiled", prepare, compiled=True, needs="torchao")


def _is_no_head(module: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] != "lm_head"
