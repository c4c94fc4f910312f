"""Starts programs the way users do, with time-outs that leave nothing running, PATIENCE times what the tests say."""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import PATIENCE, ROOT, free_port

from ds_quant.base.process_group import RANK_VARIABLES

PROGRAMS = ROOT / "tests" / "distributed"
UNDER_DS_QUANT = ROOT / "ds_quant" / "__main__.py"
"""What `python -m ds_quant` runs, as a program of `run_ranks`."""
WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
"""For processes that compile nothing. DeepSpeed imports torch's compiler else, which is a fifth of a rank's start."""


def launch(command, *, timeout, env=None, cwd=ROOT, check=True):
    """Run a command in a process group of its own; (exit status, output). Kills all of it after the time-out."""
    timeout *= PATIENCE
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
    with tempfile.NamedTemporaryFile(prefix="ranks", suffix=".log") as log:
        job = _job(program, arguments, ranks=ranks, timeout=timeout, env=env, cwd=cwd, log=log.name)
        status = _ask(job)
        output = _read(Path(log.name))
    _remove_shared_memory([job["port"]])
    assert status != "timeout", f"{program} {arguments} did not end within {job['timeout']} s:\n{output}"
    if check:
        assert status == 0, f"{program} {arguments} ended with {status}:\n{output}"
    return status, output


class Ranks:
    """Ranks that are forked as `run_ranks` does, and run while the test goes on: a context that kills what is left."""

    def __init__(self, folder, program, *arguments, ranks, timeout, grace=60, env=None, cwd=ROOT):
        """folder: an empty one, for what is printed and how they end. grace: seconds that the others have to end in
        where one rank has failed."""
        self._folder, self._log = folder, folder / "log"
        job = _job(program, arguments, ranks=ranks, timeout=timeout, env=env, cwd=cwd, log=str(self._log))
        self._port = job["port"]
        _ask({**job, "grace": grace, "folder": str(folder)})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.poll() is None:
            for rank in range(len(self._pids())):
                with contextlib.suppress(ProcessLookupError):
                    self.send_signal(signal.SIGKILL, rank)
            self.wait(60)
        _remove_shared_memory([self._port])

    def _pids(self):
        return json.loads(self._wait_for(self._folder / "ranks", 60))

    def _wait_for(self, path, timeout):
        timeout *= PATIENCE
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end, f"no {path.name} within {timeout} s:\n{self.printed()}"
            time.sleep(0.02)
        return path.read_text()

    def send_signal(self, number, rank=0):
        os.kill(self._pids()[rank], number)

    def poll(self):
        """The exit status as `run_ranks` has it, None while there is none."""
        path = self._folder / "status"
        return json.loads(path.read_text()) if path.exists() else None

    def wait(self, timeout):
        """The exit status."""
        return json.loads(self._wait_for(self._folder / "status", timeout))

    def printed(self):
        return _read(self._log)


def _read(log):
    return log.read_text(errors="replace") if log.exists() else ""


def _job(program, arguments, *, ranks, timeout, env, cwd, log):
    return {
        "program": str(program),
        "arguments": [str(argument) for argument in arguments],
        "ranks": ranks,
        "port": free_port(),
        "env": _environment(env),
        "cwd": str(cwd),
        "log": log,
        "timeout": PATIENCE * timeout,
        "grace": 5 * PATIENCE,
    }


def _ask(job):
    """The answer of the process that forks ranks."""
    server = _rank_server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        _rank_server.cache_clear()
        raise AssertionError(f"the process that forks ranks died of {job}:\n{_read(Path(job['log']))}")
    return json.loads(answer)


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


def outer_environment():
    """That of this process, without what makes it a rank: some tests run programs of one rank within it, which leave
    that behind, and what is started later would take it for its launcher's."""
    ranks = (*RANK_VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def _environment(env=None):
    return {
        **outer_environment(),
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
