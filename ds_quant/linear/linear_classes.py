"""Which classes of modules can be quantized, and as what.

A class takes part if its products are known to be x Wᵀ + b: nn.Linear, transformers' Conv1D, what
:func:`register_module` was given, their subclasses that keep the forward, and subclasses whose own forward computes the
same: those of `SAME_PRODUCTS`, and those that `linear.include_classes` names. The latter two are tried on a tiny copy,
which can refute the claim; it never makes one.
"""

import functools
import importlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.config import ConfigError
from ds_quant.linear.modules import QuantizedModule, QuantLinear

_CONV1D = "transformers.pytorch_utils.Conv1D"

# By qualified name where importing the class would import a whole library for models that do not have it.
_registry: dict[type | str, type | str] = {
    nn.Linear: QuantLinear,
    _CONV1D: "ds_quant.linear.conv1d:QuantConv1D",
}

SAME_PRODUCTS = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
"""Subclasses of nn.Linear whose forward is their own and computes x Wᵀ + b. Read, and tested against F.linear."""

# Their owner multiplies by the weight itself and never calls them.
_NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


def register_module(cls: type[nn.Module], quantized_cls: type[QuantizedModule]) -> None:
    """Have :func:`ds_quant.convert` turn modules whose exact type is `cls` into `quantized_cls`.

    `quantized_cls` derives from both :class:`QuantizedModule` and `cls`, needs nothing that `cls.__init__` does not
    set, and calls `quantized_forward` for its product.

    Raises:
        ConfigError: `quantized_cls` does not derive from both.
    """
    if not (issubclass(quantized_cls, QuantizedModule) and issubclass(quantized_cls, cls)):
        raise ConfigError(
            f"register_module: got {quantized_cls.__name__} for {cls.__name__}; allowed: a class that derives from "
            f"QuantizedModule and from {cls.__name__}; fix: class {quantized_cls.__name__}(QuantizedModule, "
            f"{cls.__name__})"
        )
    _registry[cls] = quantized_cls


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _registered(cls: type) -> type[QuantizedModule] | None:
    target = _registry.get(cls) or _registry.get(_path(cls))
    if isinstance(target, str):
        path, name = target.split(":")
        target = getattr(importlib.import_module(path), name)
    return target


def _linear_base(cls: type) -> type | None:
    """nn.Linear or Conv1D, where `cls` is one of them or derives from it."""
    return next((base for base in cls.__mro__ if base is nn.Linear or _path(base) == _CONV1D), None)


def is_named(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether `names` has the class of `module`, by name or dotted path."""
    cls = getattr(type(module), "quantized_from", type(module))
    return any(name in (cls.__name__, _path(cls)) for name in names)


def quantized_class(module: nn.Module, include_classes: Iterable[str] = ()) -> type[QuantizedModule] | None:
    """The class that `module` is given by conversion, None where its products are not known."""
    if obstacle(module, include_classes):
        return None
    cls: type = type(module)
    found = _registered(cls)
    base = _linear_base(cls)
    return found if found or base is None else _subclass(cls, base)


def obstacle(module: nn.Module, include_classes: Iterable[str] = ()) -> str | None:
    """Why `module` cannot be quantized, in words; None where it can."""
    cls = type(module)
    base = _linear_base(cls)
    if base is None and not _registered(cls):
        return f"{cls.__name__} is no subclass of nn.Linear or of transformers' Conv1D: ds_quant.register_module"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, which a conversion would not reach"
    if _registered(cls):
        return None
    assert base is not None
    if isinstance(module, _NEVER_CALLED):
        return "its owner (nn.MultiheadAttention) multiplies by the weight itself"
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return f"{cls.__name__} has no Parameter `weight` (yet)"
    if cls.forward is base.forward:  # type: ignore[attr-defined]
        return None
    if not is_named(module, (*SAME_PRODUCTS, *include_classes)):
        return (
            f"{cls.__name__} has a forward of its own: name it in ds_quant.linear.include_classes if that computes "
            "what its base class does, else ds_quant.register_module"
        )
    return _refuted(module, base)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, quantized, one that could be, or a subclass of one."""
    return isinstance(module, QuantizedModule) or bool(_linear_base(type(module)) or _registered(type(module)))


def check_included(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ConfigError for an entry of `include_classes` that no module has, or whose modules cannot be converted."""
    where = "ds_quant.linear.include_classes"
    modules = list(model.modules())
    for name in names:
        found = next((module for module in modules if is_named(module, [name])), None)
        if found is None:
            kinds = {type(m).__name__ for m in modules if _linear_base(type(m)) and not isinstance(m, QuantizedModule)}
            allowed = "classes of this model's modules, by name or dotted path"
            listed = f"; its linear layers are of type {', '.join(sorted(kinds))}" if kinds else ""
            raise fail(where, name, allowed + listed, "correct the name, or remove it")
        if not isinstance(found, QuantizedModule) and (reason := obstacle(found, [name])):
            allowed = f"subclasses of nn.Linear or Conv1D that compute what these do ({reason})"
            raise fail(where, name, allowed, "remove it, or give its quantized class to ds_quant.register_module")


# ---- subclasses


class _QuantizedSubclass(QuantizedModule):
    """Mixed into a subclass of nn.Linear or Conv1D that computes what its base does."""

    quantized_from: type

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_forward(input)

    def __reduce__(self) -> tuple:
        # Pickle looks classes up by name, and these are made on the fly.
        return _empty, (self.quantized_from,), self.__dict__


@functools.cache
def _subclass(cls: type, base: type) -> type[QuantizedModule]:
    members = {"quantized_from": cls, "transposed": base is not nn.Linear, "__module__": __name__}
    return type(f"Quant{cls.__name__}", (_QuantizedSubclass, cls), members)


def _empty(cls: type) -> nn.Module:
    base = _linear_base(cls)
    assert base is not None
    quantized = _subclass(cls, base)
    return quantized.__new__(quantized)


def _refuted(module: nn.Module, base: type) -> str | None:
    """What shows, on a copy with a weight of 16 x 32, that the forward of `module` is not that of `base`."""
    cls = type(module)
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu")
    tiny: nn.Module = cls.__new__(cls)
    tiny.__dict__.update(nn.Module().__dict__ | {k: v for k, v in module.__dict__.items() if k not in _OF_MODULES})
    tiny._modules = dict(module._modules)
    weight = draw(16, 32) if base is nn.Linear else draw(32, 16)
    tiny._parameters = {**module._parameters, "weight": nn.Parameter(weight)}
    bias = module._parameters.get("bias")
    tiny._parameters["bias"] = None if bias is None else nn.Parameter(draw(16))
    sizes = ("in_features", "out_features") if base is nn.Linear else ("nx", "nf")
    tiny.__dict__.update(zip(sizes, (32, 16), strict=True))
    x = draw(2, 3, 32)
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
            for training in (True, False):
                tiny.training = training
                got, wanted = cls.forward(tiny, x), base.forward(tiny, x)  # type: ignore[attr-defined]
                if not isinstance(got, Tensor) or got.shape != wanted.shape or not torch.allclose(got, wanted):
                    return f"the forward of {cls.__name__} gives something else: ds_quant.register_module"
    except Exception as error:
        return f"the forward of {cls.__name__} fails on a weight of 16 x 32 ({error}): ds_quant.register_module"
    return None


_OF_MODULES = frozenset(nn.Module().__dict__)
