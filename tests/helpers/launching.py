"""Starts programs the way users do, with a time-out that leaves nothing running."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, free_port

PROGRAMS = ROOT / "tests" / "distributed"
WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
"""For processes that compile nothing. DeepSpeed imports torch's compiler else, which is a fifth of a rank's start."""


def launch(command, *, timeout, env=None, cwd=ROOT, check=True):
    """Run a command in a process group of its own; (exit status, output). Kills all of it after `timeout` seconds."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=_environment(env),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end within {timeout} s:\n{output}") from None
    finally:
        _remove_shared_memory(command)
    if check:
        assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{output}"
    return process.returncode, output


def run_ranks(program, *arguments, ranks=2, timeout, env=None, cwd=ROOT, check=True):
    """Run a program on ranks that are forked from a process with all imports done; (exit status, output).

    For programs that test what ranks do. `launch` starts them as users do, and is for what launchers do. With 0 ranks
    it is one process that no launcher has started.
    """
    port, server = free_port(), _rank_server()
    with tempfile.NamedTemporaryFile(prefix="ranks", suffix=".log") as log:
        job = {
            "program": str(program),
            "arguments": [str(argument) for argument in arguments],
            "ranks": ranks,
            "port": port,
            "env": _environment(env),
            "cwd": str(cwd),
            "log": log.name,
            "timeout": timeout,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        output = Path(log.name).read_text(errors="replace")
    _remove_shared_memory([port])
    if not answer:
        _rank_server.cache_clear()
        raise AssertionError(f"the process that forks ranks died of {job}:\n{output}")
    status = json.loads(answer)
    assert status != "timeout", f"{program} {arguments} did not end within {timeout} s:\n{output}"
    if check:
        assert status == 0, f"{program} {arguments} ended with {status}:\n{output}"
    return status, output


@functools.cache
def _rank_server():
    """One for each process of tests."""
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "helpers" / "rank_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    atexit.register(server.stdin.close)
    return server


def _environment(env=None):
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(PROGRAMS), os.environ.get("PYTHONPATH", "")]),
        **(env or {}),
    }


def _remove_shared_memory(command):
    """DeepSpeed leaves 66 MiB a rank in shared memory, named after its port, for good."""
    for port in (str(part) for part in command if str(part).isdigit() and int(part) > 1024):
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink(missing_ok=True)


def deepspeed(*arguments, ranks=2):
    """The command of DeepSpeed's launcher."""
    return ["deepspeed", "--num_gpus", ranks, "--master_port", free_port(), *arguments]
