"""What Inductor generates for a GPU that is not there: its Triton kernels, its calls, and the bytes that they move.

A build of torch for CPUs generates that code, but cannot trace a backward on a CUDA device, as its autograd has no
guard for one. So a function is traced on the CPU; then its graphs, forward and backward, are moved to a CUDA device of
fake tensors, and lowered, scheduled and fused as for a card of a compute capability. Nothing is compiled by Triton, and
nothing runs. Attention takes other operators on CPUs than on GPUs: leave it out of what is traced.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import generated_fp8, gpus_way, internals
from ds_quant.kernels.adamw.compiled import adamw_ as compiled_adamw_
from ds_quant.kernels.launching import Launch

_WHAT = "generated code"
_INTERNALS = {
    "torch._dynamo.device_interface": [f"CudaInterface.{name}" for name in ("is_available", "Worker.current_device")],
    "torch._functorch.config": ["force_non_lazy_backward_lowering", "enable_autograd_cache"],
    "torch._inductor.compile_fx": ["compile_fx", "compile_fx_inner"],
    "torch._inductor.config": ["fx_graph_cache", "fx_graph_remote_cache", "compile_threads"],
    "torch._inductor.fx_passes.joint_graph": ["lazy_init"],
    "torch._inductor.fx_passes.post_grad": ["lazy_init"],
    "torch._inductor.graph": ["GraphLowering._compile_to_module_lines", "GraphLowering.count_bytes"],
    "torch._subclasses.fake_tensor": ["FakeTensor", "init_gpu_context"],
    "torch.cuda": ["_exchange_device", "_maybe_exchange_device"],
    "torch.fx.passes.fake_tensor_prop": ["FakeTensorProp.propagate_dont_convert_inputs"],
    "torch.utils._python_dispatch": ["_disable_current_modes", "TorchDispatchMode"],
    "torch.utils._triton": ["has_triton.cache_clear"],
    **gpus_way.INTERNALS,
}
"""What is replaced here, or asked for."""
_DEVICE = torch.device("cuda", 0)
_CARDS = {
    90: types.SimpleNamespace(
        name="H100",
        gcnArchName="H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=227 * 1024,
        L2_cache_size=50 * 2**20,
        total_memory=80 * 2**30,
    )
}
"""By compute capability, as torch.cuda.get_device_properties names what Inductor asks for."""


class Graph(NamedTuple):
    """A forward or a backward."""

    kernels: list[str]
    """Inductor's own, by name, in the order of their launches."""
    libraries: list[str]
    """Products and the like: ``mm``; ``_scaled_mm`` of fp8 layers, and the copies that turn its operands: ``clone``."""
    operators: list[str]
    """What stays opaque: ``ds_quant.quantize_operand``."""
    operator_launches: list[str]
    """Kernels that ours of these launch."""
    num_bytes: int
    """What all of them read and write, each tensor once a kernel, as Inductor's scheduler has it."""
    code: str

    @property
    def launches(self) -> int:
        """With one launch for each call of a library."""
        return len(self.kernels) + len(self.libraries) + len(self.operator_launches)


class _Generated(Exception):
    """Thrown where the generated code would run."""


def generate(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Graph]:
    """The graphs of `torch.compile(function)(*inputs)`, tensors on the CPU: forward, and backward if one is needed.

    options: Inductor's, such as emulate_precision_casts. Int8 layers take the way that they take on a GPU.
    """
    with recording(**options) as (found, backend):
        torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    return found


@contextmanager
def recording(capability: int = 90, **options: Any) -> Iterator[tuple[list[Graph], Callable[..., Any]]]:
    """A list and a backend of torch.compile that adds graphs to it. The `with` block ends where one would run.

    Raises CommandError on a torch whose Inductor works otherwise.
    """
    internals.require(_WHAT, _INTERNALS)
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    found: list[Graph] = []

    def lower(graph: torch.fx.GraphModule, inputs: list[Any], **more: Any) -> Any:
        moved = _move(graph, inputs)
        ours = [name for node in graph.graph.nodes for name in _launches(node)]
        torchs = [call for node in graph.graph.nodes for call in generated_fp8.calls(node)]
        with _card(capability, lambda lowered, code: found.append(_read(lowered, code, ours, torchs))):
            return compile_fx_inner(graph, moved, **more)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=lower)

    torch.compiler.reset()
    with internals.blamed(_WHAT):
        with (
            suppress(_Generated),
            gpus_way.on_cpu(compiled_adamw_),
            functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
            config.patch(fx_graph_cache=False, fx_graph_remote_cache=False, compile_threads=1, **options),
        ):
            yield found, backend
        if not found:
            raise RuntimeError("Inductor generated no code")
    torch.compiler.reset()


def _move(graph: torch.fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """Move a graph and what it is given, fake tensors, to the CUDA device."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": _DEVICE}
    graph.recompile()
    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_DEVICE) if isinstance(x, Tensor) else x
            for x in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


def _launches(node: torch.fx.Node) -> list[str]:
    """The kernels that a node launches if it is an operation of int8 layers."""
    called = [each for each in gpus_way.INT8 if node.target is getattr(torch.ops.ds_quant, each.name).default]
    from torch.utils._python_dispatch import _disable_current_modes

    found: list[str] = []

    def run(launch: Launch, device: torch.device) -> None:
        found.append(launch.kernel.fn.__name__)

    with _disable_current_modes(), gpus_way.launching(run):  # the modes are those of tracing
        for operation in called:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), _empty)
            operation.implementations["triton"](**inspect.signature(operation).bind(*args, **kwargs).arguments)
    return found


def _empty(node: torch.fx.Node) -> Tensor:
    fake = node.meta["val"]
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)


def _read(lowered: Any, code: str, launches: list[str], torchs: list[generated_fp8.Called]) -> Graph:
    """What a generated module calls."""
    calls = r"^ +(?:\w+ = )?(?:(\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.(\w+\.\w+)\.\w+\()"
    found = re.findall(calls, code, re.MULTILINE)
    kernels, libraries, operators = ([match[number] for match in found if match[number]] for number in range(3))
    # What an operator is given and gives is in Inductor's count, what it copies for itself is not.
    num_bytes: int = lowered.count_bytes()[0] + sum(call.copied_bytes for call in torchs)
    return Graph(kernels, libraries + [call.name for call in torchs], operators, launches, num_bytes, code)


@contextmanager
def _card(capability: int, take: Callable[[Any, str], object]) -> Iterator[None]:
    """Within it torch sees a card; `take` gets each lowered graph and its code, in place of a module that is loaded."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import fake_tensor
    from torch.utils import _triton

    properties = _CARDS[capability]

    def load(lowered: Any, code: Any) -> Any:
        take(lowered, code.value)
        return types.SimpleNamespace(call=_throw, __file__="", __name__="")

    asked: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
    }
    more: dict[str, Any] = {
        "get_device_capability": lambda *_: divmod(capability, 10),
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.empty(0),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    # Patterns are traced by example: on a CUDA device that would need one. Called as Inductor does for a graph on the
    # CPU, since what is called otherwise is registered again, which it refuses.
    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()
    with ExitStack() as stack:
        stack.callback(_triton.has_triton.cache_clear)
        stack.enter_context(mock.patch.multiple(torch.cuda, **asked, **more))
        static: dict[str, Any] = {name: staticmethod(function) for name, function in asked.items()}
        stack.enter_context(mock.patch.multiple(CudaInterface, **static))
        worker: dict[str, Any] = {name: static[name] for name in ("current_device", "get_device_properties")}
        stack.enter_context(mock.patch.multiple(CudaInterface.Worker, **worker))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        for patterns in (joint_graph, post_grad):
            stack.enter_context(mock.patch.object(patterns, "lazy_init"))
        stack.enter_context(mock.patch.object(GraphLowering, "_compile_to_module_lines", load))
        stack.enter_context(gpus_way.driver(capability))
        _triton.has_triton.cache_clear()
        yield


def _throw(*_: Any) -> None:
    raise _Generated
