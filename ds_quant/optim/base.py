"""The base of optimizers whose states are stored in few bits: all but what one of them computes.

A subclass names its states, checks its hyperparameters, and does the steps of a batch of parameters:

    class Momentum(QuantizedOptimizer):
        STATES = {"momentum_buffer": True}

        def do_steps(self, items):
            for item in items:
                ...

The base makes the states, quantizes those that come in another format (as from a checkpoint of another optimizer),
draws the keys of stochastic rounding, and loads and saves. How a state is stored is an option of the parameter group
under the state's name: the JSON's object, or None for fp32.

Stochastic rounding draws from a counter: the key is (seed, the parameter's step, rank), the stream is the parameter's
number in the order in which parameters were first stepped. Nothing of it needs saving beside the states themselves.
`rank` is 0 where the state is replicated (one process, DDP, ZeRO stage 0), so that replicas draw the same bits; each
partition of ZeRO has its own.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.log import say
from ds_quant.config import ConfigError
from ds_quant.kernels.masters import ops as masters
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.format import Format, Group
from ds_quant.numerics.random import fold_words
from ds_quant.numerics.stored_states import State
from ds_quant.optim.group_options import GroupOptions, check_parameters, state_option
from ds_quant.optim.items import Item, MasterItem, master_items
from ds_quant.optim.master import MasterTensor
from ds_quant.optim.state import QuantizedState


class QuantizedOptimizer(torch.optim.Optimizer):
    """An optimizer with states in few bits; `param_groups` have an option for each of STATES.

    Raises:
        ConfigError: options out of range, parameters of another dtype or without plain storage (DTensor); in `step`,
            sparse gradients.
    """

    STATES: ClassVar[dict[str, bool]]
    """Names of the states that may be quantized, and whether they have signs."""

    seed: int = 0
    """Of stochastic rounding. Replicas must have the same one."""
    rank: int = 0
    """Enters the key of stochastic rounding where ranks hold different partitions; 0 where they are replicas."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, seed: int = 0):
        self.seed = seed
        self.check_group(defaults, type(self).__name__)
        super().__init__(params, defaults | self._state_options(defaults))

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise ConfigError for hyperparameters out of range."""

    def group_options(self, group: dict[str, Any]) -> GroupOptions:
        """A parameter group as a step needs it."""
        return GroupOptions(group, self.STATES)

    def do_steps(self, items: Sequence[Item]) -> None:
        """Do the steps of `items`, all on one device, in place."""
        raise NotImplementedError

    def do_master_steps(self, items: Sequence[MasterItem]) -> None:
        """Do steps of masters of few bits, all on one device, in place: each is in fp32 for as long as its step takes.

        An optimizer that has a kernel for it may do better.
        """
        values = items[0].item.param.new_empty(max(item.param.numel() for item, _, _ in items), dtype=torch.float32)
        for item, low_bits, key in items:
            part = values[: item.param.numel()]
            masters.join(item.param, low_bits, part)
            self.do_steps([item._replace(param=part)])
            masters.split(part, item.param, low_bits, key=key)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's own states and hyperparameters are validated."""
        options = {**self.defaults, **param_group}
        name = type(self).__name__
        self.check_group(options, name)
        super().add_param_group({**param_group, **self._state_options(options)})
        try:
            check_parameters(self.param_groups[-1]["params"], f"{name}(params)")
        except ConfigError:
            self.param_groups.pop()
            raise

    def _state_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {name: state_option(options[name], name, type(self).__name__) for name in self.STATES}

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
        with_gradients = list(self._with_gradients())
        if not with_gradients:
            return loss
        shared = Step(self)
        items: dict[torch.device, list[Item]] = {}
        parts: dict[torch.device, list[MasterItem]] = {}
        counters: list[Tensor] = []
        strided: list[tuple[Tensor, Tensor]] = []
        for param, grad, options in with_gradients:
            data = param
            if not data.is_contiguous():
                data = param.contiguous()
                strided.append((param, data))
            state = self.state[param]
            item = shared.item(param, data, grad.contiguous(), state, options)
            counters.append(state["step"])
            if isinstance(data, MasterTensor):
                parts.setdefault(param.device, []).extend(master_items(data, item, shared.key(item.step)))
            else:
                items.setdefault(param.device, []).append(item)
        for batch in items.values():
            self.do_steps(batch)
        for some in parts.values():
            self.do_master_steps(some)
        for param, data in strided:
            param.copy_(data)
        # As torch's own: a number, or a tensor without alpha, is converted for each counter, at several times the cost.
        torch._foreach_add_(counters, torch.tensor(1.0), alpha=1.0)
        # Kernels write through pointers: whoever compares versions (autograd, caches of codes) must see it.
        torch.autograd.graph.increment_version([param for param, _, _ in with_gradients])
        return loss

    def _with_gradients(self) -> Iterator[tuple[Tensor, Tensor, GroupOptions]]:
        for group in self.param_groups:
            options = self.group_options(group)
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise fail(
                        f"{type(self).__name__}.step(grad)",
                        f"a gradient of layout {grad.layout}",
                        "dense gradients",
                        "build the embedding with sparse=False, or leave its weight to torch.optim.SparseAdam",
                    )
                yield param, grad, options

    def state_numel(self, name: str, param: Tensor) -> int:
        """Elements of the state `name` of `param`."""
        return param.numel()

    def state_bytes(self) -> int:
        """Bytes of the states of all parameters: codes and scales, or fp32 elements."""
        states = (state[name] for state in self.state.values() for name in self.STATES if name in state)
        return sum(s.stored_bytes if isinstance(s, QuantizedState) else s.nbytes for s in states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but states keep their bits, and this optimizer's own options of STATES stay in force.

        States of another format (a plain optimizer's, other bits) are quantized, one parameter after the other.

        Raises:
            ConfigError: options or states that do not fit. The optimizer is as it was then.
        """
        for group in state_dict["param_groups"]:
            self.check_group({**self.defaults, **group}, f"{type(self).__name__}.load_state_dict")
        state, groups = self.state, self.param_groups
        # torch casts every floating-point tensor to the parameter's dtype; what is no tensor it leaves alone.
        sheltered = {
            number: {key: _Sheltered(value) if key in ("step", *self.STATES) else value for key, value in state.items()}
            for number, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": sheltered})
        for group, own in zip(self.param_groups, groups, strict=True):
            group.update({name: own[name] for name in self.STATES})
        try:
            # The quantized states first: they say which streams are taken.
            for loaded in self.state.values():
                _release(loaded, lambda value: isinstance(value, QuantizedState))
            self.convert_states([(group, param) for group in self.param_groups for param in group["params"]])
        except ConfigError:
            self.state, self.param_groups = state, groups
            raise

    @torch.no_grad()
    def convert_states(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """Bring the state of each (group, parameter) that has one into the format that this optimizer keeps.

        A step does it too; doing it after loading frees the full-size states at once.

        Raises:
            ConfigError: a state with another number of elements than its parameter.
        """
        shared = Step(self)
        options: dict[int, GroupOptions] = {}
        for group, param in params:
            state = self.state.get(param)
            if state:
                if id(group) not in options:
                    options[id(group)] = self.group_options(group)
                _release(state, lambda value: True)
                shared.ready(state, options[id(group)], param)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed, "rank": self.rank}


class Step:
    """What the parameters of one step share, computed once."""

    def __init__(self, optimizer: QuantizedOptimizer):
        self._optimizer = optimizer
        self._names = tuple(optimizer.STATES)
        self._keys: dict[int, tuple[int, int]] = {}
        self._streams: Iterator[int] | None = None

    def key(self, step: int) -> tuple[int, int]:
        """The key of stochastic rounding in step number `step`."""
        found = self._keys.get(step)
        if found is None:
            found = self._keys[step] = fold_words(self._optimizer.seed, step, rank=self._optimizer.rank)
        return found

    def item(self, param: Tensor, data: Tensor, grad: Tensor, state: dict[str, Any], options: GroupOptions) -> Item:
        """What is to be done of `param`, whose values are those of `data`, contiguous as `grad` is."""
        step = self.ready(state, options, param)
        own_key = self.key(step)
        states: list[State] = []
        keys: list[tuple[int, int] | None] = []
        stream = 0
        for name, is_stochastic in options.stochastic:
            stored, key = state[name], None
            if type(stored) is QuantizedState:
                stream, stored = stored.stream, stored.blocks
                if is_stochastic:
                    key = own_key
            states.append(stored)
            keys.append(key)
        return Item(data, grad, states, keys, stream, step, options)

    def ready(self, state: dict[str, Any], options: GroupOptions, param: Tensor) -> int:
        """Make or repair the state of `param`, so that step and states are as the optimizer keeps them.

        Returns the number of the step that comes, from 1.
        """
        step = state.get("step")
        if type(step) is not Tensor or not step.is_cpu or step.dtype != torch.float32:
            if step is None and any(name in state for name in self._names):
                step = options.step
            step = state["step"] = torch.tensor(float(step or 0.0), dtype=torch.float32)
        shape, device = options.shape(param), param.device
        numel = shape.numel()
        for (name, _), wanted in zip(options.stochastic, options.formats(param), strict=True):
            stored = state.get(name)
            if not _fits(stored, wanted, numel, device):
                state[name] = self._mended(stored, wanted, name, shape, device, state)
        return int(step.item()) + 1

    def _mended(
        self,
        stored: Any,
        wanted: Format[CodeMap] | None,
        name: str,
        shape: torch.Size,
        device: torch.device,
        state: dict[str, Any],
    ) -> Tensor:
        """A state in the format that the optimizer keeps, from nothing or from one in another format."""
        if stored is None:
            if wanted is None:
                return torch.zeros(shape, dtype=torch.float32, device=device)
            size = wanted.group.block_size
            return QuantizedState.zeros(shape, wanted.elements, size, device, self._stream(state))
        if not isinstance(stored, Tensor) or stored.numel() != shape.numel():
            got = f"{stored.numel()} elements" if isinstance(stored, Tensor) else f"a {type(stored).__name__}"
            raise fail(
                f"{type(self._optimizer).__name__}.state[{name}]",
                got,
                f"a tensor of the parameter's {shape.numel()} elements",
                "load a checkpoint of this model and this partitioning",
            )
        if isinstance(stored, QuantizedState):
            old = stored.blocks
            if stored.whole and wanted == Format(old.code_map, Group("block", old.block_size)):
                return stored.to(device)
            if wanted is None or wanted.elements != old.code_map:
                new = "32-bit" if wanted is None else _shown(wanted.elements)
                self._say_once(f"{name}: the loaded moments ({_shown(old.code_map)}) go on as {new}")
            stored = stored.dequantize()
        elif wanted is not None:
            self._say_once(f"{name}: the loaded 32-bit moments go on as {_shown(wanted.elements)}")
        values = stored.detach().to(device, torch.float32).reshape(shape)
        if wanted is None:
            return values.contiguous()
        size = wanted.group.block_size
        return QuantizedState.quantize(values, wanted.elements, size, stream=self._stream(state))

    def _stream(self, state: dict[str, Any]) -> int:
        """The stream of a parameter that has one in another state, else the next free one."""
        for name in self._names:
            if isinstance(state.get(name), QuantizedState):
                return int(state[name].stream)
        if self._streams is None:
            states = (other.get(name) for other in self._optimizer.state.values() for name in self._names)
            taken = (stored.stream for stored in states if isinstance(stored, QuantizedState))
            self._streams = itertools.count(1 + max(taken, default=-1))
        return next(self._streams)

    def _say_once(self, text: str) -> None:
        """Tell the user, once for this optimizer: ZeRO stage 3 steps it once for each sub-group."""
        said = self._optimizer.__dict__.setdefault("_said", set())
        if text not in said:
            said.add(text)
            say(text)


def _shown(code_map: CodeMap) -> str:
    return f"{code_map.bits}-bit {code_map.name}"


class _Sheltered:
    """A value on its way through torch's load_state_dict, which casts tensors."""

    def __init__(self, value: Any):
        self.value = value


def _release(state: dict[str, Any], wanted: Callable[[Any], bool]) -> None:
    for key, item in state.items():
        if isinstance(item, _Sheltered) and wanted(item.value):
            # Own storage: stepping must not write into the dict that was loaded.
            state[key] = item.value.clone() if isinstance(item.value, Tensor) else item.value


def _fits(stored: Any, wanted: Format[CodeMap] | None, numel: int, device: torch.device) -> bool:
    """Whether a state can be stepped as it is."""
    if type(stored) is QuantizedState:
        codes, _, count, block_size, code_map = stored.blocks
        return (
            wanted is not None
            and block_size == wanted.group.block_size
            and (code_map is wanted.elements or code_map == wanted.elements)
            and stored.whole
            and count == numel
            and codes.device == device
        )
    return (
        wanted is None
        and isinstance(stored, Tensor)
        and stored.dtype == torch.float32
        and stored.numel() == numel
        and stored.device == device
        and stored.is_contiguous()
    )
