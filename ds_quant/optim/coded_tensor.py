"""Tensors whose elements are stored as something else, and answer as if they were plain.

DeepSpeed's checkpoints, universal checkpoints and `safe_get_full_*` detach, narrow, copy and pickle what they find in
an optimizer. A `CodedTensor` answers so that nothing is lost where the whole tensor is meant, and that a write to a
part reaches what is stored:

    detach, view, slice, select, split, t, ...   a window on the same storage, as torch's views are
    clone, to(device), pickle, deepcopy          of a whole tensor: what is stored, as it is; of a window: plain fp32
    zeros_like, empty_like                       plain tensors
    copy_, fill_, every other in-place op        what the window touches is decoded, changed, and encoded
    everything else                              computed on the decoded values; what comes out is plain
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_TO_PYTHON = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Methods for which torch wants memory."""


class CodedTensor(Tensor):
    """A tensor of a subclass's storage, of which shape, strides and `start` select the elements.

    Attributes:
        start: the storage offset of a window; 0 for a whole tensor.
        whole: whether all elements are there, in order: a window is not.
    """

    # Plain attributes, since every method of a tensor subclass goes through __torch_function__.
    start: int
    whole: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def dequantize(self) -> Tensor:
        """The values as a new plain fp32 tensor of the same shape and strides."""
        raise NotImplementedError

    def overwrite(self, values: Tensor) -> None:
        """Put `values`, of the same shape, in place of these."""
        raise NotImplementedError

    def copy_stored(self, source: Tensor) -> bool:
        """Take over what `source` stores, if it has the same format; whether it has."""
        raise NotImplementedError

    def set_data(self, value: Tensor) -> None:
        """What `self.data = value` does."""
        raise NotImplementedError

    def stored_numel(self) -> int:
        """Elements of the whole tensor that this is a window of."""
        raise NotImplementedError

    def window(self, view: Tensor) -> "CodedTensor":
        """The window with the geometry of `view`."""
        raise NotImplementedError

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "CodedTensor":
        """A whole tensor of what `change` makes of each stored tensor."""
        raise NotImplementedError

    def stored(self) -> Sequence[Tensor]:
        """The stored tensors."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and isinstance(args[0], CodedTensor) and _names_a_dtype(args[1:], kwargs):
            # torch returns the tensor itself where dtype and device agree already; a cast is asked for by a plain
            # optimizer that loads the state, which must own plain values.
            return args[0].dequantize().to(*args[1:], **kwargs)
        if func in _TO_PYTHON and isinstance(args[0], CodedTensor):
            args = (args[0].dequantize(), *args[1:])
        if func == SET_DATA and isinstance(args[0], CodedTensor):
            return args[0].set_data(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _window if func.is_view else _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], CodedTensor):
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_values(func, args, kwargs)


def _names_a_dtype(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(value, torch.dtype | Tensor) for value in (*args, *kwargs.values()))


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on dequantized values, and put back what it wrote."""
    plain: dict[int, tuple[CodedTensor, Tensor]] = {}

    def values_of(tensor: CodedTensor) -> Tensor:
        if id(tensor) not in plain:
            plain[id(tensor)] = (tensor, tensor.dequantize())
        return plain[id(tensor)][1]

    result = func(*tree_map_only(CodedTensor, values_of, args), **tree_map_only(CodedTensor, values_of, kwargs))
    written: set[int] = set()
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for item in given if isinstance(given, list | tuple) else [given]:
                if isinstance(item, CodedTensor):
                    written.add(id(item))
    changed = [plain[number] for number in written]
    for tensor, values in changed:
        if values.shape != tensor.shape or values.stride() != tensor.stride():
            raise NotImplementedError(
                f"{type(tensor).__name__}: got {func}, which changes the shape in place; allowed: other operations; "
                "fix: take the operation without underscore"
            )
    for tensor, values in changed:
        tensor.overwrite(values)
    if not written:
        return result
    back = {id(values): tensor for tensor, values in plain.values()}
    return tree_map_only(Tensor, lambda out: back.get(id(out), out), result)


def _window(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, or several: torch works its geometry out on a tensor without data."""
    whole = args[0]
    blank = torch.empty(whole.stored_numel(), dtype=whole.dtype, device="meta")
    views = func(blank.as_strided(whole.shape, whole.stride(), whole.start), *args[1:], **kwargs)
    if isinstance(views, Tensor) and views.dtype != whole.dtype:
        return NotImplemented
    return tree_map_only(Tensor, whole.window, views)


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].mapped(Tensor.clone) if args[0].whole else NotImplemented


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, dtype = args[0], kwargs.get("dtype")
    if not tensor.whole or dtype not in (None, tensor.dtype):
        return NotImplemented
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    if device is None:
        return tensor.mapped(Tensor.clone)
    return tensor.mapped(lambda stored: stored.to(device, non_blocking=non_blocking, copy=True))


def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not target.copy_stored(source):
        target.overwrite(source.dequantize() if isinstance(source, CodedTensor) else source)
    return target


def _zeros_like(func: Any, args: Any, kwargs: Any) -> Any:
    options = {"dtype": args[0].dtype, "device": args[0].device, **{k: v for k, v in kwargs.items() if v is not None}}
    options.pop("memory_format", None)
    return (torch.zeros if func is aten.zeros_like.default else torch.empty)(args[0].shape, **options)


def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].stored()[0].is_pinned()


def _pin(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].mapped(Tensor.pin_memory) if args[0].whole else NotImplemented


_HANDLERS = {
    aten._unsafe_view.default: _window,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.zeros_like.default: _zeros_like,
    aten.empty_like.default: _zeros_like,
    aten.is_pinned.default: _is_pinned,
    aten._pin_memory.default: _pin,
}
