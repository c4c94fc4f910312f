"""Forks the ranks of distributed test programs from a process that has imported what they need.

A rank that is started by a launcher spends some ten seconds of a slow processor on imports, and its launcher as much
again. Here they are done once. A forked rank has the state of a process that has imported modules and called nothing;
it runs the program as ``__main__`` and ends as any interpreter does. What launchers do is tested with launchers.

Jobs come as JSON, a line each; the answer is a line with the exit status, or "timeout". One with a `folder` is answered
with the number of a process that stays with its ranks while other jobs come; it writes `ranks`, the numbers of their
processes, and at the end `status` into that folder.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import sys
import time
from pathlib import Path

PAUSE_SECONDS = 0.02


def import_everything():
    """What the programs import, and starts no threads."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import setuptools  # noqa: F401  (before distutils, or it warns)
    import torch  # noqa: F401
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: F401

    import ds_quant.diagnostics.collector
    import ds_quant.engine  # noqa: F401

    sys.path.append(str(Path(__file__).resolve().parents[2] / "launchers"))
    # Every engine with ZeRO imports the first, and torch's compiler with it.
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.utils.zero_to_fp32  # noqa: F401
    import pretraining.job  # noqa: F401

    transformers.utils.logging.set_verbosity_warning()


def become_rank(job, rank):
    """In the child: all that tells it from its siblings."""
    os.setpgid(0, 0)
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *[(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)] * 2]
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["env"])
    if job["ranks"]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in {**ranks, **address}.items()})
    os.chdir(job["cwd"])
    sys.argv = [job["program"], *job["arguments"]]
    wanted = [os.path.dirname(job["program"]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:1] = [path for path in wanted if path]


def wait_for(pids, timeout, grace, is_left):
    """The exit status of the first rank that fails, else 0; the others are ended with it.

    grace: seconds that they have until they are killed. is_left: whether nobody waits for the answer any more.
    """
    left, status, end = set(pids), 0, time.monotonic() + timeout
    while left:
        for pid in list(left):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                code = os.waitstatus_to_exitcode(code)
                if code and not status:
                    status = code
                    end = min(end, time.monotonic() + grace)
                    stop(left, signal.SIGTERM)
        if left and (is_left() or time.monotonic() > end):
            stop(left, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)
            return status or "timeout"
    return status


def stop(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def begin(job):
    """The numbers of the ranks' processes; None in a rank, whose program has come to its end."""
    pids = []
    for rank in range(max(1, job["ranks"])):
        pid = os.fork()
        if not pid:
            become_rank(job, rank)
            runpy.run_path(job["program"], run_name="__main__")
            return None
        with contextlib.suppress(PermissionError):  # the child has begun its program
            os.setpgid(pid, pid)
        pids.append(pid)
    return pids


def a_line_came():
    """Another job, which never comes before the answer, or the end of whoever sends them."""
    return select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]


def parent_ended(parent):
    time.sleep(PAUSE_SECONDS)
    return os.getppid() != parent


def main():
    import_everything()
    # Programs collect what engines leave: a second each time, if what has been imported here were looked through.
    gc.freeze()
    server = os.getpid()
    while line := sys.stdin.readline():
        with contextlib.suppress(ChildProcessError):  # of those that stayed with ranks
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        job = json.loads(line)
        folder = job.get("folder") and Path(job["folder"])
        if folder and (supervisor := os.fork()):
            print(supervisor, flush=True)
            continue
        pids = begin(job)
        if pids is None:
            return
        if not folder:
            print(json.dumps(wait_for(pids, job["timeout"], job["grace"], a_line_came)), flush=True)
            continue
        write(folder / "ranks", pids)
        write(folder / "status", wait_for(pids, job["timeout"], job["grace"], lambda: parent_ended(server)))
        os._exit(0)


def write(path, content):
    """Whole, or not there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


if __name__ == "__main__":
    main()
