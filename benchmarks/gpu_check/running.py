"""Each step in a process of its own, which is killed with its children when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.plan import Step
from ds_quant.base.whole_folder import write_json

ROOT = Path(__file__).resolve().parents[2]
_TAIL_CHARACTERS = 4000
DONE, FAILED, TIMED_OUT = "done", "failed", "timed out"


def command(step: Step, path: Path, *, seconds: float, dry_run: bool) -> list[str]:
    """What runs a step and has it write to `path`."""
    words = [sys.executable, "-m", "benchmarks.gpu_check.worker", step.name, str(path), "--seconds", str(seconds)]
    return [*words, "--dry-run"] if dry_run else words


def run_step(
    step: Step, folder: Path, *, dry_run: bool, seconds: float, words: list[str] | None = None
) -> dict[str, Any]:
    """Run a step, and leave step-N.json in the folder: what it recorded, how it ended, the tail of what it printed.

    `words`: what to run in place of the step's own worker.
    """
    partial, log = folder / f".step-{step.number}.partial.json", folder / f"step-{step.number}.log"
    partial.unlink(missing_ok=True)
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            words or command(step, partial, seconds=seconds, dry_run=dry_run),
            cwd=ROOT,
            env=_environment(dry_run),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=max(seconds, 0.1))
            state = DONE if process.returncode == 0 else FAILED
        except subprocess.TimeoutExpired:
            state = TIMED_OUT
        finally:
            # Also where it has ended: what it started must not run on.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    recorded = json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}
    partial.unlink(missing_ok=True)
    result = {
        "step": step.number,
        "name": step.name,
        "title": step.title,
        "dry_run": dry_run,
        "state": state,
        "exit_status": process.returncode,
        "seconds": round(time.monotonic() - begin, 2),
        "seconds_allowed": round(seconds, 2),
        "measures": {},
        "not_measured": {},
        "tables": {},
        **recorded,
        "output_tail": None if state == DONE else log.read_text(errors="replace")[-_TAIL_CHARACTERS:],
    }
    write_json(folder / f"step-{step.number}.json", result)
    return result


def _environment(dry_run: bool) -> dict[str, str]:
    found = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "launchers"), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": found, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if dry_run:
        own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}
