"""Starts programs the way users do, with a time-out that leaves nothing running."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, free_port

PROGRAMS = ROOT / "tests" / "distributed"


def launch(command, *, timeout, env=None, cwd=ROOT, check=True):
    """Run a command in a process group of its own; (exit status, output). Kills all of it after `timeout` seconds."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(PROGRAMS), os.environ.get("PYTHONPATH", "")]),
        **(env or {}),
    }
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
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


def _remove_shared_memory(command):
    """DeepSpeed leaves 66 MiB a rank in shared memory, named after its port, for good."""
    for port in (str(part) for part in command if str(part).isdigit() and int(part) > 1024):
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink(missing_ok=True)


def deepspeed(*arguments, ranks=2):
    """The command of DeepSpeed's launcher."""
    return ["deepspeed", "--num_gpus", ranks, "--master_port", free_port(), *arguments]
