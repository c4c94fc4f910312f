"""status.json: the state of a run, for people, scripts and `collect.py`. Reading it needs only the standard library.

    python launchers/survival/status.py OUTPUT_DIR

prints the state in one word, followed by `retry` if a restart would get further: `running`, `stopped retry`, `done`,
`diverged`, `failed`, `failed retry`, or `unknown` if there is no such file. A killed process leaves `running` behind.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

NAME = "status.json"
RUNNING, STOPPED, DONE, DIVERGED, FAILED = STATES = ("running", "stopped", "done", "diverged", "failed")


def write(output_dir: Path, state: str, *, reason: str = "", step: int = 0, retry: bool = False, rank: int = 0) -> None:
    """Replace status.json atomically. Raises OSError if it cannot be written."""
    from ds_quant.base.whole_folder import write_whole  # here: reading needs the standard library alone

    content = {
        "state": state,
        "reason": reason,
        "step": step,
        "retry": retry,
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "time": round(time.time(), 3),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / NAME, json.dumps(content, indent=2) + "\n")


def read(output_dir: Path) -> dict[str, Any] | None:
    """The content of status.json; None if it is missing or invalid."""
    try:
        found = json.loads((output_dir / NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("state") in STATES else None


def main(argv: list[str]) -> int:
    """Print the state; returns the exit code."""
    if len(argv) != 1:
        print("usage: status.py OUTPUT_DIR", file=sys.stderr)
        return 2
    found = read(Path(argv[0]))
    print("unknown" if found is None else found["state"] + (" retry" if found.get("retry") else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
