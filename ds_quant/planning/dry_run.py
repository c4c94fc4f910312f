"""Running code for its shapes alone: memory is asked for and given back as ever, but nothing large is computed.

Within a :class:`DryRun` every operator goes its usual way down to the kernel, so that DeepSpeed's, autograd's and this
package's own code allocates what it would. Instead of the kernel the operator's shape function runs (on torch's meta
device), and results are memory that no one writes to: a system hands out pages when they are written, so a model of
any size takes none.

Tensors whose values are known stay exact: what is small and made of known values alone is computed, so counters,
positions, masks and sizes that ranks compare are as they would be. What is *hollow*, random numbers, memory that is
not filled yet, anything large and whatever is computed from those, has no values. A single number computed from what
is hollow, a norm or a loss, is 1, and a single truth is False.
"""

import itertools
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ds_quant.base.errors import fail

KNOWN_BYTES = 16 * 2**20
"""Larger results are hollow whatever they are made of."""
_LARGE_BYTES = 2**30
_MAP_NORESERVE = 0x4000
"""Of Linux; Python 3.11's mmap does not name it."""

aten = torch.ops.aten
_ALIASES = (aten._unsafe_view.default,)
"""Operators that return their argument's memory without saying so."""
_FILLS = (aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
"""Operators after which all of their first argument is known, if the others are."""


class DryRun(TorchDispatchMode):
    """Context in which this thread's operators only allocate. Models of any size can be made and trained in it."""

    def __init__(self) -> None:
        super().__init__()
        self._hollow: Any = WeakIdKeyDictionary()
        self._known_shapes: dict[Any, tuple[Any]] = {}

    def is_hollow(self, tensor: Tensor) -> bool:
        """Whether the tensor has no values."""
        return tensor.untyped_storage() in self._hollow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not all(kind in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a subclass with its own operators calls this again with plain tensors
        inputs = list(tensors_in((args, kwargs)))
        if func.namespace == "c10d":
            return self._communicated(func, args, kwargs)
        fills = func in _FILLS and inputs[0].nbytes == inputs[0].untyped_storage().nbytes() <= KNOWN_BYTES
        known = not any(map(self.is_hollow, inputs[1:] if fills else inputs))
        if fills and known:
            self._hollow.pop(inputs[0].untyped_storage(), None)
            return func(*args, **kwargs)
        if func.is_view or func in _ALIASES or torch.Tag.inplace_view in func.tags or func.namespace == "profiler":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return func(*args, **kwargs) if known else _hollow_number(inputs[0].dtype)
        if kwargs.get("device") == torch.device("meta") or any(tensor.device.type == "meta" for tensor in inputs):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        empty = torch.Tag.nondeterministic_seeded in func.tags or name.startswith(("empty", "new_empty"))
        results = self._shapes(func, args, kwargs)
        sizes = sum(result.untyped_storage().nbytes() for result in tensors_in(results))
        if known and not empty and sizes <= KNOWN_BYTES:
            return func(*args, **kwargs)
        return self._allocated(func, args, kwargs, results)

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator returns, on the meta device. The same tensors again for arguments of the same shapes."""
        # As many operators of a model are alike as it has layers, and some shape functions are Python's.
        key = (func, _shapes_of((args, kwargs)))
        try:
            found = self._known_shapes.get(key)
        except TypeError:  # an argument that cannot be hashed
            return self._computed_shapes(func, args, kwargs)
        if found is None:
            found = self._known_shapes[key] = (self._computed_shapes(func, args, kwargs),)
        return found[0]

    def _computed_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        metas: dict[int, Tensor] = {}

        def meta(tensor: Tensor) -> Tensor:
            if id(tensor) not in metas:  # one argument in two places stays one
                metas[id(tensor)] = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
                )
            return metas[id(tensor)]

        args, kwargs = tree_map_only(Tensor, meta, (args, kwargs))
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs = {**kwargs, "device": "meta"}
            kwargs.pop("pin_memory", None)
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise fail(
                f"the operator {func}",
                f"no size without values ({reason})",
                "models whose memory does not depend on the data",
                "measure such a model with ds_quant diagnose memory",
            ) from error

    def _allocated(self, func: Any, args: Any, kwargs: Any, results: Any) -> Any:
        """Hollow memory for new results; arguments that the operator writes to are hollow from now on."""
        schema = func._schema
        written: dict[str, Any] = {}
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for name in argument.alias_info.before_set:
                written[name] = value
            for tensor in tensors_in(value):
                self._hollow[tensor.untyped_storage()] = True
        single = len(schema.returns) == 1
        answers = []
        for declared, result in zip(schema.returns, [results] if single else results or (), strict=True):
            if declared.alias_info is None:
                answers.append(tree_map_only(Tensor, self._hollow_like, result))
            else:
                answers.append(next(written[name] for name in declared.alias_info.before_set))
        if not answers:
            return None
        return answers[0] if single else tuple(answers)

    def _communicated(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A collective: done by the process group on known tensors, as a group of equal ranks does it."""
        tensors = [list(tensors_in(part)) for part in args]
        results, *sources = [found for found in tensors if found] or [[]]
        if not any(map(self.is_hollow, itertools.chain(*sources or [results]))):
            for tensor in results:
                self._hollow.pop(tensor.untyped_storage(), None)
            return func(*args, **kwargs)
        for tensor in results:
            self._hollow[tensor.untyped_storage()] = True
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _hollow_like(self, meta: Tensor) -> Tensor:
        if meta.numel() == 1:
            return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype).fill_(meta.dtype != torch.bool)
        tensor = _unwritten(meta)
        self._hollow[tensor.untyped_storage()] = True
        return tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, which is all that operators take and return."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def _shapes_of(value: Any) -> Any:
    """Arguments of an operator as a key: tensors by what a shape function sees of them, and which of them are one."""
    numbers: dict[int, int] = {}

    def seen(value: Any) -> Any:
        if isinstance(value, Tensor):
            number = numbers.setdefault(id(value), len(numbers))
            return Tensor, number, value.size(), value.stride(), value.dtype
        if isinstance(value, tuple | list):
            return type(value), *map(seen, value)
        if isinstance(value, dict):
            return dict, *((name, seen(item)) for name, item in value.items())
        return type(value), value  # 1, 1.0 and True are equal

    return seen(value)


def _unwritten(meta: Tensor) -> Tensor:
    """Memory of the shape, strides and dtype of `meta`, more than the machine has if need be."""
    size = meta.untyped_storage().nbytes()
    if size < _LARGE_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype)
    # Linux refuses a mapping larger than its memory unless MAP_NORESERVE is set.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=meta.dtype).as_strided(meta.size(), meta.stride())


def _hollow_number(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1
