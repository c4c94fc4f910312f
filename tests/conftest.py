"""What all tests share: where DeepSpeed's op is built, and a process group of one rank for tests within pytest."""

import functools
import gc
import importlib
import os
import random
import signal
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from ds_quant.base.process_group import free_port

ROOT = Path(__file__).resolve().parents[1]

# A folder of the project's own: a build that is killed must not leave its lock in the user's cache.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# How many examples hypothesis draws for each test: `full` unless --hypothesis-profile names another. No deadlines: the
# first example may import torch or compile a kernel, and machines are shared.
hypothesis.settings.register_profile("full", max_examples=175, deadline=None)
hypothesis.settings.register_profile("quick", max_examples=50, deadline=None)
hypothesis.settings.load_profile("full")


PATIENCE = 3
"""How many times its time-out a test has, and what it waits for. Time-outs are there for what hangs; a shared machine
with a cold disk has needed twice the usual time for all tests, and for the first ranks six times theirs."""

LONGEST_FIRST = (
    "test_slurm_survival.py",
    "distributed",
    "test_slurm_sweep.py",
    "launchers",
    "benchmarks",
    "test_launch_ways.py",
    "cli",
    "kernels",
    "diagnostics",
)
"""Files and folders whose tests begin first where several processes share the suite: what is left at the end should be
short. Those with a Slurm cluster, of which there is one at a time, wait more than they compute and stand apart."""


NEEDS_GPU = "needs a GPU"
"""The reason of skipif where a test needs one: it is marked `gpu` then."""


@pytest.hookimpl(tryfirst=True)  # -m selects by marks: they must be there
def pytest_collection_modifyitems(items):
    """Mark what needs a GPU, skip it without one, have PATIENCE, and order the files by LONGEST_FIRST."""
    mark_gpu_tests(items)
    for item in items:
        timeout = item.get_closest_marker("timeout")
        seconds = timeout.args[0] if timeout else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(PATIENCE * seconds), append=False)

    def rank(item):
        names = (item.path.name, item.path.parent.name)
        return next((LONGEST_FIRST.index(name) for name in names if name in LONGEST_FIRST), len(LONGEST_FIRST))

    items.sort(key=rank)


def pytest_collection_finish():
    """What is imported and collected stays to the end: garbage collections, of which engines ask for many, skip it."""
    gc.freeze()


def mark_gpu_tests(items):
    """`gpu` for what is skipped without a GPU, and the other way round: either way of saying so is enough."""
    for item in items:
        if any(mark.kwargs.get("reason") == NEEDS_GPU for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")
        elif item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


@functools.cache
def _has_gpu():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty documents in a .jsonl, to read only."""
    from helpers.samples import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents.jsonl")


@pytest.fixture(scope="session")
def token_shards(corpus, tmp_path_factory) -> Path:
    """The same as `tokenize_corpus.py` leaves it, a fifth for validation; to read only."""
    import tokenize_corpus

    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    flags = ["--train_file", corpus, "--vocab_size", "320", "--validation_fraction", "0.2", "--output_dir", folder]
    assert tokenize_corpus.main([str(word) for word in flags]) == 0
    return folder


@pytest.fixture(autouse=True)
def _signals_as_before():
    """launchers/pretrain.py ignores signals at its end, and children of a process that does ignore them, too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _threads_as_before():
    """Commands set torch's number of threads for their process. With two, where other tests take the second core, what
    follows them waits for threads in every operation: a test of 0.8 s took 19."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else int(os.environ["OMP_NUM_THREADS"])
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture
def single_rank(monkeypatch):
    """The environment that a launcher gives a job of one rank."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    _forget_ended_group()


def _forget_ended_group():
    """Where a test has ended the process group of this process, have DeepSpeed begin anew, too."""
    if "deepspeed" in sys.modules and not sys.modules["torch"].distributed.is_initialized():
        from deepspeed import comm
        from deepspeed.utils import groups

        if hasattr(groups, "_release_process_group_references"):
            groups._release_process_group_references()
        else:  # an older DeepSpeed, whose module holds nothing else
            importlib.reload(groups)
        comm.comm.cdb = None


@pytest.fixture
def rng():
    """Fresh at every run; a failure prints the seed, and DS_QUANT_TEST_SEED repeats it."""
    seed = int(os.environ.get("DS_QUANT_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"DS_QUANT_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def quantizer_calls(monkeypatch):
    """Calls of the quantizers of weights and inputs, by name."""
    from ds_quant.linear import modules

    calls = {"quantize_weight": 0, "quantize_input": 0}

    def counting(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(modules, name, counting(name, getattr(modules, name)))
    return calls


@pytest.fixture
def with_integer_units(monkeypatch):
    """As on a processor where torch._int_mm is the faster way; elsewhere exact products in fp32 take its place."""
    from ds_quant.kernels.int8 import aten, cpu_parts
    from ds_quant.kernels.integer_units import IntegerUnits

    units = IntegerUnits(is_exact=True, names="", speed=2.0)
    for module in (aten, cpu_parts):
        monkeypatch.setattr(module, "integer_units", lambda device: units)
