"""Which random bits a stochastic rounding draws: a key that names the step instead of a generator with a state.

The bits depend on (seed, step, micro step, rank, stream), on how often the layer was called before in the same forward
and on the element's index alone, so that dropout and data order stay paired with a run that does not round
stochastically, a resumed run needs no saved generator, and a layer that is computed again under activation
checkpointing rounds exactly as it did the first time (`recomputation` sees to that).
"""

import itertools
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_quant.base.errors import ConfigError, fail
from ds_quant.config import LinearConfig
from ds_quant.numerics.random import derive_key, derive_words, fold_words

SEED_MASK = 2**63 - 1
"""Seeds are sent between ranks as int64."""
_CALLS = 0x63616C6C << 32
"""Sets keys of a layer's second and later calls in a forward apart from those of streams."""


class Moment(NamedTuple):
    """Where a StepKey stands: what recomputation goes back to."""

    step: int
    micro_step: int
    local: Tensor
    replicated: Tensor
    calls: dict[int, int] | None
    recomputes: bool
    quantizes_forward: bool


class StepKey:
    """The seed, step and rank that all stochastically rounding modules of one model share.

    An engine drives it with :meth:`set`. A model without an engine counts its own training forwards (``advance``).

    Args:
        seed: any integer; its low 63 bits count.
        rank: the data-parallel rank, for what differs between ranks (activations, gradients).
    """

    def __init__(self, seed: int = 0, rank: int = 0):
        self.seed = seed & SEED_MASK
        self.rank = rank
        self.step = 0
        self.micro_step = 0
        self.full_forward_from: int | None = None
        """The step from which on the forward is in full precision; None: never."""
        self.quantizes_forward = True
        """Whether that step is still to come. Code is compiled for this, and not for each step's number."""
        self.loss_share = 1.0
        """Of a forward in an optimizer step: one over the number of micro steps."""
        self._device = torch.device("cpu")
        self._number = _enrol(self)
        self._calls: dict[int, int] | None = None
        self._recomputes = False
        self._make_keys()

    def set(self, step: int, micro_step: int = 0) -> None:
        """Name the training step and the micro step within it that the next forward and its backward belong to."""
        self._calls = None
        if (step, micro_step) != (self.step, self.micro_step):
            self.step, self.micro_step = step, micro_step
            self._make_keys()

    def reach(self, step: int) -> None:
        """`step` comes next: layers quantize their forward, or do not any more."""
        self.quantizes_forward = self.full_forward_from is None or step < self.full_forward_from

    def begin_forward(self) -> None:
        """A forward begins: from here to `end_forward`, layers that are called again draw other bits each time."""
        if not torch.compiler.is_compiling():  # a graph numbers its calls itself
            self._calls = {}

    def end_forward(self) -> None:
        """Outside of a forward all calls of a layer draw the same bits."""
        self._calls = None

    def keys_of_call(self, stream: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(local, replicated) for the call of the layer with that stream that begins now, which counts."""
        compiles = torch.compiler.is_compiling()
        number = _number_in_graph(self._number, stream) if compiles else self._count_call(stream)
        if number == 0:
            return self.local(device), self.replicated(device)
        if compiles:
            keys = self.local(device), self.replicated(device)
            return derive_key(keys[0], _CALLS | number), derive_key(keys[1], _CALLS | number)
        local, replicated = (derive_words(words, _CALLS | number) for words in self._words())
        return _tensors(local, replicated, device)

    def moment(self) -> Moment:
        """Where it stands now, for `go_to`."""
        calls = None if self._calls is None else dict(self._calls)
        keys = self._local, self._replicated
        return Moment(self.step, self.micro_step, *keys, calls, self._recomputes, self.quantizes_forward)

    def go_to(self, moment: Moment) -> None:
        """Stand where `moment` was taken."""
        self.step, self.micro_step, self._local, self._replicated = moment[:4]
        self._recomputes, self.quantizes_forward = moment.recomputes, moment.quantizes_forward
        self._calls = None if moment.calls is None else dict(moment.calls)

    def _count_call(self, stream: int) -> int:
        # In a backward, only recomputation that went back to its forward knows which calls these are.
        unknown = torch._C._current_graph_task_id() != -1 and not self._recomputes
        if self._calls is None or unknown:
            return 0
        number = self._calls.get(stream, 0)
        self._calls[stream] = number + 1
        return number

    def advance(self) -> None:
        """Go to the next step."""
        if torch.compiler.is_compiling():
            # Ints that change would have the graph compiled for each step; an operator finds them when it runs.
            self._local, self._replicated = _next_keys(self._number, self._device).unbind()
        else:
            self.set(self.step + 1)

    def reseed(self, seed: int, rank: int) -> None:
        """Take over seed and rank once they are known, which is when the ranks have met."""
        self.seed, self.rank = seed & SEED_MASK, rank
        self._make_keys()

    def local(self, device: torch.device) -> Tensor:
        """Key for what differs between ranks: activations and gradients. int64, shape (2,)."""
        self._move(device)
        return self._local

    def replicated(self, device: torch.device) -> Tensor:
        """Key for what all ranks hold alike and must round alike: weights. int64, shape (2,)."""
        self._move(device)
        return self._replicated

    def _make_keys(self) -> None:
        """Before a forward asks for them: in compiled code they are then inputs of the graph.

        New tensors, never in-place: a pending backward still holds the keys of its forward.
        """
        self._local, self._replicated = _tensors(*self._words(), self._device)

    def _words(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(local, replicated): what the keys are on every device."""
        # Rank 0 of the local keys must not coincide with the replicated one.
        local, replicated = (fold_words(self.seed, self.step, self.micro_step, rank) for rank in (self.rank + 1, 0))
        return local, replicated

    def _move(self, device: torch.device) -> None:
        if self._local.device != device:
            self._device = device
            if torch.compiler.is_compiling():
                self._local, self._replicated = self._local.to(device), self._replicated.to(device)
            else:
                self._make_keys()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What version 0.1 has pickled lacks these.
        self.__dict__.update({"full_forward_from": None, "quantizes_forward": True, "loss_share": 1.0, **state})
        self._calls, self._recomputes = None, False
        self._number = _enrol(self)


def _tensors(local: tuple[int, int], replicated: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys on a device. On others than the CPU they are sent as one table, and nobody waits for it."""
    on_cpu: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
    if device.type == "cpu":
        return torch.tensor(local, **on_cpu), torch.tensor(replicated, **on_cpu)
    table = torch.tensor((local, replicated), **on_cpu).to(device, non_blocking=True)
    first, second = table.unbind()
    return first, second


_step_keys: "weakref.WeakValueDictionary[int, StepKey]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _enrol(step_key: StepKey) -> int:
    number = next(_numbers)
    _step_keys[number] = step_key
    return number


def step_keys() -> list[StepKey]:
    """The step keys of all models in this process that are still alive."""
    return list(_step_keys.values())


_in_graphs: "weakref.WeakKeyDictionary[Any, dict[tuple[int, int], int]]" = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _number_in_graph(number: int, stream: int) -> int:
    """Called while code is traced: the number of the layer's call in that graph, where it is a constant. A count that
    is kept at run time would be an input that changes, or a side effect, which checkpointed regions may not have."""
    calls = _in_graphs.setdefault(torch._guards.TracingContext.get(), {})
    found = calls.get((number, stream), 0)
    calls[number, stream] = found + 1
    return found


# A CUDA graph would replay the keys of the step in which it was captured. torch has the tag since 2.9.
_TAGS = (torch.Tag.nondeterministic_seeded, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


@torch.library.custom_op("ds_quant::next_keys", mutates_args=(), tags=_TAGS)
def _next_keys(number: int, device: torch.device) -> Tensor:
    """Advances the StepKey of that number; its local and its replicated key, int64 [2, 2]."""
    step_key = _step_keys[number]
    step_key.advance()
    return torch.stack((step_key.local(device), step_key.replicated(device)))


@_next_keys.register_fake
def _(number: int, device: torch.device) -> Tensor:
    return torch.empty((2, 2), dtype=torch.int64, device=device)


class CountForwards:
    """Forward pre-hook of a model or a layer that no engine drives: every training forward is a step of its own.

    needs_engine: keys of `linear` that only an engine applies, and their values; with some, training is refused.
    """

    needs_engine: Mapping[str, Any] = MappingProxyType({})  # also of what version 0.1 has pickled

    def __init__(self, step_key: StepKey, needs_engine: dict[str, Any]):
        self.step_key = step_key
        self.needs_engine = needs_engine

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        if module.training and torch.is_grad_enabled():
            for key, value in self.needs_engine.items():
                raise _needs_engine(key, value)
            self.step_key.advance()
        self.step_key.begin_forward()


def count_forwards(module: torch.nn.Module, step_key: StepKey, config: LinearConfig) -> None:
    """Until an engine drives it, `module` counts its training forwards, if what `config` says depends on the step."""
    keys = _engine_keys(config)
    if keys or _draws_random_bits(config):
        module.register_forward_pre_hook(CountForwards(step_key, keys))


def remove_forward_counter(module: torch.nn.Module) -> None:
    """Stop a module from counting its own forwards, once an engine, or the model that it is part of, tells the step."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, CountForwards):
            del module._forward_pre_hooks[key]


def _draws_random_bits(config: LinearConfig) -> bool:
    operands = (config.weight, config.activation, config.gradient)
    drawn = config.rotation is not None and config.rotation.signs == "drawn"
    return drawn or any(x is not None and x.rounding != "nearest" for x in operands)


def _engine_keys(config: LinearConfig) -> dict[str, Any]:
    """The keys that only an engine applies, which knows optimizer steps, and their values."""
    reset = config.weight and config.weight.oscillation_reset
    found = {
        "forward_full_precision_from": config.forward_full_precision_from,
        "weight.oscillation_reset": reset.model_dump(exclude_unset=True) if reset else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _needs_engine(key: str, value: Any) -> ConfigError:
    return fail(
        f"ds_quant.linear.{key}",
        value,
        "training with an engine of DeepSpeed, which counts optimizer steps and has them in its checkpoints",
        "pass the model to ds_quant.initialize, or remove the key",
    )
