"""AdamW by many hands: QuantAdamW and the optimizers that it is measured against; and ours of other kinds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.optim import QuantAdamW, QuantAdEMAMix, QuantLion, QuantSGD
from ds_quant.optim.master import MasterTensor
from ds_quant.optim.state import QuantizedState

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

LR = 1e-4


class Contender(NamedTuple):
    """An optimizer, and how it is made for a list of parameters."""

    name: str
    make: Make
    needs: str | None = None
    """The package that it comes from, if it is not ours."""
    moved: int = 12
    """Bytes of weights, masters and gradients that a step must move, an element: fp32, unless said."""


def _quant(exp_avg: dict | None, exp_avg_sq: dict | None) -> Make:
    return lambda params: QuantAdamW(params, lr=LR, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def _other(optimizer: Callable[..., torch.optim.Optimizer], **bits: int | None) -> Make:
    states = {name: count and {"bits": count} for name, count in bits.items()}
    return lambda params: optimizer(params, lr=LR, **states)


def _masters(bits: int, exp_avg: dict, exp_avg_sq: dict) -> Make:
    """bf16 weights and gradients, as ZeRO has them."""

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = QuantAdamW([torch.zeros(1)], lr=LR, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        optimizer.param_groups[0]["params"] = [_master(param, bits) for param in params]
        return optimizer

    return make


def _master(param: torch.nn.Parameter, bits: int) -> MasterTensor:
    weight = torch.empty(param.shape, dtype=torch.bfloat16, device=param.device)
    low_bits = torch.empty_like(weight, dtype=torch.int8) if bits == 24 else None
    master = MasterTensor(weight, low_bits, is_stochastic=bits == 16)
    master.copy_(param.detach())
    assert param.grad is not None
    master.grad = param.grad.bfloat16()
    return master


def _deepspeed(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use, in a minute or two

    return DeepSpeedCPUAdam(params, lr=LR)


def _from(module: str, name: str) -> Make:
    return lambda params: getattr(importlib.import_module(module), name)(params, lr=LR)


BASE = "torch AdamW, fused"

ALL = (
    Contender(BASE, lambda params: torch.optim.AdamW(params, lr=LR, fused=True)),
    Contender("torch AdamW, foreach", lambda params: torch.optim.AdamW(params, lr=LR, foreach=True)),
    Contender("DeepSpeedCPUAdam", _deepspeed, "deepspeed"),
    Contender("bitsandbytes AdamW8bit", _from("bitsandbytes.optim", "AdamW8bit"), "bitsandbytes"),
    Contender("torchao AdamW8bit", _from("torchao.optim", "AdamW8bit"), "torchao"),
    Contender("torchao AdamW4bit", _from("torchao.optim", "AdamW4bit"), "torchao"),
    Contender("QuantAdamW, 32 bits", _quant(None, None)),
    Contender("QuantAdamW, 8 bits", _quant({"bits": 8}, {"bits": 8})),
    Contender("QuantAdamW, m 4 v 8 bits", _quant({"bits": 4}, {"bits": 8})),
    Contender("QuantAdamW, 4 bits", _quant({"bits": 4}, {"bits": 4})),
    Contender("QuantAdamW, master 24, 8 bits", _masters(24, {"bits": 8}, {"bits": 8}), moved=8),
    Contender("QuantAdamW, master 24, 4 bits", _masters(24, {"bits": 4}, {"bits": 4}), moved=8),
    Contender("QuantAdamW, master 16, 8 bits", _masters(16, {"bits": 8}, {"bits": 8}), moved=6),
    Contender("QuantLion 8-bit", _other(QuantLion, exp_avg=8)),
    Contender("QuantLion 4-bit", _other(QuantLion, exp_avg=4)),
    Contender("QuantSGD 8-bit", _other(QuantSGD, momentum_buffer=8)),
    Contender("QuantSGD 4-bit", _other(QuantSGD, momentum_buffer=4)),
    Contender("QuantAdEMAMix 8/32/8-bit", _other(QuantAdEMAMix, exp_avg_fast=8, exp_avg_slow=None, exp_avg_sq=8)),
    Contender("QuantAdEMAMix 8-bit", _other(QuantAdEMAMix, exp_avg_fast=8, exp_avg_slow=8, exp_avg_sq=8)),
)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state that have more than one element, tables shared between parameters once."""
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in stored(value):
                if tensor.numel() > 1:
                    seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())


def stored(value: object) -> Iterable[Tensor]:
    """The plain tensors in which a value of the state is stored."""
    if isinstance(value, QuantizedState):
        yield from (value.blocks.codes, value.blocks.scale)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from stored(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
