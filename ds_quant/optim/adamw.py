"""QuantAdamW: AdamW whose moments are stored in 8 or 4 bits.

A step is one fused pass over param, grad and moments (`ds_quant.kernels`); what it computes stands in
`ds_quant.numerics.adam`. A moment is a `QuantizedMoment` in `optimizer.state`, and where it should be quantized but is
a plain tensor, as after loading a checkpoint of another AdamW or a universal one, it is quantized before it is used.

Stochastic rounding draws from a counter: the key is (seed, the parameter's step, rank), the stream is the parameter's
number in the order in which parameters were first stepped. Nothing of it needs saving beside the moments themselves.
`rank` is 0 where the state is replicated (one process, DDP, ZeRO stage 0), so that replicas draw the same bits; each
partition of ZeRO has its own.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.log import say
from ds_quant.config import ConfigError
from ds_quant.kernels.adamw import ops
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.numerics.random import fold_key
from ds_quant.optim.group_options import (
    MOMENTS,
    Format,
    GroupOptions,
    check_hyperparameters,
    check_parameters,
    moment_options,
)
from ds_quant.optim.state import QuantizedMoment


class QuantAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with `exp_avg` and `exp_avg_sq` in few bits.

    Args:
        params: parameters or parameter groups, fp32, bf16 or fp16, of any shape. A group may have its own
            `exp_avg` and `exp_avg_sq`; None keeps that group's moment in 32 bits.
        lr: as in torch.optim.AdamW; may be a tensor of one element.
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW.
        weight_decay: as in torch.optim.AdamW.
        exp_avg: the object of the JSON's `ds_quant.optimizer.exp_avg` (or a `MomentConfig`), or None for 32 bits.
        exp_avg_sq: the same of `exp_avg_sq`.
        seed: of stochastic rounding. Replicas must have the same one.

    32-bit moments are fp32 whatever the parameter's dtype.

    Raises:
        ConfigError: arguments out of range, parameters of another dtype or without plain storage (DTensor), amsgrad
            and the like in a group; in `step`, sparse gradients.
    """

    rank: int = 0
    """Enters the key of stochastic rounding where ranks hold different partitions; 0 where they are replicas."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        exp_avg: Any,
        exp_avg_sq: Any,
        seed: int = 0,
    ):
        self.seed = seed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_hyperparameters(defaults)
        super().__init__(params, defaults | moment_options(exp_avg, exp_avg_sq))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's own `exp_avg`, `exp_avg_sq` and hyperparameters are validated."""
        options = {**self.defaults, **param_group}
        check_hyperparameters(options)
        super().add_param_group({**param_group, **moment_options(*(options[name] for name in MOMENTS))})
        try:
            check_parameters(self.param_groups[-1]["params"], "QuantAdamW(params)")
        except ConfigError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter with a gradient; returns what `closure` returns.

        Raises:
            ConfigError: a sparse gradient. No parameter has been stepped then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shared = _Step(self)
        params: list[Tensor] = []
        plans: list[tuple[GroupOptions, Tensor]] = []
        for group in self.param_groups:
            options = GroupOptions(group)
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise fail(
                        "QuantAdamW.step(grad)",
                        f"a gradient of layout {grad.layout}",
                        "dense gradients",
                        "build the embedding with sparse=False, or leave its weight to torch.optim.SparseAdam",
                    )
                params.append(param)
                plans.append((options, grad))
        if not params:
            return loss
        works: dict[torch.device, list[AdamWWork]] = {}
        counters: list[Tensor] = []
        strided: list[tuple[Tensor, Tensor]] = []
        for param, (options, grad) in zip(params, plans, strict=True):
            state = self.state[param]
            step = _ready(state, options, param, shared)
            counters.append(state["step"])
            data: Tensor = param
            if not data.is_contiguous():
                data = param.contiguous()
                strided.append((param, data))
            if not grad.is_contiguous():
                grad = grad.contiguous()
            first, second = state["exp_avg"], state["exp_avg_sq"]
            key = second_key = None
            stream = 0
            if type(first) is QuantizedMoment:
                stream = first.stream
                key = shared.key(step) if options.stochastic[0] else None
                first = first.blocks
            if type(second) is QuantizedMoment:
                stream = second.stream
                second_key = shared.key(step) if options.stochastic[1] else None
                second = second.blocks
            work = AdamWWork(data, grad, first, second, options.scalars(step), key, second_key, stream)
            works.setdefault(param.device, []).append(work)
        for batch in works.values():
            ops.adamw_(batch)
        for param, data in strided:
            param.copy_(data)
        # As torch's own: a number, or a tensor without alpha, is converted for each counter, at several times the cost.
        torch._foreach_add_(counters, torch.tensor(1.0), alpha=1.0)
        # Kernels write through pointers: whoever compares versions (autograd, caches of codes) must see it.
        torch.autograd.graph.increment_version(params)
        return loss

    def state_bytes(self) -> int:
        """Bytes of the moments of all parameters: codes and scales, or fp32 elements."""
        moments = (state[name] for state in self.state.values() for name in MOMENTS if name in state)
        return sum(m.stored_bytes if isinstance(m, QuantizedMoment) else m.nbytes for m in moments)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments keep their bits, and this optimizer's own `exp_avg` and `exp_avg_sq` stay in force.

        Moments of another format (a plain AdamW's, other bits) are quantized, one parameter after the other.

        Raises:
            ConfigError: options or moments that do not fit. The optimizer is as it was then.
        """
        for group in state_dict["param_groups"]:
            check_hyperparameters({**self.defaults, **group}, "QuantAdamW.load_state_dict")
        state, groups = self.state, self.param_groups
        # torch casts every floating-point tensor to the parameter's dtype; what is no tensor it leaves alone.
        sheltered = {
            number: {key: _Sheltered(value) if key in ("step", *MOMENTS) else value for key, value in state.items()}
            for number, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": sheltered})
        for group, own in zip(self.param_groups, groups, strict=True):
            group.update({name: own[name] for name in MOMENTS})
        try:
            # The quantized moments first: they say which streams are taken.
            for loaded in self.state.values():
                _release(loaded, lambda value: isinstance(value, QuantizedMoment))
            self.mend([(group, param) for group in self.param_groups for param in group["params"]])
        except ConfigError:
            self.state, self.param_groups = state, groups
            raise

    @torch.no_grad()
    def mend(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Bring the state of each (group, parameter) that has one into the format that this optimizer keeps.

        A step does it too; doing it after loading frees the full-size moments at once.

        Raises:
            ConfigError: a moment with another number of elements than its parameter.
        """
        shared = _Step(self)
        options: dict[int, GroupOptions] = {}
        for group, param in params:
            state = self.state.get(param)
            if state:
                if id(group) not in options:
                    options[id(group)] = GroupOptions(group)
                _release(state, lambda value: True)
                _ready(state, options[id(group)], param, shared)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed, "rank": self.rank}


class _Step:
    """What the parameters of one step share, computed once."""

    def __init__(self, optimizer: QuantAdamW):
        self._optimizer = optimizer
        self._keys: dict[int, tuple[int, int]] = {}
        self._streams: Iterator[int] | None = None

    def key(self, step: int) -> tuple[int, int]:
        """The key of stochastic rounding in step number `step`."""
        found = self._keys.get(step)
        if found is None:
            first, second = fold_key(self._optimizer.seed, step, rank=self._optimizer.rank).tolist()
            found = self._keys[step] = (first, second)
        return found

    def stream(self, state: dict[str, Any]) -> int:
        """The stream of a parameter that has one in its other moment, else the next free one."""
        for name in MOMENTS:
            if isinstance(state.get(name), QuantizedMoment):
                return int(state[name].stream)
        if self._streams is None:
            moments = (other.get(name) for other in self._optimizer.state.values() for name in MOMENTS)
            taken = (moment.stream for moment in moments if isinstance(moment, QuantizedMoment))
            self._streams = itertools.count(1 + max(taken, default=-1))
        return next(self._streams)

    def say_once(self, text: str) -> None:
        """Tell the user, once for this optimizer: ZeRO stage 3 steps it once for each sub-group."""
        said = self._optimizer.__dict__.setdefault("_said", set())
        if text not in said:
            said.add(text)
            say(text)


class _Sheltered:
    """A value on its way through torch's load_state_dict, which casts tensors."""

    def __init__(self, value: Any):
        self.value = value


def _release(state: dict[str, Any], wanted: Callable[[Any], bool]) -> None:
    for key, item in state.items():
        if isinstance(item, _Sheltered) and wanted(item.value):
            # Own storage: stepping must not write into the dict that was loaded.
            state[key] = item.value.clone() if isinstance(item.value, Tensor) else item.value


def _ready(state: dict[str, Any], options: GroupOptions, param: Tensor, shared: _Step) -> int:
    """Make or mend the state of `param`, so that step and moments are as the optimizer keeps them.

    Returns the number of the step that comes, from 1.
    """
    step = state.get("step")
    if type(step) is not Tensor or not step.is_cpu or step.dtype != torch.float32:
        if step is None and "exp_avg" in state:
            step = options.step
        step = state["step"] = torch.tensor(float(step or 0.0), dtype=torch.float32)
    for name, wanted in zip(MOMENTS, options.formats(param), strict=True):
        moment = state.get(name)
        if not _fits(moment, wanted, param):
            state[name] = _mended(moment, wanted, name, param, state, shared)
    return int(step.item()) + 1


def _fits(moment: Any, wanted: Format | None, param: Tensor) -> bool:
    """Whether a moment can be stepped as it is."""
    if type(moment) is QuantizedMoment:
        codes, _, numel, block_size, code_map = moment.blocks
        return (
            wanted is not None
            and block_size == wanted[1]
            and (code_map is wanted[0] or code_map == wanted[0])
            and moment.whole
            and numel == param.numel()
            and codes.device == param.device
        )
    return (
        wanted is None
        and isinstance(moment, Tensor)
        and moment.dtype == torch.float32
        and moment.numel() == param.numel()
        and moment.device == param.device
        and moment.is_contiguous()
    )


def _mended(
    moment: Any, wanted: Format | None, name: str, param: Tensor, state: dict[str, Any], shared: _Step
) -> Tensor:
    """A moment in the format that the optimizer keeps, from nothing or from one in another format."""
    if moment is None:
        if wanted is None:
            return torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        return QuantizedMoment.zeros(param.shape, *wanted, param.device, shared.stream(state))
    if not isinstance(moment, Tensor) or moment.numel() != param.numel():
        got = f"{moment.numel()} elements" if isinstance(moment, Tensor) else f"a {type(moment).__name__}"
        raise fail(
            f"QuantAdamW.state[{name}]",
            got,
            f"a tensor of the parameter's {param.numel()} elements",
            "load a checkpoint of this model and this partitioning",
        )
    if isinstance(moment, QuantizedMoment):
        old = moment.blocks
        if moment.whole and wanted == (old.code_map, old.block_size):
            return moment.to(param.device)
        if wanted is None or wanted[0] != old.code_map:
            new = "32-bit" if wanted is None else f"{wanted[0].bits}-bit {wanted[0].name}"
            shared.say_once(f"{name}: the loaded moments ({old.code_map.bits}-bit {old.code_map.name}) go on as {new}")
        moment = moment.dequantize()
    elif wanted is not None:
        shared.say_once(f"{name}: the loaded 32-bit moments go on as {wanted[0].bits}-bit {wanted[0].name}")
    values = moment.detach().to(param.device, torch.float32).reshape(param.shape)
    if wanted is None:
        return values.contiguous()
    return QuantizedMoment.quantize(values, *wanted, stream=shared.stream(state))
