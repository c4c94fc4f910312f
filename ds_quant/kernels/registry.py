"""Which operations there are, and which backend does each of them on a device.

An operation is declared once, in `ops.py` in its family's folder: name, arguments and checks are those of a function;
beside it stand its definition (`reference`) and, where torch.compile keeps it whole, the shapes of its results. A
backend's implementations stand in `<family>/<backend>.py`, which is imported when a device first asks for one:

    @ops.quantize_rows.by("cpu")
    def quantize_rows(x, levels, *, column_scale=None, key=None): ...

It takes the operation's arguments by their names, and they have been checked. That file is all that a backend needs to
take over an operation; those that it leaves out stay with the next backend, and in the end with the reference.

A device takes the backend that DS_QUANT_KERNELS names (see `choice`), else the first of BACKENDS that serves its type,
has the operation and can be used here. `report` says which that is.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from ds_quant.base.log import warn
from ds_quant.kernels import native, operators
from ds_quant.kernels.choice import CHOICES, REFERENCE, VARIABLE, check_choice
from ds_quant.kernels.spans import span

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Family(NamedTuple):
    """Operations that share a folder."""

    package: str
    title: str
    """In reports."""
    caller: str
    """Who takes another kernel where the chosen backend cannot serve."""
    without_cpp: str
    """What happens where the C++ kernels cannot be built."""


class Backend(NamedTuple):
    """A way to run operations: `name` is what implementations register under, and their file in a family's folder."""

    name: str
    devices: tuple[str, ...]
    """Types of device that it serves."""
    by_choice: bool = False
    """Whether it serves only where DS_QUANT_KERNELS names it."""
    is_usable: Callable[[Family], bool] = lambda family: True
    """Asked once for each family; where it answers no, it has warned of it."""
    describe: Callable[[], str] | None = None
    """For reports; None: the module of the implementation."""


def _has_triton(family: Family) -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warn(f"{VARIABLE}=triton: {family.caller} takes another kernel, because triton is not installed")
    return False


def _runs_triton(family: Family) -> bool:
    """Whether the device has integer tensor cores that Triton uses, and 96 KiB of shared memory for a program."""
    if importlib.util.find_spec("triton") is None or torch.version.hip:
        return False
    # Where there is no GPU, tests and reports ask what would serve one.
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


BACKENDS = [
    Backend("triton", ("cuda",), by_choice=True, is_usable=_has_triton),
    Backend(
        "cpu",
        ("cpu",),
        is_usable=lambda family: native.is_usable(family.without_cpp),
        describe=lambda: f"C++ {native.isa()}",
    ),
    Backend("cuda", ("cuda",), is_usable=_runs_triton),
    Backend("compiled", ("cuda",)),
    Backend("aten", ("cpu", "cuda")),
]
"""In the order in which they are asked."""
FAMILIES = ("adamw", "elementwise", "masters", "int8", "fp8", "simulated", "wire")


class Operation(Generic[P, R]):
    """A function that checks its arguments and hands them to the implementation that serves their device."""

    def __init__(
        self,
        family: Family,
        function: Callable[P, R],
        reference: Callable[..., R],
        shapes: Callable[P, R] | None,
        profiled: bool,
        backends_only: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__
        self.family = family
        self.reference = reference
        self.implementations: dict[str, Callable[..., R]] = {}
        self._function = function
        self._profiled = profiled
        self._backends_only = backends_only
        self.operator: Any = None
        """torch.ops.ds_quant.<name>, which a graph holds as one node; it never alters its arguments."""
        if shapes is not None:
            schema = torch.library.infer_schema(function, mutates_args=())
            # It runs outside of compilation, and so comes back to the function.
            self.operator = operators.define(self, shapes, schema=schema)
        _declared.setdefault(family, []).append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.operator is not None and torch.compiler.is_compiling():
            return self.operator(*args, **kwargs)
        if not self._profiled:
            return self._function(*args, **kwargs)
        with span(self.name):
            return self._function(*args, **kwargs)

    def by(self, backend: str) -> Callable[[F], F]:
        """Registers a function as the implementation of a backend."""

        def register(function: F) -> F:
            self.implementations[backend] = function
            _serving.cache_clear()
            return function

        return register

    def on(self, device: torch.device) -> Callable[..., R]:
        """The implementation that serves a device. Raises ConfigError for a DS_QUANT_KERNELS that there is not."""
        return _serving(self, device.type, os.environ.get(VARIABLE, ""))[1]

    def after(self, backend: str, device: torch.device) -> Callable[..., R]:
        """The implementation that would serve a device if there were no such backend: for what one cannot do."""
        return _serving(self, device.type, os.environ.get(VARIABLE, ""), backend)[1]

    def is_called(self, device: torch.device | str) -> bool:
        """Whether reports name it."""
        return not self._backends_only or self.implementation(device) != REFERENCE

    def implementation(self, device: torch.device | str) -> str:
        """What serves a device, for reports. Builds the C++ kernels if that has not been done."""
        kind = torch.device(device).type
        backend, function = _serving(self, kind, os.environ.get(VARIABLE, ""))
        if backend is None:
            return REFERENCE
        return f"{kind}: {backend.describe() if backend.describe else function.__module__}"


_declared: dict[Family, list[Operation]] = {}


def operation(
    family: Family,
    *,
    reference: Callable[..., R],
    shapes: Callable[P, R] | None = None,
    profiled: bool = False,
    backends_only: bool = False,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Declares a function as an operation; it calls `<its name>.on(device)` once it has checked what it is given.

    reference: the definition, for devices without a backend. shapes: gives empty results; with it the operation is
        torch.ops.ds_quant.<name>, by the function's annotations, and torch.compile keeps it whole. profiled: whether
        torch.profiler shows calls as ``ds_quant::<name>``. backends_only: whether nothing calls it on devices where no
        backend has it, so that reports leave it out there.
    """
    return lambda function: Operation(family, function, reference, shapes, profiled, backends_only)


def add_backend(backend: Backend) -> None:
    """Let a backend serve before those that are known; its name can be chosen if it serves by choice only."""
    BACKENDS.insert(0, backend)
    if backend.by_choice and backend.name not in CHOICES:
        CHOICES.append(backend.name)
    _serving.cache_clear()


def report(device: torch.device | str) -> list[tuple[str, str]]:
    """For each family that is called on a device, its title and what serves its operations."""
    lines = []
    for name in FAMILIES:
        family = importlib.import_module(f"ds_quant.kernels.{name}.ops").FAMILY
        served: dict[str, list[str]] = {}
        for each in (each for each in _declared[family] if each.is_called(device)):
            served.setdefault(each.implementation(device), []).append(each.name)
        only_one = len(served) == 1
        texts = [text if only_one else f"{text} ({', '.join(names)})" for text, names in served.items()]
        if texts:
            lines.append((family.title, "; ".join(texts)))
    return lines


@functools.cache
def _serving(
    asked: Operation, kind: str, choice: str, without: str | None = None
) -> tuple[Backend | None, Callable[..., Any]]:
    """The backend and its function; None is the reference. Only the environment is read on every call."""
    check_choice(choice)
    if choice == REFERENCE:
        return None, asked.reference
    serving = [backend for backend in BACKENDS if kind in backend.devices]
    # One that would serve anyway is named to leave out those before it.
    named = [number for number, backend in enumerate(serving) if backend.name == choice and not backend.by_choice]
    serving = serving[named[0] :] if named else serving
    for backend in sorted(serving, key=lambda backend: not backend.by_choice):
        if backend.name == without or (backend.by_choice and backend.name != choice):
            continue
        if backend.name not in asked.implementations and not _has_file(asked.family, backend.name):
            continue
        if _is_ready(asked.family, backend) and backend.name in asked.implementations:
            return backend, asked.implementations[backend.name]
    return None, asked.reference


def _has_file(family: Family, name: str) -> bool:
    return importlib.util.find_spec(f"{family.package}.{name}") is not None


@functools.cache
def _is_ready(family: Family, backend: Backend) -> bool:
    """Whether a backend can be used here; what its file registers for the family is registered then."""
    if not backend.is_usable(family):
        return False
    if _has_file(family, backend.name):
        importlib.import_module(f"{family.package}.{backend.name}")
    return True
