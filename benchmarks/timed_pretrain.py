"""launchers/pretrain.py with a clock: `python -m benchmarks.timed_pretrain FOLDER INTERFACE ARGUMENTS`.

The arguments are pretrain.py's. Each rank writes steps-R.json into FOLDER: the time, and the bytes sent by INTERFACE
("-" for none), at the start of every step and at the end of the last.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pretrain
from pretraining import environment

from ds_quant.cli.shared import terminal


def main(folder: Path, interface: str, arguments: list[str]) -> int:
    """Run the job; returns its exit code."""
    terminal.let_threads_sleep()
    environment.without_accelerator()

    # Imported here: it loads deepspeed, which looks for its device when it is imported.
    from transformers import TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    from benchmarks.comm_worker import sent_bytes

    marks: list[tuple[float, int | None]] = []

    class Clock(TrainerCallback):
        def _mark(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), None if interface == "-" else sent_bytes(interface)))

        on_step_begin = on_train_end = _mark

    # Every Trainer starts with these: the job itself stays as it is.
    DEFAULT_CALLBACKS.append(Clock)
    code = pretrain.main(arguments)
    (folder / f"steps-{os.environ['RANK']}.json").write_text(json.dumps(marks))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
