"""Triton kernels without a GPU: run by Triton's interpreter in a process of its own, or compiled for a GPU."""

import collections
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.version import Version

from benchmarks import gpus_way


def require_triton():
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the extra dev has triton for Linux on x86_64 only")
    assert importlib.util.find_spec("triton"), "triton is missing: pip install -e '.[dev]'"


def has_triton_from(*version):
    """Whether Triton is that new: its compilers take other registers and instructions."""
    import triton

    return Version(triton.__version__).release >= version


def run_in_interpreter(file):
    """Run the tests of a file; all must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout)
    assert "skipped" not in done.stdout


def compiler(kernel, monkeypatch, folder):
    """Compiles a launch of `kernel` exactly as if it were made on a GPU of a compute capability, or on an AMD one
    ("gfx942")."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))

    class Offline:
        def __init__(self, capability):
            self.capability = capability

        def get_current_target(self):
            if isinstance(self.capability, str):
                return GPUTarget("hip", self.capability, 64)
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self):
            return self.capability

        def get_current_stream(self, device):
            return 0

    def compile_launch(launch, capability):
        monkeypatch.setattr(triton.runtime.driver, "_active", Offline(capability))
        return kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)

    return compile_launch


def resources(cubin, folder):
    """Registers and bytes of stack and of spills to local memory of each thread, as cuobjdump names them."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True, timeout=200)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {name: int(count) for name, count in found.items()}


def accesses(ptx):
    """How often each width of access to global memory occurs: {"ld.v4.b32": 4, ...}."""
    found = re.findall(r"\b(ld|st)\.global(?:\.[a-z]+\w*::\w+)*\.((?:v[248]\.)?b\d+)", ptx)
    assert len(found) == len(re.findall(r"\b(?:ld|st)\.global", ptx))
    return collections.Counter(f"{kind}.{width}" for kind, width in found)


def compile_generated(code, folder, capability):
    """What Triton makes of each tile that Inductor would try for the kernels in its `code`: (tile, compiled)."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    target = GPUTarget("cuda", capability, 32)
    kernels = re.findall(
        r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", code, re.MULTILINE | re.DOTALL
    )
    assert kernels
    for number, (name, source) in enumerate(kernels):
        path = folder / f"generated_{number}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(triton_helpers, "set_driver_to_gpu"), gpus_way.driver(capability):
            spec.loader.exec_module(module)
            kernel = getattr(module, name)
            for tile in kernel.configs:
                kinds = {
                    argument: "constexpr" if argument in tile.kwargs else kind
                    for argument, kind in kernel.triton_meta["signature"].items()
                }
                constants = {(kernel.fn.arg_names.index(argument),): value for argument, value in tile.kwargs.items()}
                (attributes,) = kernel.triton_meta["configs"]
                launch = ASTSource(kernel.fn, kinds, constexprs=constants, attrs=attributes)
                options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
                yield tile, compile(launch, target=target, options=options)
